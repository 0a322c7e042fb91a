"""
The training script: labels -> a judge that was measured on held-out prompts, with its card.

```bash
hf-selfjudge train --labels labels/gsm8k labels/own --output my-judge
```

All options of [`JudgeConfig`] may follow, with hyphens or underscores, or stand in a YAML file that is named with
`--config`; `accelerate launch -m hf_selfjudge train …` shares the work between devices.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig
from scipy.special import expit
from transformers import PrinterCallback
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging
from trl import TrlParser

from ..judge.card import plot_reliability, write_card
from ..judge.judge import Judge
from ..judge.lora import shared_copy
from ..judge.threshold import Threshold
from ..mining.label_files import load_labels, mining_of, mining_records
from ..models.load import fingerprint, load_model
from ..utils.names import public_mining
from .config import NONE, SCORES, JudgeConfig, check, without_text
from .data import soft_labels
from .evaluation import calibrate, evaluate, held_out
from .through_model import TargetWithJudge
from .trainer import JudgeTrainer


logger = logging.get_logger(__name__)

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
    What a judge is trained on, how it is measured, and whether a LoRA adapter is trained too. The help of each option
    is in the `metadata` of its field, and in `hf-selfjudge train --help`.

    Raises:
        ValueError: If an option is out of its range.
    """

    labels: list[str] = field(
        metadata={
            "help": "Folders written by `hf-selfjudge mine`, or datasets made of them; all of one target and draft."
        }
    )
    folds: int = field(default=5, metadata={"help": "Folds of the cross-validation, split by prompt."})
    accept_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of held-out mismatches (the draft's first choices, which decoding meets) that the judge's "
            "own threshold accepts. Published thresholds do not carry over from one pair to another."
        },
    )
    resamples: int = field(default=1000, metadata={"help": "Bootstrap samples of prompts for the intervals."})
    lora_layers: int = field(
        default=0,
        metadata={
            "help": "Last layers of the target to train a LoRA adapter in, through the model, after the head; 0: the "
            "head alone, on mined features."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter; its product is multiplied by 2."})
    lora_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers to put the adapter into."}
    )
    lora_learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of adapter and head."})
    lora_epochs: float = field(default=1, metadata={"help": "Passes over the answers."})
    lora_batch: int = field(default=4, metadata={"help": "Answers in a training batch on each device."})
    dtype: str = field(
        default="bfloat16", metadata={"help": "Type of the target's weights while an adapter is trained."}
    )

    def __post_init__(self):
        check(0 <= self.accept_share <= 1, "accept_share", "in [0, 1]", self.accept_share)
        least = {"folds": 2, "resamples": 1, "lora_layers": 0, "lora_r": 1, "lora_batch": 1}
        for name, value in least.items():
            check(getattr(self, name) >= value, name, f"{value} or more", getattr(self, name))
        for name in ("lora_learning_rate", "lora_epochs"):
            check(0 < getattr(self, name) < math.inf, name, "a number above 0", getattr(self, name))
        dtypes = ("bfloat16", "float16", "float32")
        check(self.dtype in dtypes, "dtype", f"one of {', '.join(dtypes)}", repr(self.dtype))


def main(script_args: ScriptArguments, training_args: JudgeConfig) -> Judge:
    """
    Train a judge, calibrate it and choose its threshold on held-out prompts; save it with its card.

    Raises:
        FileNotFoundError: If a folder has no labels.
        ValueError: If the folders are of different models or layers, have too few prompts or no row with this label;
            or an option needs labels to evaluate on.
    """
    _check_no_evaluation(training_args)
    labels = load_labels(script_args.labels)
    if training_args.label in SCORES and training_args.label_threshold is None:
        # One for all folds.
        training_args.label_threshold = float(np.nanmedian(np.array(labels[training_args.label][:], dtype=float)))
    label = soft_labels(labels, training_args)
    fit = _judge_fitter(script_args, mining_of(labels))
    odds, fold = held_out(labels, fit, training_args, script_args.folds)
    trainer = fit(labels, training_args)
    judge, known = trainer.judge, np.flatnonzero(~np.isnan(odds))
    slope, intercept = calibrate(odds[known], label[known])
    if slope > 0:
        with torch.no_grad():
            judge.head.weight.mul_(slope)
            judge.head.bias.mul_(slope).add_(intercept)
    else:
        logger.warning(
            "On held-out prompts the judge is no better than chance, so it is not calibrated. Mine more labels."
        )
        slope, intercept = 1.0, 0.0
    mismatches = odds[(np.array(labels["kind"][:]) == "mismatch") & ~np.isnan(odds)]
    limit = np.quantile(mismatches if len(mismatches) else odds[known], script_args.accept_share)
    records = mining_records(labels)
    number = {record["source"]: index for index, record in enumerate(records)}
    source = np.array([number[name] for name in labels["source"]])
    measured = evaluate(
        *(labels.select(known), label[known], odds[known], fold[known], source[known]),
        *(script_args.resamples, training_args.seed),
    )
    measuring = {name: getattr(script_args, name) for name in ("accept_share", "folds", "resamples")}
    calibration = {"seed": training_args.seed, "slope": slope, "intercept": intercept}
    options = _card_options(training_args) | _lora_options(script_args)
    judge.info = replace(
        judge.info,
        threshold=Threshold(float(expit(slope * limit + intercept))),
        training={
            "mining": [public_mining(record) for record in records],
            "fit": {**measuring, **calibration, "options": options},
            "held_out": measured,
        },
    )
    if trainer.is_world_process_zero():
        trainer.save_model()
        folder = Path(training_args.output_dir)
        plot_reliability(measured["reliability"], folder / "reliability.png")
        write_card(folder, judge.info, fingerprint(judge))
    return judge


def _check_no_evaluation(args: JudgeConfig) -> None:
    """
    Raises:
        ValueError: If an option needs labels to evaluate on.
    """
    chosen = {"eval_strategy": args.eval_strategy != "no", "save_strategy": args.save_strategy == "best"}
    others = ("eval_on_start", "load_best_model_at_end", "do_eval", "do_predict")
    for name, wanted in (chosen | {name: getattr(args, name) for name in others}).items():
        if wanted:
            raise ValueError(
                f"`{name}` needs labels to evaluate on, but this script measures the judge on each of its `folds`. "
                "Leave it out, or use `JudgeTrainer`."
            )


def _judge_fitter(
    script_args: ScriptArguments, mining: dict
) -> Callable[[datasets.Dataset, JudgeConfig], JudgeTrainer]:
    """A function that trains a judge on rows of labels: the head on mined features, then the adapter if one is
    wanted."""
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
        head_args, args = without_text(args), copy.copy(args)
        # The adapter's training, which takes longer, is what is saved and resumed.
        head_args.resume_from_checkpoint, head_args.save_strategy = None, SaveStrategy.NO
        judge = _train(JudgeTrainer(args=head_args, train_dataset=labels)).judge
        args.learning_rate, args.max_steps = script_args.lora_learning_rate, -1
        args.num_train_epochs = script_args.lora_epochs
        args.per_device_train_batch_size = args.per_device_eval_batch_size = script_args.lora_batch
        model = TargetWithJudge(shared_copy(target), judge)
        return _train(JudgeTrainer(model, args, train_dataset=labels, processing_class=tokenizer, peft_config=adapter))

    return fit


def _train(trainer: JudgeTrainer) -> JudgeTrainer:
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer


def _lora_options(args: ScriptArguments) -> dict:
    """Options of the adapter, if there is one."""
    names = sorted(option.name for option in fields(args) if option.name.startswith("lora_"))
    return {name: getattr(args, name) for name in (*names, "dtype")} if args.lora_layers else {}


def _card_options(args: JudgeConfig) -> dict:
    """Options that differ from their default and influence the weights, as JSON and the command line can hold them."""
    chosen = {}
    for option in sorted(fields(JudgeConfig), key=lambda option: option.name):
        if not option.init or option.name.startswith(NOT_ON_THE_CARD):
            continue
        # Not the values of a new `JudgeConfig()`: creating one resets the state of the processes.
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value = getattr(args, option.name)
        value, default = (part.value if isinstance(part, Enum) else part for part in (value, default))
        if isinstance(value, dict):
            value = json.dumps(value)
        if value == default or not isinstance(value, bool | int | float | str | list):
            continue
        if not default and (value is False or value == []):  # what transformers makes of `None` and ""
            continue
        # JSON has no infinity, and the command line no empty list.
        chosen[option.name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value or NONE
    return chosen


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of the script."""
    return TrlParser((ScriptArguments, JudgeConfig), prog=prog)
