"""`train`: its options are those of the training script, read by TRL's parser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from ..training import script
from ..training.config import JudgeConfig
from ..utils.files import check_writable, read_text
from ..utils.processes import this_process
from .console import say


def train_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Train a judge on mined labels and write its card: --labels FOLDERS --output FOLDER; all options: --help."""
    # The parser does not know `--config=FILE`.
    words = [part for word in arguments or [] for part in word.split("=", word.startswith("--config="))]
    if words[-1:] == ["--config"]:
        raise ValueError("`config`: no file is named. Write `--config FILE`.")
    if "--config" in words:
        read_text(words[words.index("--config") + 1])  # refuses what is not UTF-8, and says where
    try:
        options = script.make_parser(prog="hf-selfjudge train").parse_args_and_config(words)
    except yaml.YAMLError as error:
        raise ValueError(f"`config`: this is not YAML ({error}).") from error
    train_judge(*options)


def train_judge(script_args: script.ScriptArguments, training_args: JudgeConfig) -> None:
    """Train a judge, save it with its card, and print what was measured on held-out prompts."""
    check_writable(Path(training_args.output_dir))
    held_out = script.main(script_args, training_args).info.training["held_out"]
    accepted = held_out["scores"]["judge"]["mean_label_among_accepted"]["0.5"]
    if this_process().is_main_process:
        say(
            f"Judge in {training_args.output_dir}: {held_out['rows']} substitutions from {held_out['prompts']} "
            f"prompts; held out, the mean label is {held_out['mean_label']:.3f}, among the half that the judge "
            f"accepts {accepted:.3f}."
        )
