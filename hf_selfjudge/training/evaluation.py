"""How good a judge is on prompts that it was not trained on, beside scores that need no training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import datasets
import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..judge.features import SCALARS
from ..scoring.statistics import among_accepted, auc, bootstrap, rank_correlation
from .config import JudgeConfig
from .data import soft_labels
from .trainer import JudgeTrainer


ACCEPT_SHARES = (0.25, 0.5, 0.75)
BINS = 10  # of the reliability plot


def held_out(
    labels: datasets.Dataset,
    fit: Callable[[datasets.Dataset, JudgeConfig], JudgeTrainer],
    args: JudgeConfig,
    folds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Cross-validate by prompt: train a judge for each fold, and ask it about the rows that it was not trained on.

    Args:
        labels (`datasets.Dataset`): As [`load_labels`] gives them.
        fit (`Callable`): Trains a judge on some of the rows.
        args ([`JudgeConfig`]): Options of the training. Nothing is logged, evaluated or saved.
        folds (`int`): Parts that the prompts are divided into; each in turn is held out.

    Returns:
        Two `np.ndarray` of shape `(rows,)`: the log-odds (NaN where the label is not known), and the fold of each row.

    Raises:
        ValueError: If there are too few prompts, or the rows outside of a fold cannot be trained on.
    """
    known, prompts = soft_labels(labels, args), np.array(labels["prompt_id"][:])
    rows = np.flatnonzero(~np.isnan(known))
    count = len(set(prompts[rows]))
    if count < 2 * folds:
        raise ValueError(f"`labels`: {count} prompts are too few for {folds} folds. Mine at least {2 * folds}.")
    odds, fold = np.full(len(known), np.nan), np.zeros(len(known), int)
    for number, (train, test) in enumerate(GroupKFold(folds).split(rows, groups=prompts[rows])):
        fold[rows[test]] = number
        try:
            trainer = fit(labels.select(rows[train]), _quiet(args))
        except ValueError as error:
            raise ValueError(f"{error} (Held out was part {number + 1} of {folds}.)") from error
        odds[rows[test]] = trainer.odds(labels.select(rows[test]))
    return odds, fold


def _quiet(args: JudgeConfig) -> JudgeConfig:
    """A copy of the options with which nothing is logged, evaluated, saved or resumed."""
    args = copy.copy(args)
    args.disable_tqdm, args.push_to_hub, args.resume_from_checkpoint, args.report_to = True, False, None, []
    args.logging_strategy = args.eval_strategy = IntervalStrategy.NO
    args.save_strategy = SaveStrategy.NO
    args.eval_on_start = args.load_best_model_at_end = False
    return args


def calibrate(odds: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """
    Fit held-out log-odds to soft labels, both of shape `(rows,)`, by Platt's scaling.

    Returns:
        Slope and intercept: `expit(slope * odds + intercept)` is the calibrated probability.
    """
    model = LogisticRegression(C=np.inf).fit(
        np.concatenate([odds, odds])[:, None],
        np.repeat([1, 0], len(odds)),
        sample_weight=np.concatenate([label, 1 - label]),
    )
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
    """Mean cross-entropy with soft labels, nats."""
    probability = probability.clip(1e-6, 1 - 1e-6)
    return float(-(label * np.log(probability) + (1 - label) * np.log(1 - probability)).mean())


def reliability(probability: np.ndarray, label: np.ndarray) -> list[dict]:
    """For tenths of the rows, sorted by probability: mean `probability`, mean `label` and number of `rows`."""
    parts = np.array_split(np.argsort(probability), BINS)
    return [
        {"probability": float(probability[part].mean()), "label": float(label[part].mean()), "rows": len(part)}
        for part in parts
        if len(part)
    ]


def evaluate(
    labels: datasets.Dataset,
    label: np.ndarray,
    odds: np.ndarray,
    fold: np.ndarray,
    source: np.ndarray,
    resamples: int,
    seed: int,
) -> dict:
    """
    Compare the judge with the training-free scores on held-out rows.

    Args:
        labels (`datasets.Dataset`): The rows.
        label (`np.ndarray` of shape `(rows,)`): Their label, in [0, 1].
        odds (`np.ndarray` of shape `(rows,)`): Held-out log-odds.
        fold (`np.ndarray` of shape `(rows,)`): See [`held_out`]. Probabilities of a fold are calibrated on the others.
        source (`np.ndarray` of shape `(rows,)`): Number of the folder that the row is from.
        resamples (`int`): Bootstrap samples of prompts.
        seed (`int`): Seed of the bootstrap.

    Returns:
        `dict` with the number of rows and prompts; the mean label; the log loss, and that of the mean label; the
        [`reliability`]; and for each score the AUC for a changed answer, over all rows and within each folder (folders
        differ in how often answers change, and telling them apart raises an AUC over all), the rank correlation with
        1 − re-convergence of the other rows, both as `[value, low, high]` with a 95 % bootstrap interval over prompts,
        and the mean label and the share of changed answers among the 25, 50 and 75 % accepted.
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
    checked = ~np.isnan(flipped)
    result = {
        "rows": len(label),
        "prompts": len(set(prompts)),
        "rows_checked": int(checked.sum()),
        "changed_answers": int(np.nansum(flipped)),
        "mean_label": float(label.mean()),
        "log_loss": log_loss(label, probability),
        "log_loss_of_the_mean": log_loss(label, np.full_like(probability, label.mean())),
        "reliability": reliability(probability, label),
        "scores": {},
    }

    def interval(measure: Callable, target: np.ndarray, score: np.ndarray, among: np.ndarray) -> list[float] | None:
        found = bootstrap(measure, (target[among], score[among]), prompts[among], resamples, seed)
        return None if found is None else [*found]  # a list, as JSON gives it back

    for name, score in {"judge": odds, "margin": margin, "low log-probability": -logprob}.items():
        result["scores"][name] = {
            "auc_changed_answer": interval(auc, flipped, score, checked),
            "auc_within": [
                interval(auc, flipped, score, checked & (source == number)) for number in range(source.max() + 1)
            ],
            "rank_correlation_text": interval(rank_correlation, lost, score, ~checked & ~np.isnan(lost)),
            "mean_label_among_accepted": _by_share(label, score),
            "changed_among_accepted": _by_share(flipped[checked], score[checked]),
        }
    return result


def _by_share(label: np.ndarray, score: np.ndarray) -> dict[str, float] | None:
    return {str(share): among_accepted(label, score, share) for share in ACCEPT_SHARES} if len(label) else None
