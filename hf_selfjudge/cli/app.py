"""The console script `hf-selfjudge`: all commands, and how a user's mistakes end."""

from __future__ import annotations

import os
import sys

import torch
import typer
from rich.console import Console

from ..models.wheels import SourceError
from ..utils.text import in_terminal
from .bench import bench_command
from .card import calibrate_command, card_command
from .demo import demo_command
from .labels import labels_command
from .mine import add_layer_command, mine_command
from .options import as_command
from .quickstart import quickstart_command
from .share import pull_command, push_command, push_labels_command, push_results_command, push_space_command
from .train import train_command


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
COMMANDS = (
    *(quickstart_command, mine_command, add_layer_command, labels_command, train_command, bench_command),
    *(calibrate_command, card_command, push_command, pull_command, push_labels_command, push_results_command),
    *(push_space_command, demo_command),
)
for function in COMMANDS:
    name = function.__name__.removesuffix("_command").replace("_", "-")
    if function is train_command:  # a parser of its own reads its options
        app.command(name, context_settings={"ignore_unknown_options": True, "help_option_names": []})(function)
    else:
        app.command(name)(as_command(function))


def main() -> None:
    """Run the command line; the user's mistakes end in one sentence, not in a traceback."""
    if "OMP_NUM_THREADS" not in os.environ:  # a launcher of several processes sets it
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        app()
    except (SourceError, ValueError, OSError, ImportError) as error:  # the last: a package that an option needs
        Console(stderr=True, soft_wrap=True).print(in_terminal(f"hf-selfjudge: {error}", "red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
