"""How much of a bench fits into a given time.

In: minutes, what a pilot took, categories and settings. Out: a [`Plan`]. Knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .files import read_json, write_json
from .settings import Setting


FEWEST = 5  # prompts of a category, before thresholds are thinned out


@dataclass(frozen=True)
class Plan:
    """
    What fits into a budget.

    Args:
        seconds_per_answer (`float`): As a pilot measured them.
        per_category (`int`): Prompts of each category.
        settings (`list[str]`): Names of those to decode with.
    """

    seconds_per_answer: float
    per_category: int
    settings: list[str]


def plan(minutes: float, seconds_per_answer: float, categories: int, most: int, settings: Sequence[Setting]) -> Plan:
    """
    As many prompts as fit, the same number of each category; thresholds are thinned out where else fewer than
    `FEWEST` would fit, evenly, and never the last of a rule.

    Args:
        minutes (`float`): For all answers.
        categories (`int`): How many there are.
        most (`int`): Prompts of the largest category.
    """
    of = Counter(setting.family for setting in settings if setting.like is None)
    for thresholds in range(max(of.values()), 0, -1):
        kept = _thinned(settings, thresholds)
        fits = int(minutes * 60 / (seconds_per_answer * categories * len(kept)))
        if fits >= min(FEWEST, most):
            break
    return Plan(seconds_per_answer, max(1, min(fits, most)), [setting.name for setting in kept])


def _thinned(settings: Sequence[Setting], thresholds: int) -> list[Setting]:
    """At most so many thresholds of each rule, and the coins like them."""
    kept = set()
    for family in dict.fromkeys(setting.family for setting in settings if setting.like is None):
        of = [setting for setting in settings if setting.family == family and setting.like is None]
        places = np.linspace(0, len(of) - 1, thresholds) if thresholds > 1 else [(len(of) - 1) // 2]
        kept |= {of[round(place)] for place in places}
    return [setting for setting in settings if (setting.like or setting) in kept]


def planned(path: Path, asked: dict, pilot: Callable[[], Plan]) -> Plan:
    """
    The plan in a file if it was made for the same, so that a bench that goes on does not change it; or else a new one.

    Args:
        path (`Path`): The file.
        asked (`dict`): All that it depends on, of JSON's types.
    """
    if path.is_file():
        before = read_json(path)
        if before["asked"] == asked:
            return Plan(**before["plan"])
    made = pilot()
    write_json(path, {"asked": asked, "plan": asdict(made)})
    return made
