"""What commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, describe_left_out, fitting
from ..utils.text import in_terminal


console = Console(width=max(110, Console().width), markup=False, emoji=False)  # data is text


def say(sentence: str) -> None:
    """Print a sentence as it is: no markup, no highlighting, no line breaks."""
    console.print(in_terminal(sentence), soft_wrap=True, highlight=False)


def say_left_out(left_out: Sequence[str]) -> None:
    """Print which prompts were too long, if any was."""
    if left_out:
        say(describe_left_out(left_out))


def fitting_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int | None, max_new_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """
    Prompts that fit into the context, and the ids of those that are too long, which are printed.

    Raises:
        TooLong: If none fits.
    """
    kept, _, left_out = fitting(tokenizer, prompts, context, max_new_tokens)
    say_left_out(left_out)
    return kept, left_out
