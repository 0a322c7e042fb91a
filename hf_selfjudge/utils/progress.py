"""In: a number of steps. Out: a progress bar on standard error, which can be read in a terminal and in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm


T = TypeVar("T")
SECONDS_IN_A_LOG = 30.0  # between two states of a bar


def progress_bar(total: int, description: str, shown: bool = True) -> tqdm:
    """
    A bar of `total` steps, to be used in a `with` statement and moved with `update`. Steps may be fractions.

    A terminal overwrites a line, a file cannot: there, the bar is written anew every [`SECONDS_IN_A_LOG`] only.
    """
    pause = 0.1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    layout = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}]"
    return tqdm(
        total=total, desc=description, disable=not shown, mininterval=pause, maxinterval=pause, bar_format=layout
    )


def tracked(items: Sequence[T], description: str) -> Iterator[T]:
    """The items one after another, with a bar that moves when the next one is asked for."""
    with progress_bar(len(items), description) as bar:
        for item in items:
            yield item
            bar.update()
