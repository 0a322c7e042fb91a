"""Labels -> judge, in the shape of TRL's trainers.

In: a judge and mined labels. Out: the trained judge, with its card. On the features that mining wrote down this takes
seconds and no model; through the model, the target itself is read again, so that an adapter in its last layers can be
trained with the judge.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME

from ..judge.card import write_card
from ..judge.info import JudgeInfo
from ..judge.judge import Judge
from ..judge.lora import Adapter
from ..mining.layers import IGNORED, DataCollatorForJudge, StateReader, answers_of
from ..models.cpu import HalfLinear
from ..models.load import fingerprint, load_model, resolve_model
from ..models.tokens import special_tokens
from ..scoring.statistics import auc
from ..utils.names import public_mining, public_name
from .config import JudgeConfig, check_options, check_steps, steps_of
from .data import DataCollatorForSubstitutions, Substitutions, layer_of, soft_labels


UNCHOSEN = 0.5  # threshold, before one is chosen by what was held out


def new_judge(mining: Mapping, args: JudgeConfig) -> Judge:
    """
    A judge that knows nothing yet.

    Args:
        mining (`Mapping`): How its labels were mined, see [`mining_of`].
    """
    mining = public_mining(mining)
    of = {name: mining[name] for name in ("target", "target_fingerprint", "hidden_size", "vocab_size", "draft")}
    return Judge(
        JudgeInfo(
            **of,
            layer=mining.get("layer"),
            special_tokens=mining["special_tokens"],
            threshold=UNCHOSEN,
            **_looks_at(args, mining["hidden_size"]),
        )
    )


def _looks_at(args: JudgeConfig, hidden_size: int) -> dict:
    return {"components": min(args.components, hidden_size), "scalars": args.scalars, "states": args.states}


class TargetWithJudge(torch.nn.Module):
    """
    A target with a judge on it, to train the judge through the target. The target's own weights stay as they are.

    Args:
        target ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Its hidden states are judged.
        judge ([`Judge`]): Made for it.

    Raises:
        ValueError: If the target's attention cannot take the mask of substitutes ([`packs`]), its weights are packed
            so that nothing can be trained through them, the judge is for another one, or it looks midway into a target
            with an adapter.
    """

    def __init__(self, target: PreTrainedModel | PeftModel, judge: Judge):
        super().__init__()
        self.target, self.judge = target, judge
        base = target.get_base_model() if isinstance(target, PeftModel) else target
        if any(isinstance(module, HalfLinear) for module in base.modules()):
            raise ValueError(
                "`model`: through packed half-precision weights no gradient comes. Load the target in another type: "
                "`load_model(name, torch.bfloat16)`."
            )
        if base is target:  # PEFT gives the weights other names
            judge.check_target(target)
        if base is not target and judge.info.layer is not None:
            raise ValueError(
                f"`judge` looks at what enters layer {judge.info.layer}, but an adapter is for the last hidden "
                "states. Train one on labels as they were mined."
            )
        self.reader = StateReader(base, judge.info.layer)
        if not isinstance(target, PeftModel):
            target.requires_grad_(False)

    def forward(self, scalars: torch.Tensor, places: torch.LongTensor, **text: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scalars (`torch.Tensor` of shape `(batch, substitutes, len(SCALARS))`): Of the target without an adapter.
            places (`torch.LongTensor` of shape `(batch, substitutes)`): Which tokens are replaced.
            text: `input_ids`, `position_ids` and `sees` of [`StateReader.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch, substitutes)`: log-odds that the meaning changes.
        """
        states = self.reader(places=places, **text)
        return self.judge(scalars.flatten(0, 1), states.flatten(0, 1)).view(places.shape)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """As of [`~transformers.PreTrainedModel`]. Without an adapter no activation of the target is kept anyway."""
        if isinstance(self.target, PeftModel):
            base = self.target.get_base_model()
            base.activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)


class JudgeTrainer(Trainer):
    """
    Trainer for judges.

    This class is a wrapper around the [`~transformers.Trainer`] class and inherits all of its attributes and methods.
    Options that would not be obeyed are refused, see [`JudgeConfig`].

    Example:

    ```python
    >>> from hf_selfjudge import JudgeConfig, JudgeTrainer, load_labels, mining_of, new_judge

    >>> args = JudgeConfig("my-judge")
    >>> judge = new_judge(mining_of(["labels"])[0], args)
    >>> trainer = JudgeTrainer(judge, args, train_dataset=load_labels("labels"))
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Args:
        model ([`Judge`], [`TargetWithJudge`], [`~transformers.PreTrainedModel`] or `str`):
            What to train:

            - a judge: its head, on the features that mining wrote down;
            - a target with a judge, or a target alone (a model, or its id) for which a new judge is made: the head,
              and the adapter of `peft_config`, through the model.

            A judge that was not trained yet first takes its normalisation and its components from `train_dataset`.
        args ([`JudgeConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used: that of [`JudgeConfig`], or
            through the model one pass over the answers, 4 at a time, with a learning rate of 5e-4.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to form a batch. Will default to [`DataCollatorForSubstitutions`], or through the model to
            [`DataCollatorForJudge`].
        train_dataset ([`~datasets.Dataset`]):
            Labels, as [`load_labels`] gives them.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Labels to evaluate on: of other prompts.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target, for training through the model. If `None`, it is loaded with the target.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Metrics at evaluation. Will default to [`judge_metrics`]. `batch_eval_metrics`,
            `eval_do_concat_batches=False` and `preprocess_logits_for_metrics` need one of your own.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use. The optimizer must be of all that is trained.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Optimizer class and keyword arguments to use.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            Preprocesses the log-odds before they are cached at evaluation.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train in the target. If `None`, the head alone is trained.
    """

    loss_is_scaled_for_ga = True  # see `compute_loss`

    def __init__(
        self,
        model: Judge | TargetWithJudge | PreTrainedModel | str,
        args: JudgeConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            through = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 5e-4}
            args = JudgeConfig(f"{_name_of(model)}-Judge", **({} if isinstance(model, Judge) else through))
        if not isinstance(train_dataset, datasets.Dataset):
            raise TypeError(f"`train_dataset` must be a `Dataset` of labels, got `{type(train_dataset).__name__}`.")
        if preprocess_logits_for_metrics is not None and compute_metrics is None:
            raise ValueError("`preprocess_logits_for_metrics` needs a `compute_metrics` that takes what it returns.")
        check_options(args, not isinstance(model, Judge), eval_dataset is not None, compute_metrics is not None)
        set_seed(args.seed)
        if isinstance(model, str):
            model, tokenizer = load_model(model, torch.bfloat16)
            processing_class = processing_class or tokenizer
        if isinstance(model, PreTrainedModel):
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(resolve_model(model.config.name_or_path))
            model = TargetWithJudge(model, _judge_for(model, processing_class, args, layer_of(train_dataset)))
        if peft_config is not None:
            model = self._with_adapter(model, peft_config)
        self.through_model, self.judge = isinstance(model, TargetWithJudge), _judge_of(model)
        if self.judge.adapter is not None:
            raise ValueError("`model`: the judge has an adapter already. Train a new one.")
        if data_collator is None and self.through_model:
            tokens = (processing_class.pad_token_id, processing_class.eos_token_id) if processing_class else ()
            data_collator = DataCollatorForJudge(next((t for t in tokens if t is not None), 0))
        known = soft_labels(train_dataset, args)
        rows = self._prepare_dataset(train_dataset, args)
        check_steps(args, len(rows), known[~np.isnan(known)])
        if not self.judge.projection.any() and not self.judge.scalar_mean.any():
            fit_projection(self.judge, self._mined(train_dataset, known), args.seed)
        self.label_count = int((~np.isnan(known)).sum())
        prepare = self._prepare_dataset
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset, args) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or DataCollatorForSubstitutions(),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or judge_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._metrics = {"train": defaultdict(list)}
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # by a launcher
            raise ValueError("FSDP and DeepSpeed would not be obeyed: a judge stays whole on each device. Use DDP.")
        if self.optimizer is not None:
            _check_optimizer(self.optimizer, self.model)

    @staticmethod
    def _with_adapter(model: Judge | TargetWithJudge, peft_config: PeftConfig) -> TargetWithJudge:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                "`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), got "
                f"{type(peft_config).__name__}."
            )
        if isinstance(model, Judge):
            raise ValueError(
                "You passed `peft_config` with a `Judge`, which is trained on mined features, without the model that "
                "an adapter would be in. Pass the target, or a `TargetWithJudge`."
            )
        if isinstance(model.target, PeftModel):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config` to the trainer. Please first merge "
                "and unload the existing adapter, and pass the resulting model along with the new `peft_config`."
            )
        adapted = get_peft_model(model.target, peft_config)
        adapter_of(adapted)  # refuse now what could not be used
        return TargetWithJudge(adapted, model.judge)

    def _prepare_dataset(self, dataset: datasets.Dataset, args: JudgeConfig) -> torch.utils.data.Dataset:
        known = soft_labels(dataset, args)
        return answers_of(dataset, known) if self.through_model else self._mined(dataset, known)

    def _mined(self, dataset: datasets.Dataset, known: np.ndarray) -> Substitutions:
        """Rows with the hidden states that stand in them, which must be those that the judge looks at."""
        if (layer := layer_of(dataset)) != self.judge.info.layer:
            raise ValueError(
                f"The labels have hidden states of layer {layer}, the judge looks at layer {self.judge.info.layer} "
                "(None: the last). Make it with `new_judge(mining_of([folder])[0], args)`."
            )
        return Substitutions(dataset, known)

    def train(self, *args, **kwargs):
        """
        What was measured of the judge before, and the thresholds chosen there, are forgotten.

        Raises:
            ValueError: If no step was taken, the loss or a weight is not finite, or there is no best judge to load.
        """
        self.judge.info = replace(self.judge.info, threshold=UNCHOSEN, training={}, operating_points={})
        self._metrics["train"].clear()
        output = super().train(*args, **kwargs)
        if not self.state.global_step:
            raise ValueError(f"No step was taken: {steps_of(self.args, len(self.train_dataset))}.")
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            raise ValueError("`load_best_model_at_end`: no judge was evaluated and saved, so there is no best one.")
        self._complete_judge()
        return output

    def _complete_judge(self) -> None:
        """Give the judge its adapter, as it is now."""
        for name, value in self.model.named_parameters():
            if value.requires_grad and not value.isfinite().all():
                raise ValueError(f"`learning_rate`: {name} is not finite any more. Lower it.")
        if self._has_adapter():
            self.judge.adapter = adapter_of(self.model.target)
            self.judge.info = replace(self.judge.info, adapter=True)

    def _has_adapter(self) -> bool:
        return self.through_model and isinstance(self.model.target, PeftModel)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise ValueError(f"`learning_rate`: the loss is {loss:g} after {self.state.global_step} steps. Lower it.")
        return loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """Labels in all batches of a step; with `average_tokens_across_devices` their mean over the processes, whose
        gradients are averaged."""
        count = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        count = torch.as_tensor(count, dtype=torch.float, device=device)
        return self.accelerator.reduce(count, "mean") if self.args.average_tokens_across_devices else count

    def _get_dataloader(
        self,
        dataset: torch.utils.data.Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> torch.utils.data.DataLoader:
        """At evaluation every row counts, and they stay in order."""
        options = self.args
        if not is_training:
            self.args = copy.copy(options)
            self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "random"
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args = options

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        """What is missing or no number is never beaten: the last judge would pass for the best."""
        name = self.args.metric_for_best_model
        if name is not None and not np.isfinite(metrics.get(f"eval_{name.removeprefix('eval_')}", np.nan)):
            raise ValueError(
                f"`metric_for_best_model`: after {self.state.global_step} steps there is no number for {name!r}, only "
                f"for {', '.join(sorted(metrics))} (see `judge_metrics`). Choose one of these."
            )
        return super()._determine_best_metric(metrics, trial)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "places", "substitutes", "scalars", "hidden", "labels"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean cross-entropy with soft labels over all batches of a step, nats; in training with the prior's share of
        a row on top."""
        labels = inputs["labels"]
        odds = model(**{name: value for name, value in inputs.items() if name != "labels"})
        known = labels != IGNORED
        step = self.model.training and num_items_in_batch is not None
        count = num_items_in_batch if step else known.sum()
        loss = binary_cross_entropy_with_logits(odds[known], labels[known], reduction="sum") / count
        if self.model.training:
            prior = self.judge.head.weight.square().sum() / (2 * self.args.prior * self.label_count)
            loss = loss + prior / self.current_gradient_accumulation_steps
            for name, value in _agreement(odds[known].detach(), labels[known]).items():
                self._metrics["train"][name].append(value)
        return (loss, {"logits": odds}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training; `evaluate` has metrics of its own
            logs = logs | {name: float(np.mean(values)) for name, values in self._metrics["train"].items()}
            self._metrics["train"].clear()
        super().log(logs, start_time)

    def odds(self, labels: datasets.Dataset) -> np.ndarray:
        """What the judge says of rows of labels: log-odds of shape `(rows,)`; NaN where the label is not known."""
        dataset, known = self._prepare_dataset(labels, self.args), soft_labels(labels, self.args)
        odds, predictions = np.full(len(known), np.nan), []
        self.model.eval()
        with torch.no_grad():  # not `predict`, whose options are about what the measures are given
            for inputs in self.get_test_dataloader(dataset):
                del inputs["labels"]
                some = self.accelerator.pad_across_processes(self.model(**self._prepare_inputs(inputs)), dim=1)
                predictions += self.accelerator.gather_for_metrics(some).cpu().numpy().tolist()
        if self.through_model:
            for rows, values in zip(dataset["rows"], predictions, strict=True):
                odds[rows] = values[: len(rows)]
        else:
            odds[~np.isnan(known)] = predictions
        return odds

    # -- files -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._complete_judge()
        if self.args.should_save:
            self.judge.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        self._write_card(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write the judge's card into `args.output_dir`. What it says comes from the judge; the arguments are those of
        [`~transformers.Trainer`], and are not looked at.
        """
        self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        if self.is_world_process_zero():
            write_card(folder, self.judge.info, fingerprint(self.judge))

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo | None:
        """
        Publish the judge with its card as `args.hub_model_id`, by default under the name of the output folder. It
        waits for the end, and has a message of its own: `commit_message` and `blocking` are not looked at.
        """
        if not self.is_world_process_zero():
            return None
        repo = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        how = {"token": token or self.args.hub_token, "private": self.args.hub_private_repo, "revision": revision}
        return self.judge.push_to_hub(repo, **how)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / OPTIMIZER_NAME).is_file():
            raise FileNotFoundError(
                f"`resume_from_checkpoint`: {folder} has no {OPTIMIZER_NAME}. It is no checkpoint, or one of "
                "`save_only_model`, from which training cannot go on as it was. Name another one."
            )
        saved = Judge.from_pretrained(folder)
        here = replace(self.judge.info, adapter=self._has_adapter())
        for name in ("target_fingerprint", "layer", "scalars", "states", "components", "adapter"):
            if getattr(saved.info, name) != getattr(here, name):
                raise ValueError(
                    f"`resume_from_checkpoint`: {folder} is of another judge, whose {name} is "
                    f"{getattr(saved.info, name)!r}, not {getattr(here, name)!r}."
                )
        own = adapter_of(self.model.target).config if self._has_adapter() else {}
        # A judge's files call the target by its public name.
        if own and saved.adapter.config != own | {"base_model_name_or_path": saved.info.target}:
            raise ValueError(f"`resume_from_checkpoint`: {folder} has an adapter of another `peft_config`.")
        self._load_weights(saved)

    def _load_best_model(self) -> None:
        self._load_weights(Judge.from_pretrained(self.state.best_model_checkpoint))

    def _load_weights(self, saved: Judge) -> None:
        self.judge.load_state_dict(saved.state_dict())
        if self._has_adapter():
            set_peft_model_state_dict(self.model.target, saved.adapter.tensors)


def _name_of(model: Judge | TargetWithJudge | PreTrainedModel | str) -> str:
    """The last part of the target's name."""
    if isinstance(model, PreTrainedModel):
        model = model.config.name_or_path
    return public_name(model if isinstance(model, str) else _judge_of(model).info.target).split("/")[-1]


def _check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: If it is of other parameters than those that are trained.
    """
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in model.named_parameters():
        if value.requires_grad and id(value) not in given:
            raise ValueError(
                f"`optimizers`: {name} is to be trained, but the optimizer does not have it. Make it of the "
                "parameters of `model`, or pass `optimizer_cls_and_kwargs`."
            )


def _judge_of(model: Judge | TargetWithJudge) -> Judge:
    if not isinstance(model, Judge | TargetWithJudge):
        raise TypeError(
            f"`model` must be a `Judge`, a `TargetWithJudge`, a target or its id, got `{type(model).__name__}`."
        )
    return model if isinstance(model, Judge) else model.judge


def _judge_for(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: JudgeConfig, layer: int | None = None
) -> Judge:
    """A new judge for a target."""
    config = target.config.get_text_config()
    return Judge(
        JudgeInfo(
            target=public_name(target.config.name_or_path),
            target_fingerprint=fingerprint(target),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            draft="",
            layer=layer,
            special_tokens=special_tokens(target, tokenizer),
            threshold=UNCHOSEN,
            **_looks_at(args, config.hidden_size),
        )
    )


def adapter_of(model: PeftModel) -> Adapter:
    """
    What PEFT would save of a model.

    Raises:
        ValueError: If it is no plain LoRA in numbered layers, which is all that can be replayed.
    """
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    config |= {"inference_mode": True}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False).items()
    return Adapter(config, {name: value.detach().cpu().contiguous() for name, value in tensors})


def fit_projection(judge: Judge, rows: Substitutions, seed: int) -> None:
    """
    Set a judge's normalisation, and its components: whitened principal components of each hidden state.

    Raises:
        ValueError: If there are fewer rows than components.
    """
    components = judge.info.components
    if judge.sides and len(rows) < components:
        raise ValueError(
            f"`components` is {components}, but there are {len(rows)} labels only. Mine more, or lower it."
        )
    with torch.no_grad():
        if judge.columns:
            scaler = StandardScaler().fit(rows.scalars[:, judge.columns].numpy())
            judge.scalar_mean.copy_(torch.from_numpy(scaler.mean_))
            judge.scalar_scale.copy_(torch.from_numpy(scaler.scale_))
        for side, state in enumerate(judge.sides):
            states = rows.hidden[:, state].float().numpy()
            # Each dimension is scaled first: a handful of the target's dimensions are a hundred times the others.
            normal = StandardScaler().fit(states)
            pca = PCA(components, whiten=True, svd_solver="randomized", random_state=seed)
            pca.fit(normal.transform(states))
            # The normalised states have mean 0, so the components' own centre is 0 as well.
            # Rows of the same place share a state: some components may have next to no variance.
            variance = np.maximum(pca.explained_variance_, 1e-4 * max(1, pca.explained_variance_[0]))
            matrix = pca.components_.T / np.sqrt(variance) / normal.scale_[:, None]
            judge.hidden_mean[side] = torch.from_numpy(normal.mean_)
            judge.projection[side] = torch.from_numpy(matrix)


def _agreement(odds: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """At a threshold of 0.5: accuracy, share accepted, and the mean label of the accepted if there are any."""
    accepted = odds < 0
    measured = {
        "accuracy": float(((label < 0.5) == accepted).float().mean()),
        "accept_rate": float(accepted.float().mean()),
    }
    return measured | ({"false_accept_rate": float(label[accepted].mean())} if accepted.any() else {})


def judge_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    `accuracy`, `accept_rate` and `false_accept_rate` (the mean label among the accepted; left out where nothing is
    accepted) at a threshold of 0.5, and `auroc` for labels above 0.5 (left out where all or none are).
    """
    odds, labels = (torch.tensor(values).flatten() for values in (prediction.predictions, prediction.label_ids))
    odds, labels = odds[labels != IGNORED], labels[labels != IGNORED]
    area = auc(labels.numpy() > 0.5, odds.numpy())
    return _agreement(odds, labels) | ({} if np.isnan(area) else {"auroc": area})
