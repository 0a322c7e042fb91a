"""The console script `hf-selfjudge`: all commands, and the errors that a user sees."""

from __future__ import annotations

import os
import sys

import torch
import typer
from rich.console import Console

from ..models.wheels import SourceError
from ..utils.text import in_terminal
from . import bench, card, demo, labels, mine, quickstart, replay, serve, share, train
from .options import as_command


# `train` has its own parser, and `serve` passes on options that are not its own.
SETTINGS = {
    "train": {"ignore_unknown_options": True, "help_option_names": []},
    "serve": {"ignore_unknown_options": True},
}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# A function `some_command` of these modules is the command `some`.
for module in (quickstart, mine, labels, train, replay, bench, card, share, serve, demo):
    for function_name, function in vars(module).items():
        if function_name.endswith("_command"):
            name = function_name.removesuffix("_command").replace("_", "-")
            app.command(name, context_settings=SETTINGS.get(name))(as_command(function))


def main() -> None:
    """Run the command line. A mistake of the user ends in one sentence, not in a traceback."""
    if "OMP_NUM_THREADS" not in os.environ:  # a launcher of several processes sets it
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        app()
    except (SourceError, ValueError, OSError, ImportError) as error:  # the last: a package that an option needs
        Console(stderr=True, soft_wrap=True).print(in_terminal(f"hf-selfjudge: {error}", "red"))
        sys.exit(1)
