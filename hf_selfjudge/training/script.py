"""The training script (`hf-selfjudge train`): labels -> a judge that was measured on held-out prompts, with its card.
`accelerate launch -m hf_selfjudge train …` shares the work between devices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig
from scipy.special import expit
from sklearn.model_selection import GroupKFold
from transformers import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging
from trl import TrlParser

from ..judge.card import plot_reliability
from ..judge.judge import Judge
from ..judge.lora import shared_copy
from ..judge.threshold import Threshold
from ..mining.label_files import load_labels, mining_of, mining_records
from ..models.load import load_model
from ..utils.names import public_mining
from .config import BY_LENGTH, NONE, SCORES, JudgeConfig, check, option, with_options
from .data import soft_labels, states_of
from .evaluation import calibrate, evaluate, training_free
from .model import TargetWithJudge
from .trainer import JudgeTrainer


logger = logging.get_logger(__name__)

Fit = Callable[[datasets.Dataset, JudgeConfig], JudgeTrainer]  # trains a judge on rows of labels
Parts = dict[str, np.ndarray]  # the numbers of rows that are held out together, by what they are

MEASURING = ("accept_share", "folds", "resamples", "leave_one_category_out")  # options of how a judge is measured
# How the names of the options begin that have no influence on the weights: the card does not list them.
NOT_ON_THE_CARD = (
    *("output_dir", "logging", "log_", "save", "eval_", "report_to", "run_name", "disable_tqdm", "project"),
    *("trackio_", "hub_", "push_to_hub", "label_names", "resume", "restore", "do_", "prediction_loss"),
    *("dataloader_num_workers", "dataloader_p", "dataloader_multiprocessing", "per_device_eval", "use_cpu"),
    *("local_rank", "ddp_", "accelerator_config", "deepspeed", "fsdp"),
)


@dataclass
class ScriptArguments:
    """
    What a judge is trained on, how it is measured, and whether a LoRA adapter is trained too. `hf-selfjudge train
    --help` explains each option.

    Raises:
        ValueError: If an option is out of its range.
    """

    labels: list[str] = option(
        MISSING, "Folders written by `hf-selfjudge mine`, or datasets made of them; all of one target and draft."
    )
    folds: int = option(5, "Folds of the cross-validation, split by prompt.")
    accept_share: float = option(
        0.5,
        "Share of held-out mismatches (the draft's first choices, which decoding meets) that the judge's own "
        "threshold accepts. Published thresholds do not carry over from one pair to another.",
    )
    resamples: int = option(1000, "Bootstrap samples of prompts for the intervals.")
    leave_one_category_out: bool = option(
        False,
        "Also measure each category of prompts, if their answers can be checked, with a judge that was trained on the "
        "others. This trains once more for each category.",
    )
    lora_layers: int = option(
        0,
        "Last layers of the target to train a LoRA adapter in, through the model, after the head; 0: the head alone, "
        "on mined features.",
    )
    lora_r: int = option(8, "Rank of the adapter; its product is multiplied by 2.")
    lora_modules: list[str] = option(("q_proj", "v_proj"), "Linear layers to put the adapter into.")
    lora_learning_rate: float = option(5e-4, "Initial learning rate of adapter and head.")
    lora_epochs: float = option(1, "Passes over the answers.")
    lora_batch: int = option(4, "Answers in a training batch on each device.")
    dtype: str = option("bfloat16", "Type of the target's weights while an adapter is trained.")

    def __post_init__(self):
        check(0 <= self.accept_share <= 1, "accept_share", "in [0, 1]", self.accept_share)
        least = {"folds": 2, "resamples": 1, "lora_layers": 0, "lora_r": 1, "lora_batch": 1}
        for name, value in least.items():
            check(getattr(self, name) >= value, name, f"{value} or more", getattr(self, name))
        for name in ("lora_learning_rate", "lora_epochs"):
            check(0 < getattr(self, name) < math.inf, name, "a number above 0", getattr(self, name))
        dtypes = ("bfloat16", "float16", "float32")
        check(self.dtype in dtypes, "dtype", f"one of {', '.join(dtypes)}", repr(self.dtype))


def make_parser(prog: str | None = None) -> TrlParser:
    """Reads the options of the script from the command line, or from a YAML file (`--config FILE`)."""
    return TrlParser((ScriptArguments, JudgeConfig), prog=prog)


def main(script_args: ScriptArguments, training_args: JudgeConfig) -> Judge:
    """
    Train a judge, calibrate it and choose its threshold on held-out prompts; save it with its card.

    Raises:
        FileNotFoundError: If a folder has no labels.
        ValueError: If the folders are of different models or layers, have too few prompts, one category (with
            `leave_one_category_out`) or no row with this label; or an option needs labels to evaluate on.
    """
    _check_no_evaluation(training_args)
    labels = load_labels(script_args.labels)
    if training_args.states is None:
        training_args.states = states_of(labels)  # the same for all folds
    if training_args.label in SCORES and training_args.label_threshold is None:
        # One for all folds.
        training_args.label_threshold = float(np.nanmedian(np.array(labels[training_args.label][:], dtype=float)))
    label = soft_labels(labels, training_args)
    known = np.flatnonzero(~np.isnan(label))
    others = {name: score[known] for name, score in training_free(labels).items()}
    labels, label = labels.select(known), label[known]
    folds = _folds(labels, script_args.folds)
    categories = _categories(labels) if script_args.leave_one_category_out else {}
    fit = _judge_fitter(script_args, mining_of(labels))
    odds = _held_out(labels, fit, training_args, folds)
    left_out = _held_out(labels, fit, training_args, categories) if categories else None
    trainer = fit(labels, training_args)
    judge = trainer.judge
    slope, intercept = calibrate(odds, label)
    if slope > 0:
        with torch.no_grad():
            judge.head.weight.mul_(slope)
            judge.head.bias.mul_(slope).add_(intercept)
    else:
        logger.warning("On held-out prompts the judge is no better than chance: not calibrated. Mine more labels.")
        slope, intercept = 1.0, 0.0
    mismatches = odds[np.array(labels["kind"][:]) == "mismatch"]
    limit = np.quantile(mismatches if len(mismatches) else odds, script_args.accept_share)
    parts = [*folds.values()]
    measured = evaluate(labels, label, odds, parts, others, left_out, script_args.resamples, training_args.seed)
    judge.info = replace(
        judge.info,
        threshold=Threshold(float(expit(slope * limit + intercept))),
        training={
            "mining": [public_mining(record) for record in mining_records(labels)],
            "fit": {
                **{name: getattr(script_args, name) for name in MEASURING},
                **{"seed": training_args.seed, "slope": slope, "intercept": intercept},
                "options": _card_options(script_args, training_args),
            },
            "held_out": measured,
        },
    )
    if trainer.is_world_process_zero():
        trainer.save_model()
        plot_reliability(measured["reliability"], Path(training_args.output_dir) / "reliability.png")
        trainer.create_model_card()
    return judge


def _check_no_evaluation(args: JudgeConfig) -> None:
    names = ("eval_strategy", "eval_on_start", "load_best_model_at_end", "do_eval", "do_predict")
    refused = [name for name in names if getattr(args, name) not in (False, "no")]
    refused += ["save_strategy"] if args.save_strategy == "best" else []
    if refused:
        raise ValueError(
            f"`{refused[0]}` needs labels to evaluate on, but this script measures the judge on each of its `folds`. "
            "Leave it out, or use `JudgeTrainer`."
        )


def _folds(labels: datasets.Dataset, count: int) -> Parts:
    """Parts of about the same size. All rows of a prompt are in one of them."""
    prompts = np.array(labels["prompt_id"][:])
    if (found := len(set(prompts))) < 2 * count:
        raise ValueError(f"`labels`: {found} prompts are too few for {count} folds. Mine at least {2 * count}.")
    splits = GroupKFold(count).split(prompts, groups=prompts)
    return {f"part {number} of {count}": rows for number, (_, rows) in enumerate(splits, start=1)}


def _categories(labels: datasets.Dataset) -> Parts:
    """The rows of each category with answers that could be checked."""
    category, flipped = np.array(labels["category"][:]), np.array(labels["flipped"][:], dtype=float)
    if len(names := np.unique(category)) < 2:
        raise ValueError(
            f"`leave_one_category_out`: all labels are of one category, '{names[0]}'. Add labels of others, or leave "
            "the option out."
        )
    checked = np.unique(category[~np.isnan(flipped)])
    return {f"the category '{name}'": np.flatnonzero(category == name) for name in checked}


def _held_out(labels: datasets.Dataset, fit: Fit, args: JudgeConfig, parts: Parts) -> np.ndarray:
    """Cross-validate: for each row of a part the log-odds of a judge that was trained on all other rows; NaN for rows
    of none."""
    quiet = {"disable_tqdm": True, "push_to_hub": False, "resume_from_checkpoint": None, "report_to": []}
    quiet |= {"logging_strategy": IntervalStrategy.NO, "save_strategy": SaveStrategy.NO}
    odds = np.full(len(labels), np.nan)
    for name, rows in parts.items():
        try:
            trainer = fit(labels.select(np.delete(np.arange(len(labels)), rows)), with_options(args, **quiet))
        except ValueError as error:
            raise ValueError(f"{error} (Held out was {name}.)") from error
        odds[rows] = trainer.odds(labels.select(rows))
    return odds


def _judge_fitter(script_args: ScriptArguments, mining: dict) -> Fit:
    """The head is trained on mined features; then the adapter, if `lora_layers` is not 0."""
    if not script_args.lora_layers:
        return lambda labels, args: _train(JudgeTrainer(args=args, train_dataset=labels))
    if mining["layer"] is not None:
        raise ValueError(
            f"`lora_layers`: an adapter changes the last hidden states, the labels have those of layer "
            f"{mining['layer']}. Train it on labels with the last ones."
        )
    target, tokenizer = load_model(mining["target"], getattr(torch, script_args.dtype))
    count = target.config.get_text_config().num_hidden_layers
    if script_args.lora_layers > count:
        raise ValueError(f"`lora_layers` is {script_args.lora_layers}, but the target has {count} layers.")
    adapter = LoraConfig(
        r=script_args.lora_r,
        lora_alpha=2 * script_args.lora_r,
        target_modules=script_args.lora_modules,
        layers_to_transform=list(range(count - script_args.lora_layers, count)),
        layers_pattern="layers",
    )

    def fit(labels: datasets.Dataset, args: JudgeConfig) -> JudgeTrainer:
        # The head needs no options of texts. The adapter's training takes longer: it is what is saved and resumed.
        for_head = {"activation_checkpointing": False, "include_num_input_tokens_seen": "no"}
        for_head |= {"resume_from_checkpoint": None, "save_strategy": SaveStrategy.NO}
        if args.train_sampling_strategy in BY_LENGTH:
            for_head["train_sampling_strategy"] = "random"
        judge = _train(JudgeTrainer(args=with_options(args, **for_head), train_dataset=labels)).judge
        own = {"learning_rate": script_args.lora_learning_rate, "num_train_epochs": script_args.lora_epochs}
        own |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), script_args.lora_batch)
        args = with_options(args, max_steps=-1, **own)
        model = TargetWithJudge(shared_copy(target), judge)
        return _train(JudgeTrainer(model, args, train_dataset=labels, processing_class=tokenizer, peft_config=adapter))

    return fit


def _train(trainer: JudgeTrainer) -> JudgeTrainer:
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer


def _card_options(script_args: ScriptArguments, args: JudgeConfig) -> dict:
    """Options that differ from their default and influence the weights, as JSON and the command line can hold them."""
    names = sorted(option.name for option in fields(script_args) if option.name.startswith("lora_"))
    adapter = {name: getattr(script_args, name) for name in (*names, "dtype")} if script_args.lora_layers else {}
    # Not the values of a new `JudgeConfig()`: creating one resets the state of the processes.
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    chosen = {}
    for name, value in sorted(args.to_dict().items()):
        value, default = json.dumps(value) if isinstance(value, dict) else value, defaults[name]
        # What transformers makes of `None` and "". But no states are a choice.
        unset = not default and (value is False or (value == [] and name != "states"))
        if unset or value == default or not isinstance(value, bool | int | float | str | list):
            continue
        if not name.startswith(NOT_ON_THE_CARD):
            # JSON has no infinity, and the command line no empty list.
            infinite = isinstance(value, float) and not math.isfinite(value)
            chosen[name] = str(value) if infinite else value or NONE
    return chosen | adapter
