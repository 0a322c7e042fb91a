"""Labels -> judge, in the shape of TRL's trainers. On mined features training takes seconds and needs no model.
Through the model the target is run again, and an adapter in its last layers can be trained too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, set_peft_model_state_dict
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, default_data_collator, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME

from ..judge.card import write_card
from ..judge.judge import Judge
from ..mining.label_files import mining_of
from ..mining.layers import IGNORED, DataCollatorForJudge, answers_of
from ..models.load import fingerprint, load_model
from ..utils.names import public_name
from .config import JudgeConfig, check_options, check_steps
from .data import check_ahead, features, soft_labels, states_of
from .evaluation import agreement, judge_metrics
from .model import UNCHOSEN, TargetWithJudge, adapter_of, add_adapter, fit_projection, new_judge


class JudgeTrainer(Trainer):
    """
    Trainer for judges: a [`~transformers.Trainer`] that refuses options that it would not obey.

    Example:

    ```python
    >>> from hf_selfjudge import JudgeConfig, JudgeTrainer, load_labels

    >>> trainer = JudgeTrainer(args=JudgeConfig("my-judge"), train_dataset=load_labels("labels"))
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Args:
        model ([`Judge`], [`TargetWithJudge`], [`~transformers.PreTrainedModel`] or `str`, *optional*):
            What to train. On the mined features: a judge's head, by default that of a new judge for the models that
            `train_dataset` was mined with. Through the model: the head of a judge on its target, or of a new judge on
            a target (a model, or its id), and the adapter of `peft_config`. A new judge takes its normalisation and
            its components from `train_dataset`.
        args ([`JudgeConfig`], *optional*):
            Options. By default those of [`JudgeConfig`]; through the model one pass over the answers, 4 at a time,
            with a learning rate of 5e-4.
        data_collator ([`~transformers.DataCollator`], *optional*):
            By default [`~transformers.default_data_collator`], or through the model [`DataCollatorForJudge`].
        train_dataset ([`~datasets.Dataset`]):
            Labels, as [`load_labels`] gives them.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Labels of other prompts to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. Through the model, its padding token fills up short answers.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            By default [`judge_metrics`]. `batch_eval_metrics`, `eval_do_concat_batches=False` and
            `preprocess_logits_for_metrics` need one of your own.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As of [`~transformers.Trainer`]. An optimizer must have all parameters that are trained.
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA adapter to train in the target's last layers. If `None`, the head alone is trained.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If arguments do not fit each other, the labels tell nothing or an option would not be obeyed.
    """

    loss_is_scaled_for_ga = True  # see `compute_loss`

    def __init__(
        self,
        model: Judge | TargetWithJudge | PreTrainedModel | str | None = None,
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
        if not isinstance(train_dataset, datasets.Dataset):
            raise TypeError(f"`train_dataset` must be a `Dataset` of labels, got `{type(train_dataset).__name__}`.")
        if not isinstance(model, Judge | TargetWithJudge | PreTrainedModel | str | None):
            raise TypeError(
                f"`model` must be a `Judge`, `TargetWithJudge`, target or its id, got `{type(model).__name__}`."
            )
        if preprocess_logits_for_metrics is not None and compute_metrics is None:
            raise ValueError("`preprocess_logits_for_metrics` needs a `compute_metrics` that takes what it returns.")
        self.through_model = not isinstance(model, Judge | None)
        mining = mining_of(train_dataset) | {"states": states_of(train_dataset)}
        if args is None:
            options = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 5e-4}
            target_name = public_name(mining["target"]).split("/")[-1]
            args = JudgeConfig(f"{target_name}-Judge", **(options if self.through_model else {}))
        check_options(args, self.through_model, eval_dataset is not None, compute_metrics is not None)
        set_seed(args.seed)
        if isinstance(model, str):
            model, tokenizer = load_model(model, torch.bfloat16)
            processing_class = processing_class or tokenizer
        if model is None:
            model = new_judge(mining, args)
        if isinstance(model, PreTrainedModel):
            weights = {"target": model.config.name_or_path, "target_fingerprint": fingerprint(model)}
            model = TargetWithJudge(model, new_judge(mining | weights, args))
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        self.judge = model.judge if self.through_model else model
        self.has_adapter = self.through_model and model.has_adapter
        if self.judge.adapter is not None:
            raise ValueError("`model`: the judge has an adapter already. Train a new one.")
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0  # any token will do: it is masked
        collator = DataCollatorForJudge(pad_token_id) if self.through_model else default_data_collator
        known = soft_labels(train_dataset, args)
        rows, has_label = self._prepare_dataset(train_dataset, known), ~np.isnan(known)
        self.label_count = int(has_label.sum())
        check_steps(args, len(rows), known[has_label])
        if not self.judge.projection.any() and not self.judge.scalar_mean.any():
            fit_projection(self.judge, features(train_dataset, known, self.judge.info), args.seed)
        if isinstance(eval_dataset, dict):
            parts = eval_dataset.items()
            eval_dataset = {name: self._prepare_dataset(part, soft_labels(part, args)) for name, part in parts}
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, soft_labels(eval_dataset, args))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or judge_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._metrics = defaultdict(list)  # of training, since the last log
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # by a launcher
            raise ValueError("FSDP and DeepSpeed would not be obeyed: a judge stays whole on each device. Use DDP.")
        _check_optimizer(self.optimizer, self.model)

    def _prepare_dataset(self, labels: datasets.Dataset, known: np.ndarray) -> Dataset:
        check_ahead(labels, self.judge.info.states)
        return answers_of(labels, known) if self.through_model else features(labels, known, self.judge.info)

    def train(self, *args, **kwargs):
        """
        Train. What was measured of the judge before, and the thresholds chosen there, are discarded.

        Raises:
            ValueError: If the loss or a weight is not finite, or there is no best judge to load.
        """
        self.judge.info = replace(self.judge.info, threshold=UNCHOSEN, training={}, operating_points={})
        self._metrics.clear()
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            raise ValueError("`load_best_model_at_end`: no judge was evaluated and saved, so there is no best one.")
        self._complete_judge()
        return output

    def _complete_judge(self) -> None:
        """Give the judge a copy of its adapter, as it is now."""
        for name, value in self.model.named_parameters():
            if value.requires_grad and not value.isfinite().all():
                raise ValueError(f"`learning_rate`: {name} is not finite any more. Lower it.")
        if self.has_adapter:
            self.judge.adapter = adapter_of(self.model.target)
            self.judge.info = replace(self.judge.info, adapter=True)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise ValueError(f"`learning_rate`: the loss is {loss:g} after {self.state.global_step} steps. Lower it.")
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The number of labels in all batches of a step; with `average_tokens_across_devices` its mean over the
        processes, whose gradients are averaged."""
        count = sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        count = torch.as_tensor(count, dtype=torch.float, device=device)
        return self.accelerator.reduce(count, "mean") if self.args.average_tokens_across_devices else count

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "places", "ends", "substitutes", "scalars", "hidden", "labels"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean cross-entropy with soft labels over all batches of a step, nats; in training plus the prior's share of
        one row."""
        labels = inputs["labels"]
        odds = model(**{name: value for name, value in inputs.items() if name != "labels"})
        known = labels != IGNORED
        trains = self.model.training
        count = num_items_in_batch if trains and num_items_in_batch is not None else known.sum()
        loss = binary_cross_entropy_with_logits(odds[known], labels[known], reduction="sum") / count
        if trains:
            prior = self.judge.head.weight.square().sum() / (2 * self.args.prior * self.label_count)
            loss = loss + prior / self.current_gradient_accumulation_steps
            for name, value in agreement(odds[known].detach(), labels[known]).items():
                self._metrics[name].append(value)
        return (loss, {"logits": odds}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training; `evaluate` has metrics of its own
            logs = logs | {name: float(np.mean(values)) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def odds(self, labels: datasets.Dataset) -> np.ndarray:
        """The judge's log-odds that the meaning changes, of shape `(rows,)`."""
        dataset, predictions = self._prepare_dataset(labels, np.zeros(len(labels))), []
        # Not `predict`: options would change which rows it returns, and what of them.
        batches = DataLoader(dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        self.model.eval()
        with torch.no_grad():
            for inputs in self.accelerator.prepare(batches):
                del inputs["labels"]
                batch = self.accelerator.pad_across_processes(self.model(**self._prepare_inputs(inputs)), dim=1)
                predictions += self.accelerator.gather_for_metrics(batch).cpu().numpy().tolist()
        if not self.through_model:
            return np.array(predictions)
        odds = np.empty(len(labels))
        for rows, values in zip(dataset["rows"], predictions, strict=True):
            odds[rows] = values[: len(rows)]
        return odds

    # -- files -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._complete_judge()
        if self.args.should_save:
            self.judge.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the judge's card into `args.output_dir`. The arguments of [`~transformers.Trainer`] have no effect."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.judge.info, fingerprint(self.judge))

    def push_to_hub(self, *args, token: str | None = None, revision: str | None = None, **kwargs) -> CommitInfo | None:
        """Publish the judge with its card as `args.hub_model_id`, by default under the name of the output folder.
        Other arguments have no effect. The call returns when all is uploaded."""
        if not self.is_world_process_zero():
            return None
        repo = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        token = token or self.args.hub_token
        return self.judge.push_to_hub(repo, token=token, private=self.args.hub_private_repo, revision=revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        refused = f"`resume_from_checkpoint`: {folder}"
        if not (folder / OPTIMIZER_NAME).is_file():
            raise FileNotFoundError(
                f"{refused} has no {OPTIMIZER_NAME}. It is not a checkpoint, or one of `save_only_model`, from which "
                "training cannot go on as it was. Name another one."
            )
        saved, own = Judge.from_pretrained(folder), replace(self.judge.info, adapter=self.has_adapter)
        for name in ("target_fingerprint", "layer", "scalars", "states", "components", "adapter"):
            theirs, ours = getattr(saved.info, name), getattr(own, name)
            if theirs != ours:
                raise ValueError(f"{refused} is of another judge, whose {name} is {theirs!r}, not {ours!r}.")
        if self.has_adapter:
            # A judge's files call the target by its public name.
            peft_config = adapter_of(self.model.target).config | {"base_model_name_or_path": saved.info.target}
            if saved.adapter.config != peft_config:
                raise ValueError(f"{refused} has an adapter of another `peft_config`.")
        self._load_weights(saved)

    def _load_best_model(self) -> None:
        self._load_weights(Judge.from_pretrained(self.state.best_model_checkpoint))

    def _load_weights(self, saved: Judge) -> None:
        self.judge.load_state_dict(saved.state_dict())
        if self.has_adapter:
            set_peft_model_state_dict(self.model.target, saved.adapter.tensors)


def _check_optimizer(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> None:
    if optimizer is None:
        return
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in model.named_parameters():
        if value.requires_grad and id(value) not in given:
            raise ValueError(
                f"`optimizers`: {name} is to be trained. Make the optimizer of the parameters of `model`."
            )
