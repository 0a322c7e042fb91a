"""In: a [`Grid`] or [`AnswerRecord`]s of a bench, and their methods. Out: a summary that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from ..data.prompts import Prompt
from ..judge.judge import Judge
from ..models.load import fingerprint
from ..scoring.statistics import Interval
from .answers import AnswerRecord, accepted_share
from .methods import FAMILIES, Method
from .tradeoff import BASE, Grid, compare_rules, falling, separation


# Measures that retention is built on: in each category the first one that applies. Chosen by what `separation` shows.
RETENTION = ("task", "same", "agreement")
# Shares at which rules are compared: of retention, and of the final numbers that are those of the lossless answers.
RETENTION_LEVELS = (0.99, 0.97, 0.95, 0.9)
UNCHANGED_LEVELS = (0.95, 0.9, 0.8, 0.7)
# Names of a judge's thresholds, and the retention that each is chosen for.
OPERATING_POINTS = {"strict": 0.99, "balanced": 0.97, "fast": 0.9}


def summarise_quality(
    grid: Grid, records: Sequence[AnswerRecord], methods: Sequence[Method], judges: Mapping[str, Judge]
) -> dict:
    """
    Summarise a bench in mode quality: `settings` (a row for each method), `categories`, `separation` of the measures,
    and `comparisons` of each judge with every other rule at equal retention. If prompts ask for numbers,
    `comparisons_unchanged` are the same at equal shares of unchanged ones, among prompts whose lossless answer has
    one; a row's `numbers` are its share and its speed among these. `judges` are the fingerprints of the judges by
    their curves.
    """
    preference = [name for name in RETENTION if name in grid.scores]
    rate, speed, retention = grid.ratio(grid.tokens, grid.rounds), grid.speed(), grid.retention(preference)
    numbers = grid.known("unchanged") if "unchanged" in grid.scores else None
    of_numbers = {} if numbers is None else {"unchanged": numbers.mean("unchanged"), "speed": numbers.speed()}
    means = {measure: grid.mean(measure) for measure in grid.scores}
    categories = sorted(set(grid.categories))
    in_category = {
        name: {"speed": grid.speed(name), "retention": grid.retention(preference, name)} for name in categories
    }
    rows = [
        {
            **_row(method, [record for record in records if record.method == method.name], judges),
            **_intervals({"tokens_per_round": rate, "speed": speed, "retention": retention}, i),
            "measures": _intervals(means, i),
            "numbers": _intervals(of_numbers, i) or None,
            "by_category": {name: _intervals(samples, i) for name, samples in in_category.items()},
        }
        for i, method in enumerate(methods)
    ]
    curves = {method.curve: method for method in methods if FAMILIES[method.family].defaults}
    own = [curve for curve, method in curves.items() if method.judge is not None]
    compared = list(product(own, [curve for curve in curves if curve not in own]))
    coins = [method for method in methods if method.family == "coin" and method.like is None]
    middle = min(coins, key=lambda coin: abs(coin.arguments[0] - 0.5), default=None)  # accepts about a half
    controls = [middle] * (middle is not None) + [method for method in methods if method.family == "draft"]
    return {
        "prompts": len(grid.categories),
        "categories": {
            name: {"prompts": int(grid.among(name).sum()), "retention_by": grid.measure_of(name, preference)}
            for name in categories
        },
        "settings": rows,
        "separation": separation(grid, [method.name for method in controls]),
        "comparisons": [compare_rules(grid, retention, RETENTION_LEVELS, *two) for two in compared],
        "comparisons_unchanged": [
            compare_rules(numbers, of_numbers["unchanged"], UNCHANGED_LEVELS, *two) for two in compared if of_numbers
        ],
        "judges": {curve: fingerprint(judges[curves[curve].judge]) for curve in own},
    }


def _intervals(samples: Mapping[str, np.ndarray], index: int) -> dict[str, Interval | None]:
    """Of one method, from samples of all, each of shape `(1 + resamples, M)`."""
    return {name: Interval.of(values[:, index]) for name, values in samples.items()}


def _row(method: Method, records: Sequence[AnswerRecord], judges: Mapping[str, Judge]) -> dict:
    """What a method is, and sums over its answers."""
    tokens, rounds = (sum(len(getattr(record, name)) for record in records) for name in ("tokens", "lengths"))
    ruled = FAMILIES[method.family].rule is not None  # without a rule it is not known which mismatches were accepted
    return {
        "setting": method.name,
        "family": method.curve,
        "rule": method.family,
        "judge": method.judge_curve,
        "threshold": None if method.judge is None else method.rule(judges).threshold.json(),
        "tokens_per_round_without_bonus": (tokens - rounds) / rounds if rounds else None,
        "judged_share": sum(record.stats.judged for record in records) / tokens if ruled else None,
        "accepted_share": accepted_share(records) if ruled else None,
        "target_forwards": rounds,
        "draft_forwards": sum(record.draft_forwards for record in records),
        "tokens": tokens,
        "unfinished": sum(not record.finished for record in records),
    }


def operating_points(quality: dict, family: str) -> dict[str, dict]:
    """
    For each of `OPERATING_POINTS` the fastest of a judge's measured thresholds that keeps so much, if one does. As in
    [`compare_rules`], a faster threshold is taken to keep no more than a slower one.

    Args:
        quality (`dict`): Of [`summarise_quality`].
        family (`str`): The judge's curve in it.

    Returns:
        `dict[str, dict]`: For each name `threshold`, `for_retention`, and what was measured there: `retention`,
        `speed`, `tokens_per_round` (each an [`Interval`]) and `accepted_share`.
    """
    rows = [row for row in quality["settings"] if row["family"] == family and row["retention"]]
    if not rows:
        return {}
    (base,) = (row for row in quality["settings"] if row["setting"] == BASE)
    retention, speed = (np.array([[row[key][0] for row in (base, *rows)]]) for key in ("retention", "speed"))
    kept, points = falling(retention, speed)[0, 1:], {}
    for name, level in OPERATING_POINTS.items():
        if able := [row for row, share in zip(rows, kept, strict=True) if share > level - 1e-9]:  # to rounding
            best = max(able, key=lambda row: row["speed"][0])
            measured = {key: best[key] for key in ("retention", "speed", "tokens_per_round", "accepted_share")}
            points[name] = {"threshold": best["threshold"], "for_retention": level, **measured}
    return points


def summarise_timing(records: Sequence[AnswerRecord], prompts: Sequence[Prompt], methods: Sequence[Method]) -> dict:
    """Summarise a bench in mode timing: for each method tokens a second, seconds an answer, and the ratio of seconds
    of greedy, stock and lossless decoding to its own, over all prompts and for each category."""
    repeats = max(record.repeat for record in records) + 1
    shape = len(methods), len(prompts)
    by_key = {record.key: record for record in records}
    seconds, tokens = np.zeros(shape), np.zeros(shape)
    for (i, method), (j, prompt), repeat in product(enumerate(methods), enumerate(prompts), range(repeats)):
        record = by_key[method.name, prompt.id, repeat]
        seconds[i, j] += record.seconds / repeats
        tokens[i, j] += len(record.tokens) / repeats
    names = [method.name for method in methods]
    grid = Grid(names, names, np.array([prompt.category for prompt in prompts]), tokens, seconds)
    rate, categories = grid.ratio(tokens, seconds), sorted(set(grid.categories))
    rows = [
        {
            "setting": name,
            "tokens_per_second": Interval.of(rate[:, i]),
            "seconds_per_answer": float(seconds[i].mean()),
            "tokens_per_answer": float(tokens[i].mean()),
        }
        for i, name in enumerate(names)
    ]
    for other in ("greedy", "stock", BASE):
        if other in names:
            reference = np.broadcast_to(seconds[names.index(other)], shape)
            ratio = grid.ratio(reference, seconds)
            in_category = {name: grid.ratio(reference, seconds, name) for name in categories}
            for i, row in enumerate(rows):
                row[f"speed_over_{other}"] = Interval.of(ratio[:, i])
                row[f"speed_over_{other}_by_category"] = _intervals(in_category, i)
    return {"prompts": len(prompts), "repeats": repeats, "settings": rows}
