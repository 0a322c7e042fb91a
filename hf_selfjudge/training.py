"""
The training script: labels -> a judge that was measured on held-out prompts, with its card.

```bash
hf-selfjudge train --labels labels/gsm8k labels/own --output_dir my-judge
```

All options of [`JudgeConfig`] and [`~transformers.TrainingArguments`] may follow, or stand in a YAML file that is
named with `--config`; `accelerate launch -m hf_selfjudge.cli train …` shares the work between devices.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import datasets
import numpy as np
from scipy.special import expit
from trl import TrlParser

from .cards import write_card
from .evaluation import HeldOutConfig, calibrate, calibrated, evaluate, held_out, plot_reliability
from .judge import Judge
from .labels import load_labels, mining_of
from .trainer import SCORES, JudgeConfig, JudgeTrainer, new_judge, soft_labels


@dataclass
class ScriptArguments:
    """
    What a judge is trained on, and how it is measured.

    Args:
        labels (`list[str]`): Folders written by [`mine`], all of one target and draft.
        folds (`int`, *optional*, defaults to `5`): Of the cross-validation, split by prompt.
        accept_share (`float`, *optional*, defaults to `0.5`): Share of held-out mismatches that the judge's own
            threshold accepts.
        resamples (`int`, *optional*, defaults to `1000`): Bootstrap resamples of prompts for the intervals.
    """

    labels: list[str] = field(
        metadata={"help": "Folders written by `hf-selfjudge mine`, all of one target and draft."}
    )
    folds: int = field(default=5, metadata={"help": "Of the cross-validation, split by prompt."})
    accept_share: float = field(
        default=0.5, metadata={"help": "Share of held-out mismatches that the judge's own threshold accepts."}
    )
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples of prompts for the intervals."})

    def __post_init__(self):
        if not 0 <= self.accept_share <= 1:
            raise ValueError(f"`accept_share` must be in [0, 1], got {self.accept_share}.")
        if self.folds < 2:
            raise ValueError(f"`folds` must be 2 or more, got {self.folds}.")


def main(script_args: ScriptArguments, training_args: JudgeConfig) -> Judge:
    """
    Train a judge, calibrate it and choose its threshold on held-out prompts; save it with its card.

    Raises:
        FileNotFoundError: If a folder has no labels.
        ValueError: If the folders are of different models, have too few prompts, or no row with this label.
    """
    mining = mining_of(script_args.labels)
    labels = datasets.concatenate_datasets([load_labels(folder) for folder in script_args.labels])
    config = HeldOutConfig(script_args.accept_share, script_args.folds, script_args.resamples, training_args.seed)
    if training_args.label in SCORES and training_args.label_threshold is None:
        # One for all folds.
        training_args.label_threshold = float(np.nanmedian(np.array(labels[training_args.label][:], dtype=float)))
    label = soft_labels(labels, training_args)
    odds = held_out(labels, mining[0], training_args, config.folds)
    trainer = JudgeTrainer(new_judge(mining[0], training_args), training_args, train_dataset=labels)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    known = np.flatnonzero(~np.isnan(odds))
    slope, intercept = calibrate(odds[known], label[known])
    judge, odds = calibrated(trainer.judge, slope, intercept), slope * odds + intercept
    met = odds[(np.array(labels["kind"][:]) == "mismatch") & ~np.isnan(odds)]
    threshold = np.quantile(met if len(met) else odds[known], config.accept_share)
    measured = evaluate(labels.select(known), label[known], odds[known], config)
    judge.info = replace(
        judge.info,
        threshold=float(expit(threshold)),
        training={
            "mining": mining,
            "fit": {**asdict(config), "slope": slope, "intercept": intercept, "options": _chosen(training_args)},
            "held_out": measured,
        },
    )
    if trainer.is_world_process_zero():
        trainer.save_model()
        folder = Path(training_args.output_dir)
        plot_reliability(measured["reliability"], folder / "reliability.png")
        write_card(judge, folder)
    return judge


def _chosen(args: JudgeConfig) -> dict:
    """Options that are not left at their default, and have a part in what comes out."""
    names = {f.name for f in fields(JudgeConfig)} & {
        *JudgeConfig.__annotations__,
        *("seed", "data_seed", "max_steps", "warmup_steps", "gradient_accumulation_steps", "max_grad_norm", "optim"),
    }
    default = JudgeConfig()
    return {name: getattr(args, name) for name in sorted(names) if getattr(args, name) != getattr(default, name)}


def make_parser(
    subparsers: argparse._SubParsersAction | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """The parser of the script, alone or as one of `subparsers`."""
    types = (ScriptArguments, JudgeConfig)
    if subparsers is not None:
        return subparsers.add_parser("judge", help="Train a judge", dataclass_types=types)
    return TrlParser(types, prog=prog)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=True))
