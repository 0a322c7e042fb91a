"""In: values, and the prompt of each. Out: bootstrap intervals ([`Interval`]), areas under curves, correlations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval; in JSON a list of three numbers. `f"{interval:.2f}"` is
    `0.82 [0.74, 0.90]`."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Interval | None:
        """From a figure and its bootstrap samples, of shape `(1 + resamples,)`; `None` if the figure is undefined."""
        if not np.isfinite(samples[0]):
            return None
        drawn = samples[1:][np.isfinite(samples[1:])]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        return cls(float(samples[0]), float(low), float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]".replace("-", "−")


def shown(value: Interval | Sequence[float] | float | str | None, spec: str = ".2f") -> str:
    """An interval, a number or text in a table; a dash for `None`."""
    if value is None:
        return "–"
    return format(Interval(*value) if isinstance(value, list | tuple) else value, spec)


def bootstrap(
    measure: Callable[..., float], columns: tuple[np.ndarray, ...], prompts: np.ndarray, resamples: int, seed: int
) -> Interval | None:
    """`measure` of `columns`, with an interval over prompts: rows of one prompt are drawn together. `columns` and
    `prompts` (the prompt of each row) have the shape `(rows,)`. `None` if the measure is undefined (NaN)."""
    if not len(prompts) or np.isnan(measure(*columns)):
        return None
    _, place = np.unique(prompts, return_inverse=True)
    weights = draws(np.zeros(place.max() + 1, int), resamples, seed).astype(int)
    drawn_rows = (np.repeat(np.arange(len(place)), weight[place]) for weight in weights)
    return Interval.of(np.array([measure(*(column[rows] for column in columns)) for rows in drawn_rows]))


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; NaN if all labels are the same."""
    return float(roc_auc_score(label, score)) if 0 < label.sum() < len(label) else float("nan")


def auc_within(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> float:
    """Area under the ROC curve over pairs of the same group: the share of pairs, of a row with `label` 1 and one with
    0, in which the first has the higher score. Groups that differ in how often the label is 1 do not raise it. NaN if
    there is no pair."""
    areas, pairs = [], []
    for name in np.unique(group):
        here = label[group == name]
        if count := here.sum() * (len(here) - here.sum()):
            areas.append(auc(here, score[group == name]))
            pairs.append(count)
    return float(np.average(areas, weights=pairs)) if pairs else float("nan")


def among_accepted(label: np.ndarray, score: np.ndarray, share: float) -> float | None:
    """Mean of `label` among the `share` of rows with the lowest `score`; `None` where there are no rows."""
    return float(label[score <= np.quantile(score, share)].mean()) if len(label) else None


def rank_correlation(label: np.ndarray, score: np.ndarray) -> float:
    """Spearman's rank correlation; NaN if one of the two is constant."""
    return float(spearmanr(label, score).statistic) if np.ptp(label) and np.ptp(score) else float("nan")


def risk_bound(mean: float, count: int) -> float:
    """
    The mean of `count` losses in [0, 1] with the finite-sample correction of conformal risk control
    (https://huggingface.co/papers/2208.02814, equation 4): if the least careful of many settings is chosen whose bound
    is at most α, and a more careful setting never has a higher loss, the expected loss of the next answer is at most
    α.
    """
    return (count * mean + 1) / (count + 1)


def draws(categories: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn, of shape `(1 + resamples, P)`. The first row draws each once; the others are
    bootstrap samples within categories. Prompts that are alone in their category form one category together: alone
    they would show no spread."""
    rng, weights = np.random.default_rng(seed), np.ones((1 + resamples, len(categories)))
    names, index, counts = np.unique(categories, return_inverse=True, return_counts=True)
    strata = np.where(counts[index] > 1, index, len(names))
    for stratum in np.unique(strata):
        (here,) = np.nonzero(strata == stratum)
        weights[1:, here] = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), size=resamples)
    return weights
