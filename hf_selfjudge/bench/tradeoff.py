"""Speed against quality: what each rule buys, what it costs, and how sure that is.

In: a [`Grid`], figures of every setting on every prompt. Out: tables, curves and comparisons, each with a 95 %
bootstrap interval over prompts, drawn within categories. Knows nothing of models.

**Retention** of a setting is how much of the lossless answers' quality it keeps: in each category the mean score of
its answers divided by that of the lossless answers, and over all the mean of the categories.

**Speed** is tokens a round, the bonus token included, divided by that of lossless decoding.

Rules are compared at equal retention, and at equal means of a measure that is 1 for the lossless answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..scoring.statistics import draws


BASE = "lossless"


@dataclass
class Grid:
    """
    Figures of `S` settings on `P` prompts.

    Args:
        settings (`list[str]`): Their names; `lossless` is one.
        families (`list[str]`): For each, the rule it is a threshold of.
        categories (`np.ndarray` of shape `(P,)`): Of the prompts.
        tokens (`np.ndarray` of shape `(S, P)`): Of the answers.
        rounds (`np.ndarray` of shape `(S, P)`): Forwards of the target; NaN where it had none.
        scores (`dict[str, np.ndarray]` of shape `(S, P)`): Of each measure; NaN where it does not apply.
        resamples (`int`): Of the bootstrap.
        seed (`int`): Of the bootstrap.
    """

    settings: list[str]
    families: list[str]
    categories: np.ndarray
    tokens: np.ndarray
    rounds: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self):
        self.weights = draws(self.categories, self.resamples, self.seed)
        self.base = self.settings.index(BASE)

    def among(self, category: str | None) -> np.ndarray:
        """Which prompts are of a category, or all of them."""
        return np.ones(len(self.categories), bool) if category is None else self.categories == category

    def ratio(self, above: np.ndarray, below: np.ndarray, category: str | None = None) -> np.ndarray:
        """Sum of `above` over sum of `below`, both of shape `(S, P)`: `(1 + resamples, S)`, the first row of the
        prompts as they are."""
        here = self.weights[:, self.among(category)]
        above, below = (values[:, self.among(category)].T for values in (above, below))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (here @ above) / (here @ below)

    def speed(self, category: str | None = None) -> np.ndarray:
        """Tokens a round over those of lossless decoding, `(1 + resamples, S)`."""
        rate = self.ratio(self.tokens, self.rounds, category)
        return rate / rate[:, [self.base]]

    def mean(self, measure: str, category: str | None = None) -> np.ndarray:
        """Mean score, `(1 + resamples, S)`; NaN where a prompt has none."""
        return self.ratio(self.scores[measure], np.ones_like(self.tokens), category)

    def measure_of(self, category: str, preference: Sequence[str]) -> str | None:
        """The first of some measures that all answers of a category have, and at which the lossless ones are good
        enough to lose something: in 99 % of the bootstrap's samples one of them scores above 0."""
        here = self.among(category)
        for name in preference:
            if np.isfinite(self.scores[name][:, here]).all():
                means = self.mean(name, category)[:, self.base]
                if (means[np.isfinite(means)] > 0).mean() >= 0.99:
                    return name
        return None

    def retention(self, preference: Sequence[str], category: str | None = None) -> np.ndarray:
        """
        Share of the lossless answers' quality that is kept, `(1 + resamples, S)`.

        Args:
            preference (`Sequence[str]`): Measures; each category is judged by one ([`measure_of`]). Categories with
                none are left out.
            category (`str`, *optional*): One instead of the mean of all.
        """
        total, count = np.zeros((2, len(self.weights), len(self.settings)))
        for name in [category] if category is not None else sorted(set(self.categories)):
            measure = self.measure_of(name, preference)
            if measure is not None:
                mean, here = self.mean(measure, name), self.among(name)
                drawn = self.weights[:, here].sum(1, keepdims=True) / here.sum()  # 1, but for a prompt that is alone
                with np.errstate(divide="ignore", invalid="ignore"):
                    total += np.where(drawn > 0, drawn * mean / mean[:, [self.base]], 0)
                count += drawn
        with np.errstate(invalid="ignore"):
            return total / count

    def known(self, measure: str) -> Grid:
        """Of the prompts that have a measure for every setting."""
        here = np.isfinite(self.scores[measure]).all(0)
        scores = {name: values[:, here] for name, values in self.scores.items()}
        figures = self.categories[here], self.tokens[:, here], self.rounds[:, here], scores
        return Grid(self.settings, self.families, *figures, self.resamples, self.seed)

    def curve(self, family: str) -> list[int]:
        """The settings of a rule, and lossless decoding: where every curve begins."""
        return [self.base] + [i for i, name in enumerate(self.families) if name == family and i != self.base]


def interval(values: np.ndarray) -> list[float] | None:
    """`[value, low, high]` of a first value and its bootstrap samples; `None` where it is undefined."""
    if not np.isfinite(values[0]):
        return None
    samples = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (np.nan, np.nan)
    return [float(values[0]), float(low), float(high)]


def speed_at(level: float, retention: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """
    The highest speed at which a rule keeps a share of the quality. Between two thresholds it can use the one for some
    prompts and the other for the rest. Then what both need adds up, rounds a token: the speed is their harmonic mean.

    Args:
        level (`float`): Share to keep.
        retention, speed (`np.ndarray` of shape `(n, k)`): Of the rule's settings, one of which keeps it.

    Returns:
        `np.ndarray` of shape `(n,)`.
    """
    keeps, cost = retention >= level, 1 / speed
    best = np.where(keeps, cost, np.inf).min(1)
    for i in range(retention.shape[1]):
        for j in range(retention.shape[1]):
            mixed = keeps[:, i] & ~keeps[:, j]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (retention[:, i] - level) / (retention[:, i] - retention[:, j])
                both = cost[:, i] + share * (cost[:, j] - cost[:, i])
            best = np.where(mixed, np.minimum(best, both), best)
    return 1 / best


def falling(retention: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """
    Retention of a rule's settings, of shape `(n, k)`, lossless decoding first, as it is if a faster one keeps no more
    than a slower one, and none more than lossless decoding: the nearest such values (isotonic regression). Without
    this, the best of many noisy settings would pass for a good rule, the more so the more thresholds it has.
    """
    order = np.argsort(speed[:, 1:], axis=1)
    values = np.take_along_axis(retention[:, 1:], order, 1)
    count = values.shape[1]
    sums = np.concatenate([np.zeros((len(values), 1)), values.cumsum(1)], 1)
    fitted = np.empty_like(values)
    for i in range(count):  # the least, over where a run begins, of the greatest mean, over where it ends
        runs = [[(sums[:, e] - sums[:, b]) / (e - b) for e in range(i + 1, count + 1)] for b in range(i + 1)]
        fitted[:, i] = np.min([np.max(run, axis=0) for run in runs], axis=0)
    result = retention.copy()
    np.put_along_axis(result[:, 1:], order, np.minimum(fitted, retention[:, :1]), 1)
    return result


def area_between(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], lowest: float
) -> np.ndarray:
    """Mean difference of [`speed_at`] of two rules, each `(retention, speed)`, over levels from `lowest` to 1."""
    levels = np.linspace(lowest, 1, 21)
    return np.mean([speed_at(level, *first) - speed_at(level, *second) for level in levels], axis=0)


def compare_rules(grid: Grid, kept: np.ndarray, levels: Sequence[float], first: str, second: str) -> dict:
    """
    One rule against another where they keep the same.

    Args:
        kept (`np.ndarray` of shape `(1 + resamples, S)`): Share of the lossless answers' quality that each setting
            keeps: [`Grid.retention`], or the mean of a measure that is 1 for the lossless answers.
        levels (`Sequence[float]`): Shares to compare at.

    Returns:
        `dict`: `speed_ratio` for each of `levels`, tokens a round where both keep so much, first over second, and
        `area_between`, over levels from the least of them to 1, each `[value, low, high]`; and how many thresholds
        each has: more of them reach further.
    """
    speed = grid.speed()
    curves = grid.curve(first), grid.curve(second)
    one, other = ((falling(kept[:, curve], speed[:, curve]), speed[:, curve]) for curve in curves)
    ratios = {str(level): interval(speed_at(level, *one) / speed_at(level, *other)) for level in levels}
    return {
        "first": first,
        "second": second,
        "thresholds": [len(curve) - 1 for curve in curves],
        "speed_ratio": ratios,
        "area_between": interval(area_between(one, other, min(levels))),
    }


def separation(grid: Grid, coin: str | None) -> list[dict]:
    """
    How far each measure tells the lossless answers from those of a coin and of the draft: the mean difference,
    lossless first, as `[value, low, high]`, and the same in standard deviations of the lossless answers' scores. A
    measure whose interval holds 0 does not tell them apart.
    """
    rows = []
    for name, scores in grid.scores.items():
        known = np.isfinite(scores).all(0)
        spread = scores[grid.base, known].std() if known.any() else 0
        row = {"measure": name, "prompts": int(known.sum())}
        for other in filter(None, (coin, "draft" if "draft" in grid.settings else None)):
            gap = np.where(known, scores[grid.base] - scores[grid.settings.index(other)], 0.0)
            with np.errstate(invalid="ignore"):  # a sample may hold no prompt that has the measure
                mean = (grid.weights @ gap) / (grid.weights @ known)
            row[other] = interval(mean)
            # Scores against the answer itself are all 1, to rounding.
            row[f"{other}, standardised"] = float(mean[0] / spread) if spread > 1e-6 else None
        rows.append(row)
    return rows
