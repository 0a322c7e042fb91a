"""What commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ..data.prompts import describe_left_out
from ..utils.text import in_terminal


console = Console(width=max(110, Console().width), markup=False, emoji=False)  # data is text


def say(sentence: str) -> None:
    """Print a sentence as it is: no markup, no highlighting, no line breaks."""
    console.print(in_terminal(sentence), soft_wrap=True, highlight=False)


def say_left_out(left_out: Sequence[str]) -> None:
    """Print which prompts were too long, if any was."""
    if left_out:
        say(describe_left_out(left_out))
