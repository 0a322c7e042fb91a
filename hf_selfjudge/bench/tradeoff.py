"""In: a [`Grid`] with the figures of every method on every prompt. Out: what each rule gains in speed and costs in
quality, with 95 % bootstrap intervals over prompts, drawn within categories. Knows nothing of models.

**Retention** is how much of the lossless answers' quality a method keeps: the mean score of its answers in a category
divided by that of the lossless answers, averaged over the categories.

**Speed** is tokens a round, with the bonus token, divided by those of lossless decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import isotonic_regression

from ..scoring.statistics import Interval, draws


BASE = "lossless"  # the method that all others are compared with


@dataclass
class Grid:
    """
    Figures of `M` methods on `P` prompts.

    Args:
        methods (`list[str]`): Their names, `lossless` among them.
        curves (`list[str]`): The curve of each method: methods on one curve differ only in their thresholds.
        categories (`np.ndarray` of shape `(P,)`): The category of each prompt.
        tokens (`np.ndarray` of shape `(M, P)`): Length of each answer.
        rounds (`np.ndarray` of shape `(M, P)`): Forwards of the target; NaN where it had none.
        scores (`dict[str, np.ndarray]` of shape `(M, P)`): For each measure, its scores; NaN where it does not apply.
        resamples, seed (`int`): For the bootstrap.
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
        """Which prompts belong to a category, or all of them."""
        return np.ones(len(self.categories), bool) if category is None else self.categories == category

    def ratio(self, above: np.ndarray, below: np.ndarray, category: str | None = None) -> np.ndarray:
        """Sum of `above` divided by sum of `below`, both of shape `(M, P)`: shape `(1 + resamples, M)`, the first row
        for the prompts as they are."""
        here = self.weights[:, self.among(category)]
        above, below = (values[:, self.among(category)].T for values in (above, below))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (here @ above) / (here @ below)

    def speed(self, category: str | None = None) -> np.ndarray:
        """Tokens a round divided by those of lossless decoding, `(1 + resamples, M)`."""
        rate = self.ratio(self.tokens, self.rounds, category)
        return rate / rate[:, [self.base]]

    def mean(self, measure: str, category: str | None = None) -> np.ndarray:
        """Mean score over the prompts that have one for every method, `(1 + resamples, M)`."""
        scores = self.scores[measure]
        known = np.isfinite(scores).all(0)
        return self.ratio(np.where(known, scores, 0), np.broadcast_to(known, scores.shape).astype(float), category)

    def measure_of(self, category: str, preference: Sequence[str]) -> str | None:
        """The first measure of `preference` that applies to all answers of a category, and at which the lossless ones
        are good enough to lose something: their mean is above 0 in 99 % of the bootstrap samples."""
        here = self.among(category)
        for name in preference:
            if np.isfinite(self.scores[name][:, here]).all():
                means = self.mean(name, category)[:, self.base]
                if (means[np.isfinite(means)] > 0).mean() >= 0.99:
                    return name
        return None

    def retention(self, preference: Sequence[str], category: str | None = None) -> np.ndarray:
        """Share of the lossless answers' quality that is kept, `(1 + resamples, M)`, in one category or averaged over
        all. Each category is scored by its [`measure_of`]; those without one are left out."""
        total, count = np.zeros((2, len(self.weights), len(self.methods)))
        for name in [category] if category is not None else sorted(set(self.categories)):
            measure = self.measure_of(name, preference)
            if measure is not None:
                mean, here = self.mean(measure, name), self.among(name)
                drawn = self.weights[:, here].sum(1, keepdims=True) / here.sum()  # not 1 for a prompt that is alone
                with np.errstate(divide="ignore", invalid="ignore"):
                    total += np.where(drawn > 0, drawn * mean / mean[:, [self.base]], 0)
                count += drawn
        with np.errstate(invalid="ignore"):
            return total / count

    def known(self, measure: str) -> Grid:
        """The grid of those prompts to which a measure applies for every method."""
        return self._of(np.isfinite(self.scores[measure]).all(0))

    def within(self, category: str) -> Grid:
        """The grid of the prompts of one category."""
        return self._of(self.among(category))

    def _of(self, here: np.ndarray) -> Grid:
        scores = {name: values[:, here] for name, values in self.scores.items()}
        categories, tokens, rounds = self.categories[here], self.tokens[:, here], self.rounds[:, here]
        return replace(self, categories=categories, tokens=tokens, rounds=rounds, scores=scores)


def speed_at(level: float, retention: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """The highest speed, of shape `(n,)`, at which a rule keeps the share `level` of the quality. `retention` and
    `speed` of its methods have the shape `(n, k)`. A rule may use one threshold for some prompts and another for the
    rest: retention is then the mean of the two, and speed their harmonic mean."""
    keeps, cost = retention >= level, 1 / speed
    one, other = (slice(None), slice(None), None), (slice(None), None)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (retention[one] - level) / (retention[one] - retention[other])  # of prompts with the other threshold
        mixed = cost[one] + share * (cost[other] - cost[one])
    mixed = np.where(keeps[one] & ~keeps[other], mixed, np.inf).min((1, 2))
    return 1 / np.minimum(mixed, np.where(keeps, cost, np.inf).min(1))


def falling(retention: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """`retention` of a rule's methods, of shape `(n, k)`, lossless decoding first, replaced by the nearest values
    (isotonic regression) at which a faster method keeps no more than a slower one, and none more than lossless
    decoding. Otherwise the luckiest of many noisy methods would pass for a good rule."""
    order = np.argsort(speed[:, 1:], axis=1)
    values = np.take_along_axis(retention[:, 1:], order, 1)
    fitted = np.array([isotonic_regression(row, increasing=False).x for row in values])
    result = retention.copy()
    np.put_along_axis(result[:, 1:], order, np.minimum(fitted, retention[:, :1]), 1)
    return result


def area_between(first: Sequence[np.ndarray], second: Sequence[np.ndarray], lowest: float) -> np.ndarray:
    """Mean difference in [`speed_at`] between two rules, each `(retention, speed)`, over levels from `lowest` to 1."""
    levels = np.linspace(lowest, 1, 21)
    return np.mean([speed_at(level, *first) - speed_at(level, *second) for level in levels], axis=0)


def compare_rules(grid: Grid, kept: np.ndarray, levels: Sequence[float], first: str, second: str) -> dict:
    """
    Compare two rules, named by their curves, where they keep the same share of the lossless answers' quality.

    Args:
        kept (`np.ndarray` of shape `(1 + resamples, M)`): That share for each method: [`Grid.retention`], or the mean
            of a measure that is 1 for the lossless answers.
        levels (`Sequence[float]`): Shares to compare at.

    Returns:
        `dict`: `speed_ratio`, tokens a round of the first divided by those of the second at each of `levels`, and
        `area_between`, over levels from the lowest of them to 1, each an [`Interval`]; and `thresholds`, how many each
        rule has: more of them reach further.
    """
    speed = grid.speed()
    curves = [  # every curve begins at lossless decoding
        [grid.base] + [i for i, name in enumerate(grid.curves) if name == curve and i != grid.base]
        for curve in (first, second)
    ]
    points = [(falling(kept[:, curve], speed[:, curve]), speed[:, curve]) for curve in curves]
    ratios = {level: speed_at(level, *points[0]) / speed_at(level, *points[1]) for level in levels}
    return {
        "first": first,
        "second": second,
        "thresholds": [len(curve) - 1 for curve in curves],
        "speed_ratio": {str(level): Interval.of(ratio) for level, ratio in ratios.items()},
        "area_between": Interval.of(area_between(*points, min(levels))),
    }


def paired_differences(grid: Grid, first: str, second: str) -> dict:
    """
    Compare two methods prompt by prompt.

    Returns:
        `dict`: `speed`, tokens a round of the first divided by those of the second, and the differences in
        `unchanged` and `task`, the first minus the second, where they are known; each an [`Interval`].
    """
    one, other = grid.methods.index(first), grid.methods.index(second)
    speed, means = grid.speed(), {name: grid.mean(name) for name in ("unchanged", "task") if name in grid.scores}
    differences = {name: Interval.of(mean[:, one] - mean[:, other]) for name, mean in means.items()}
    return {"first": first, "second": second, "speed": Interval.of(speed[:, one] / speed[:, other]), **differences}


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
            # The lossless answer compared with itself scores 1, apart from rounding.
            row[f"{other}, standardised"] = float(mean[0] / spread) if spread > 1e-6 else None
        rows.append(row)
    return rows
