"""
The training script: labels -> a judge that was measured on held-out prompts, with its card.

```bash
hf-selfjudge train --labels labels/gsm8k labels/own --output_dir my-judge
```

All options of [`JudgeConfig`] and [`~transformers.TrainingArguments`] may follow, or stand in a YAML file that is
named with `--config`; `accelerate launch -m hf_selfjudge.cli.app train …` shares the work between devices.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
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
from ..mining.labels import folders_of, load_labels, mining_of
from ..models.load import fingerprint, load_model
from ..utils.names import public_mining
from .config import NONE, SCORES, JudgeConfig, without_text
from .data import soft_labels
from .evaluation import HeldOutConfig, calibrate, calibrated, evaluate, held_out
from .trainer import JudgeTrainer, TargetWithJudge, new_judge


logger = logging.get_logger(__name__)

# How the options begin that are about what is told and where it is written.
NO_PART = (
    "output_dir",
    "logging",
    "log_",
    "save",
    "eval_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "hub_",
    "push_to_hub",
    "dataloader_num_workers",
    "dataloader_p",
    "dataloader_multiprocessing",
    "label_names",
    "use_cpu",
    "local_rank",
    "ddp_",
    "resume",
    "per_device_eval",
    "do_",
    "prediction_loss",
    "restore",
    "accelerator_config",
    "deepspeed",
    "fsdp",
    "project",
    "trackio_",
)


@dataclass
class ScriptArguments:
    """
    What a judge is trained on, and how it is measured.

    Args:
        labels (`list[str]`): Folders written by [`mine`], or datasets on the Hub that were made of them; all of one
            target and draft.
        folds (`int`, *optional*, defaults to `5`): Of the cross-validation, split by prompt.
        accept_share (`float`, *optional*, defaults to `0.5`): Share of held-out mismatches that the judge's own
            threshold accepts.
        resamples (`int`, *optional*, defaults to `1000`): Bootstrap resamples of prompts for the intervals.
        lora_layers (`int`, *optional*, defaults to `0`): Last layers of the target to train a LoRA adapter in, through
            the model, behind the head; 0: the head alone, on mined features.
        lora_r (`int`, *optional*, defaults to `8`): Rank of the adapter; its product is multiplied by 2.
        lora_modules (`list[str]`, *optional*): Linear layers that it is in. By default `q_proj` and `v_proj`.
        lora_learning_rate (`float`, *optional*, defaults to `5e-4`): Initial learning rate of adapter and head.
        lora_epochs (`float`, *optional*, defaults to `1`): Passes over the answers.
        lora_batch (`int`, *optional*, defaults to `4`): Answers of a training batch on each device.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): Of the target's weights, to train an adapter in it.
    """

    labels: list[str] = field(
        metadata={
            "help": "Folders written by `hf-selfjudge mine`, or datasets made of them; all of one target and draft."
        }
    )
    folds: int = field(default=5, metadata={"help": "Of the cross-validation, split by prompt."})
    accept_share: float = field(
        default=0.5, metadata={"help": "Share of held-out mismatches that the judge's own threshold accepts."}
    )
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples of prompts for the intervals."})
    lora_layers: int = field(
        default=0,
        metadata={
            "help": "Last layers of the target to train a LoRA adapter in, through the model, behind the head; 0: the "
            "head alone, on mined features."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter; its product is multiplied by 2."})
    lora_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that it is in."}
    )
    lora_learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of adapter and head."})
    lora_epochs: float = field(default=1, metadata={"help": "Passes over the answers."})
    lora_batch: int = field(default=4, metadata={"help": "Answers of a training batch on each device."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the target's weights, to train an adapter in it."})

    def __post_init__(self):
        if not 0 <= self.accept_share <= 1:
            raise ValueError(f"`accept_share` must be in [0, 1], got {self.accept_share}.")
        if self.folds < 2:
            raise ValueError(f"`folds` must be 2 or more, got {self.folds}.")
        if self.resamples < 1:
            raise ValueError(f"`resamples` must be 1 or more, got {self.resamples}.")
        if self.lora_layers < 0:
            raise ValueError(f"`lora_layers` must be 0 or more, got {self.lora_layers}.")
        for name in ("lora_r", "lora_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        for name in ("lora_learning_rate", "lora_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, got {getattr(self, name)}.")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"`dtype` must be one of bfloat16, float16, float32, got {self.dtype!r}.")


def main(script_args: ScriptArguments, training_args: JudgeConfig) -> Judge:
    """
    Train a judge, calibrate it and choose its threshold on held-out prompts; save it with its card.

    Raises:
        FileNotFoundError: If a folder has no labels.
        ValueError: If the folders are of different models or layers, have too few prompts, or no row with this label;
            or an option asks for labels to evaluate on.
    """
    _check_unmeasured(training_args)
    folders = folders_of(script_args.labels)
    mining = mining_of(folders)
    sets = [load_labels(folder) for folder in folders]
    labels, source = datasets.concatenate_datasets(sets), np.repeat(np.arange(len(sets)), [len(rows) for rows in sets])
    config = HeldOutConfig(script_args.accept_share, script_args.folds, script_args.resamples, training_args.seed)
    if training_args.label in SCORES and training_args.label_threshold is None:
        # One for all folds.
        training_args.label_threshold = float(np.nanmedian(np.array(labels[training_args.label][:], dtype=float)))
    label = soft_labels(labels, training_args)
    fit = _how(script_args, mining[0])
    odds, part = held_out(labels, fit, training_args, config.folds)
    trainer = fit(labels, training_args)

    known = np.flatnonzero(~np.isnan(odds))
    slope, intercept = calibrate(odds[known], label[known])
    if slope <= 0:
        logger.warning(
            "On held-out prompts the judge tells nothing, or the wrong way round: it is left as it was trained. Mine "
            "more labels."
        )
        slope, intercept = 1.0, 0.0
    judge = calibrated(trainer.judge, slope, intercept)
    met = odds[(np.array(labels["kind"][:]) == "mismatch") & ~np.isnan(odds)]
    threshold = slope * np.quantile(met if len(met) else odds[known], config.accept_share) + intercept
    measured = evaluate(labels.select(known), label[known], odds[known], part[known], source[known], config)
    judge.info = replace(
        judge.info,
        threshold=float(expit(threshold)),
        training={
            "mining": [public_mining(made) for made in mining],
            "fit": {
                **asdict(config),
                **{"slope": slope, "intercept": intercept},
                "options": _chosen(training_args) | _lora(script_args),
            },
            "held_out": measured,
        },
    )
    if trainer.is_world_process_zero():
        trainer.save_model()
        folder = Path(training_args.output_dir)
        plot_reliability(measured["reliability"], folder / "reliability.png")
        write_card(folder, judge.info, fingerprint(judge))
    return judge


def _check_unmeasured(args: JudgeConfig) -> None:
    """
    Raises:
        ValueError: If an option asks for labels to evaluate on.
    """
    chosen = {"eval_strategy": args.eval_strategy != "no", "save_strategy": args.save_strategy == "best"}
    others = ("eval_on_start", "load_best_model_at_end", "do_eval", "do_predict")
    chosen |= {name: getattr(args, name) for name in others}
    for name, wanted in chosen.items():
        if wanted:
            raise ValueError(
                f"`{name}` asks for labels to evaluate on, but this script measures the judge on each of its `folds`. "
                "Leave it out, or use `JudgeTrainer`."
            )


def _how(script_args: ScriptArguments, mining: dict) -> Callable[[datasets.Dataset, JudgeConfig], JudgeTrainer]:
    """What trains a judge on rows of labels: the head on mined features, and then an adapter too if there shall be
    one."""
    if script_args.lora_layers:
        if mining.get("layer") is not None:
            raise ValueError(
                f"`lora_layers`: an adapter is for the last hidden states, the labels have those of layer "
                f"{mining['layer']}. Train it on labels as they were mined."
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
        head = args
        if script_args.lora_layers:  # what is saved and resumed is the longer part
            head = without_text(args)
            head.resume_from_checkpoint, head.save_strategy = None, SaveStrategy.NO
        trainer = _train(JudgeTrainer(new_judge(mining, args), head, train_dataset=labels))
        if not script_args.lora_layers:
            return trainer
        args = copy.copy(args)
        args.learning_rate, args.max_steps = script_args.lora_learning_rate, -1
        args.num_train_epochs = script_args.lora_epochs
        args.per_device_train_batch_size = args.per_device_eval_batch_size = script_args.lora_batch
        model = TargetWithJudge(shared_copy(target), trainer.judge)
        return _train(JudgeTrainer(model, args, train_dataset=labels, processing_class=tokenizer, peft_config=adapter))

    return fit


def _train(trainer: JudgeTrainer) -> JudgeTrainer:
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return trainer


def _lora(args: ScriptArguments) -> dict:
    """Options of the adapter, if there is one."""
    names = sorted(f.name for f in fields(args) if f.name.startswith("lora_"))
    return {name: getattr(args, name) for name in (*names, "dtype")} if args.lora_layers else {}


def _chosen(args: JudgeConfig) -> dict:
    """Options that are not left at their default, and have a part in what comes out."""
    chosen = {}
    for option in sorted(fields(JudgeConfig), key=lambda option: option.name):
        if not option.init or option.name.startswith(NO_PART):
            continue
        # Not those of a new `JudgeConfig()`: making one ends what this process knows of the others.
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value, default = (
            each.value if isinstance(each, Enum) else each for each in (getattr(args, option.name), default)
        )
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
