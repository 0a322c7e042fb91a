"""In: a [`Grid`], the figures of every method on every prompt. Out: what each rule gains in speed and costs in
quality, each with a 95 % bootstrap interval over prompts, drawn within categories. Knows nothing of models.

**Retention** of a method is how much of the lossless answers' quality it keeps: in each category the mean score of its
answers divided by that of the lossless answers, and over all the mean of the categories.

**Speed** is tokens a round, the bonus token included, divided by that of lossless decoding.

Rules are compared where they keep the same: at equal retention, or at equal means of another measure that is 1 for the
lossless answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..scoring.statistics import Interval, draws


BASE = "lossless"  # the method that all others are compared with


@dataclass
class Grid:
    """
    Figures of `M` methods on `P` prompts.

    Args:
        methods (`list[str]`): Their names; `lossless` is one.
        curves (`list[str]`): For each method, the curve that it lies on: methods of one curve differ in a threshold.
        categories (`np.ndarray` of shape `(P,)`): Of the prompts.
        tokens (`np.ndarray` of shape `(M, P)`): Of the answers.
        rounds (`np.ndarray` of shape `(M, P)`): Forwards of the target; NaN where it had none.
        scores (`dict[str, np.ndarray]` of shape `(M, P)`): Of each measure; NaN where it does not apply.
        resamples, seed (`int`): Of the bootstrap.
    """

    methods: list[str]
    curves: list[str]
    categories: np.ndarray
    tokens: np.ndarray
    rounds: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self):
        self.weights = draws(self.categories, self.resamples, self.seed)
        self.base = self.methods.index(BASE)

    def among(self, category: str | None) -> np.ndarray:
        """Which prompts are of a category; all of them where it is `None`."""
        return np.ones(len(self.categories), bool) if category is None else self.categories == category

    def ratio(self, above: np.ndarray, below: np.ndarray, category: str | None = None) -> np.ndarray:
        """Sum of `above` over sum of `below`, both of shape `(M, P)`: `(1 + resamples, M)`, the first row for the
        prompts as they are."""
        here = self.weights[:, self.among(category)]
        above, below = (values[:, self.among(category)].T for values in (above, below))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (here @ above) / (here @ below)

    def speed(self, category: str | None = None) -> np.ndarray:
        """Tokens a round over those of lossless decoding, `(1 + resamples, M)`."""
        rate = self.ratio(self.tokens, self.rounds, category)
        return rate / rate[:, [self.base]]

    def mean(self, measure: str, category: str | None = None) -> np.ndarray:
        """Mean score, `(1 + resamples, M)`; NaN where a prompt has none."""
        return self.ratio(self.scores[measure], np.ones_like(self.tokens), category)

    def mean_where_known(self, measure: str) -> np.ndarray:
        """Mean score over the prompts that have one for every method, `(1 + resamples, M)`."""
        scores = self.scores[measure]
        known = np.isfinite(scores).all(0)
        return self.ratio(np.where(known, scores, 0), np.broadcast_to(known, scores.shape).astype(float))

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
        """Share of the lossless answers' quality that is kept, `(1 + resamples, M)`, in a category or the mean of all.
        Each is judged by one measure of `preference` ([`measure_of`]); categories with none are left out."""
        total, count = np.zeros((2, len(self.weights), len(self.methods)))
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
        """The grid of the prompts that have a measure for every method."""
        here = np.isfinite(self.scores[measure]).all(0)
        scores = {name: values[:, here] for name, values in self.scores.items()}
        categories, tokens, rounds = self.categories[here], self.tokens[:, here], self.rounds[:, here]
        return replace(self, categories=categories, tokens=tokens, rounds=rounds, scores=scores)

    def on_curve(self, curve: str) -> list[int]:
        """The methods on a curve, and first lossless decoding, where every curve begins."""
        return [self.base] + [i for i, name in enumerate(self.curves) if name == curve and i != self.base]


def speed_at(level: float, retention: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """The highest speed, of shape `(n,)`, at which a rule keeps the share `level` of the quality, from `retention` and
    `speed` of its methods, of shape `(n, k)`, one of which keeps it. Between two thresholds the rule can use the one
    for some prompts and the other for the rest. Rounds a token then add up: the speed is the harmonic mean of the
    two."""
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
    """Retention of a rule's methods, of shape `(n, k)`, lossless decoding first, under the assumption that a faster
    one keeps no more than a slower one, and none more than lossless decoding: the nearest such values (isotonic
    regression). Without this, the best of many noisy methods would pass for a good rule, the more so the more
    thresholds it has."""
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


def area_between(first: Sequence[np.ndarray], second: Sequence[np.ndarray], lowest: float) -> np.ndarray:
    """Mean difference of [`speed_at`] of two rules, each `(retention, speed)`, over levels from `lowest` to 1."""
    levels = np.linspace(lowest, 1, 21)
    return np.mean([speed_at(level, *first) - speed_at(level, *second) for level in levels], axis=0)


def compare_rules(grid: Grid, kept: np.ndarray, levels: Sequence[float], first: str, second: str) -> dict:
    """
    Compare two rules, named by their curves, where they keep the same.

    Args:
        kept (`np.ndarray` of shape `(1 + resamples, M)`): Share of the lossless answers' quality that each method
            keeps: [`Grid.retention`], or the mean of a measure that is 1 for the lossless answers.
        levels (`Sequence[float]`): Shares to compare at.

    Returns:
        `dict`: `speed_ratio` for each of `levels`, tokens a round where both keep so much, first over second, and
        `area_between`, over levels from the least of them to 1, each an [`Interval`]; and in `thresholds` how many
        each has: more of them reach further.
    """
    speed, curves = grid.speed(), [grid.on_curve(first), grid.on_curve(second)]
    points = [(falling(kept[:, curve], speed[:, curve]), speed[:, curve]) for curve in curves]
    ratios = {level: speed_at(level, *points[0]) / speed_at(level, *points[1]) for level in levels}
    return {
        "first": first,
        "second": second,
        "thresholds": [len(curve) - 1 for curve in curves],
        "speed_ratio": {str(level): Interval.of(ratio) for level, ratio in ratios.items()},
        "area_between": Interval.of(area_between(*points, min(levels))),
    }


def separation(grid: Grid, others: Sequence[str]) -> list[dict]:
    """How far each measure separates the lossless answers from those of other methods (a coin, the draft): the mean
    difference, lossless first, as an [`Interval`], and the same in standard deviations of the lossless answers'
    scores. A measure whose interval contains 0 does not separate them."""
    rows = []
    for name, scores in grid.scores.items():
        known = np.isfinite(scores).all(0)
        spread = scores[grid.base, known].std() if known.any() else 0
        row = {"measure": name, "prompts": int(known.sum())}
        for other in others:
            gap = np.where(known, scores[grid.base] - scores[grid.methods.index(other)], 0.0)
            with np.errstate(invalid="ignore"):  # a sample may hold no prompt that has the measure
                mean = (grid.weights @ gap) / (grid.weights @ known)
            row[other] = Interval.of(mean)
            # Scores against the answer itself are all 1, to rounding.
            row[f"{other}, standardised"] = float(mean[0] / spread) if spread > 1e-6 else None
        rows.append(row)
    return rows
