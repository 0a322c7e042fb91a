"""Log-odds and labels -> how well a judge tells candidates apart, compared with scores that need no training."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from transformers import EvalPrediction

from ..judge.features import SCALARS
from ..mining.label_files import mining_records
from ..mining.layers import IGNORED
from ..scoring.statistics import among_accepted, auc, bootstrap, rank_correlation


def agreement(odds: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The `accuracy` and `accept_rate` of log-odds at a threshold of 0.5, and, if anything is accepted, the
    `false_accept_rate`: the mean label of the accepted. `odds` and `labels` have the shape `(rows,)`."""
    accepted = odds < 0
    rates = {"accuracy": ((labels < 0.5) == accepted).float().mean(), "accept_rate": accepted.float().mean()}
    if accepted.any():
        rates["false_accept_rate"] = labels[accepted].mean()
    return {name: float(value) for name, value in rates.items()}


def judge_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of [`agreement`], and `auroc` for labels above 0.5 (left out if all or none of them are)."""
    odds, labels = (torch.tensor(values).flatten() for values in (prediction.predictions, prediction.label_ids))
    odds, labels = odds[labels != IGNORED], labels[labels != IGNORED]
    area = auc(labels.numpy() > 0.5, odds.numpy())
    return agreement(odds, labels) | ({} if np.isnan(area) else {"auroc": area})


def calibrate(odds: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Fit held-out log-odds to soft labels, both of shape `(rows,)`, by Platt's scaling: a slope and an intercept, so
    that `expit(slope * odds + intercept)` is the calibrated probability."""
    model = LogisticRegression(C=np.inf).fit(
        np.concatenate([odds, odds])[:, None],
        np.repeat([1, 0], len(odds)),
        sample_weight=np.concatenate([label, 1 - label]),
    )
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def reliability(probability: np.ndarray, label: np.ndarray) -> list[dict]:
    """For tenths of the rows, sorted by probability: mean `probability`, mean `label` and number of `rows`."""
    return [
        {"probability": float(probability[part].mean()), "label": float(label[part].mean()), "rows": len(part)}
        for part in np.array_split(np.argsort(probability), 10)
        if len(part)
    ]


def evaluate(
    labels: datasets.Dataset, label: np.ndarray, odds: np.ndarray, fold: np.ndarray, resamples: int, seed: int
) -> dict:
    """
    Compare the judge with the training-free scores on held-out rows: `label` in [0, 1], held-out log-odds `odds` and
    the `fold` that each row was held out in, all of shape `(rows,)`. Probabilities of a fold are calibrated on the
    others. Intervals are from `resamples` bootstrap samples of prompts.

    Returns:
        `dict` with the number of rows and prompts; the mean label; the log loss (nats), and that of the mean label;
        the [`reliability`]; and for each score the AUC for a changed answer, over all rows and within each folder of
        labels (folders differ in how often answers change, and telling them apart raises an AUC over all), the rank
        correlation with 1 − re-convergence of the other rows, both as `[value, low, high]` with a 95 % bootstrap
        interval over prompts, and the mean label and the share of changed answers among the 25, 50 and 75 % accepted.
    """
    prompts, probability = np.array(labels["prompt_id"][:]), np.empty(len(odds))
    for number in np.unique(fold):
        here = fold == number
        slope, intercept = calibrate(odds[~here], label[~here])
        probability[here] = expit(slope * odds[here] + intercept)
    flipped = np.array(labels["flipped"][:], dtype=float)
    lost = 1 - np.array(labels["reconvergence"][:], dtype=float)
    scalars = np.stack(labels.with_format("numpy")["scalars"][:])
    margin, logprob = (scalars[:, SCALARS.index(name)] for name in ("margin", "candidate_logprob"))
    checked, source = ~np.isnan(flipped), np.array(labels["source"][:])

    def log_loss(probability: np.ndarray) -> float:
        probability = probability.clip(1e-6, 1 - 1e-6)
        return float(-(label * np.log(probability) + (1 - label) * np.log(1 - probability)).mean())

    def interval(measure: Callable, target: np.ndarray, score: np.ndarray, among: np.ndarray) -> list[float] | None:
        found = bootstrap(measure, (target[among], score[among]), prompts[among], resamples, seed)
        return None if found is None else [*found]  # a list, as JSON gives it back

    def by_share(target: np.ndarray, score: np.ndarray) -> dict[str, float] | None:
        shares = (0.25, 0.5, 0.75)
        return {str(share): among_accepted(target, score, share) for share in shares} if len(target) else None

    return {
        "rows": len(label),
        "prompts": len(set(prompts)),
        "rows_checked": int(checked.sum()),
        "changed_answers": int(np.nansum(flipped)),
        "mean_label": float(label.mean()),
        "log_loss": log_loss(probability),
        "log_loss_of_the_mean": log_loss(np.full_like(probability, label.mean())),
        "reliability": reliability(probability, label),
        "scores": {
            name: {
                "auc_changed_answer": interval(auc, flipped, score, checked),
                "auc_within": [
                    interval(auc, flipped, score, checked & (source == record["source"]))
                    for record in mining_records(labels)
                ],
                "rank_correlation_text": interval(rank_correlation, lost, score, ~checked & ~np.isnan(lost)),
                "mean_label_among_accepted": by_share(label, score),
                "changed_among_accepted": by_share(flipped[checked], score[checked]),
            }
            for name, score in {"judge": odds, "margin": margin, "low log-probability": -logprob}.items()
        },
    }
