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
from ..mining.layers import IGNORED
from ..scoring.statistics import among_accepted, auc, auc_within, bootstrap, rank_correlation


TRAINED_ON_OTHERS = "judge of the other categories"


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
    labels: datasets.Dataset,
    label: np.ndarray,
    odds: np.ndarray,
    folds: list[np.ndarray],
    others: dict[str, np.ndarray],
    left_out: np.ndarray | None,
    resamples: int,
    seed: int,
) -> dict:
    """
    Compare the judge with other scores on held-out rows. Probabilities of a fold are calibrated on the others.
    Intervals are from `resamples` bootstrap samples of prompts.

    Args:
        label (`np.ndarray` of shape `(rows,)`): In [0, 1].
        odds (`np.ndarray` of shape `(rows,)`): Held-out log-odds.
        folds (`list[np.ndarray]`): The numbers of the rows that were held out together.
        others (`dict[str, np.ndarray]`): Scores of shape `(rows,)` to compare with; see [`training_free`].
        left_out (`np.ndarray` of shape `(rows,)`, *optional*): Log-odds of judges that were trained on the other
            categories. They are compared within a category only, since each category has a judge of its own.

    Returns:
        `dict` with the number of rows and prompts; the mean label; the log loss (nats), and that of the mean label;
        the [`reliability`]; and

    - `scores`: for each the AUC for a changed answer and the rank correlation with 1 − re-convergence of the other
      rows, both as `[value, low, high]` with a 95 % bootstrap interval over prompts, and the mean label and the share
      of changed answers among the 25, 50 and 75 % accepted;
    - `by_category`: for each category with answers that could be checked, how many prompts and such rows it has, and
      for each score their AUC and share of changed answers;
    - `within_categories`: for each score the AUC over pairs of the same category ([`auc_within`]).
    """
    prompts, probability = np.array(labels["prompt_id"][:]), np.empty(len(odds))
    for here in folds:
        rest = np.delete(np.arange(len(odds)), here)
        slope, intercept = calibrate(odds[rest], label[rest])
        probability[here] = expit(slope * odds[here] + intercept)
    flipped = np.array(labels["flipped"][:], dtype=float)
    lost = 1 - np.array(labels["reconvergence"][:], dtype=float)
    checked, (names, category) = ~np.isnan(flipped), np.unique(labels["category"][:], return_inverse=True)
    scores = {"judge": odds} | others
    by_category = {"judge": odds} | ({} if left_out is None else {TRAINED_ON_OTHERS: left_out}) | others

    def log_loss(probability: np.ndarray) -> float:
        probability = probability.clip(1e-6, 1 - 1e-6)
        return float(-(label * np.log(probability) + (1 - label) * np.log(1 - probability)).mean())

    def interval(measure: Callable, among: np.ndarray, *columns: np.ndarray) -> list[float] | None:
        found = bootstrap(measure, tuple(column[among] for column in columns), prompts[among], resamples, seed)
        return None if found is None else [*found]  # a list, as JSON gives it back

    def by_share(target: np.ndarray, score: np.ndarray) -> dict[str, float] | None:
        shares = (0.25, 0.5, 0.75)
        return {str(share): among_accepted(target, score, share) for share in shares} if len(target) else None

    def of_checked(score: np.ndarray, among: np.ndarray) -> dict:
        return {
            "auc_changed_answer": interval(auc, among, flipped, score),
            "changed_among_accepted": by_share(flipped[among], score[among]),
        }

    parts = {str(names[number]): checked & (category == number) for number in np.unique(category[checked])}
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
            name: of_checked(score, checked)
            | {
                "rank_correlation_text": interval(rank_correlation, ~checked & ~np.isnan(lost), lost, score),
                "mean_label_among_accepted": by_share(label, score),
            }
            for name, score in scores.items()
        },
        "by_category": {
            name: {
                "prompts": len(set(prompts[part])),
                "rows": int(part.sum()),
                "changed_answers": int(flipped[part].sum()),
                "scores": {score: of_checked(values, part) for score, values in by_category.items()},
            }
            for name, part in parts.items()
        },
        "within_categories": {
            name: interval(auc_within, checked, flipped, score, category) for name, score in by_category.items()
        },
    }


def training_free(labels: datasets.Dataset) -> dict[str, np.ndarray]:
    """Scores that need no training, by name, each of shape `(rows,)`: the higher, the less should be accepted. Of
    labels that were mined in rounds, all of them, it is also known how many candidates match after a mismatch."""
    scalars = np.stack(labels.with_format("numpy")["scalars"][:])
    margin, logprob = (scalars[:, SCALARS.index(name)] for name in ("margin", "candidate_logprob"))
    scores = {"margin": margin, "low log-probability": -logprob}
    if None in labels["drafted"][:]:
        return scores
    rows = labels.select_columns(["source", "answer", "position"]).to_pandas()
    rows["end"] = [len(tokens) for tokens in labels["answer_ids"][:]]
    following = rows.sort_values("position").groupby(["source", "answer"])["position"].shift(-1)
    return scores | {"look-ahead": (rows["position"] + 1 - following.fillna(rows["end"])).to_numpy()}
