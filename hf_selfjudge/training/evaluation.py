"""How good a judge is on prompts that it was not trained on, and what its numbers mean.

In: labels, and how a judge is trained. Out: its held-out log-odds, measures of them beside those of scores that need
no training, and what makes a probability of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..judge.features import SCALARS
from ..judge.judge import Judge
from ..scoring.statistics import among_accepted, auc, rank_correlation
from .config import JudgeConfig
from .data import soft_labels
from .trainer import JudgeTrainer


ACCEPT_SHARES = (0.25, 0.5, 0.75)
BINS = 10  # of the reliability plot


@dataclass(frozen=True)
class HeldOutConfig:
    """
    How a judge is measured.

    Args:
        accept_share (`float`): Share of held-out mismatches (the draft's first choices, which decoding meets) that
            the judge's own threshold accepts. Thresholds are set by acceptance: published constants do not carry over
            from one pair to another.
        folds (`int`): Of the cross-validation, split by prompt.
        resamples (`int`): Bootstrap resamples of prompts for the intervals.
        seed (`int`): Of the bootstrap.
    """

    accept_share: float = 0.5
    folds: int = 5
    resamples: int = 1000
    seed: int = 0


def held_out(
    labels: datasets.Dataset,
    fit: Callable[[datasets.Dataset, JudgeConfig], JudgeTrainer],
    args: JudgeConfig,
    folds: int | None,
    by: str = "prompt_id",
) -> tuple[np.ndarray, np.ndarray]:
    """
    What a judge says of rows that it was not trained on.

    Args:
        fit (`Callable`): Trains a judge on some of the rows.
        args ([`JudgeConfig`]): How; of the training nothing is said or written.
        folds (`int`, *optional*): Parts that the groups are divided into; each in turn is left out. `None`: each
            group in turn.
        by (`str`): Column that makes the groups.

    Returns:
        Two `np.ndarray` of shape `(rows,)`: log-odds (NaN where the label is not known), and the part that the row is
        of.

    Raises:
        ValueError: If there are too few groups, or nothing can be trained on what is left without one of the parts.
    """
    known, groups = soft_labels(labels, args), np.array(labels[by][:])
    rows = np.flatnonzero(~np.isnan(known))
    count = len(set(groups[rows]))
    if count < (2 * folds if folds else 2):
        raise ValueError(
            f"`labels`: {count} values of {by!r} are too few for {folds or count} folds. Mine at least "
            f"{2 * folds if folds else 2}."
        )
    odds, part = np.full(len(known), np.nan), np.zeros(len(known), int)
    splits = GroupKFold(folds) if folds else LeaveOneGroupOut()
    for number, (train, test) in enumerate(splits.split(rows, groups=groups[rows])):
        part[rows[test]] = number
        try:
            trainer = fit(labels.select(rows[train]), _quiet(args))
        except ValueError as error:
            raise ValueError(f"{error} (Held out was part {number + 1} of {folds or count}.)") from error
        odds[rows[test]] = trainer.odds(labels.select(rows[test]))
    return odds, part


def _quiet(args: JudgeConfig) -> JudgeConfig:
    """The same training, of which nothing is said or written."""
    args = copy.copy(args)
    args.disable_tqdm, args.push_to_hub, args.resume_from_checkpoint, args.report_to = True, False, None, []
    args.logging_strategy = args.eval_strategy = IntervalStrategy.NO
    args.save_strategy = SaveStrategy.NO
    args.eval_on_start = args.load_best_model_at_end = False
    return args


def calibrate(odds: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Slope and intercept that make probabilities of held-out log-odds (Platt's scaling, with soft labels)."""
    model = LogisticRegression(C=np.inf).fit(
        np.concatenate([odds, odds])[:, None],
        np.repeat([1, 0], len(odds)),
        sample_weight=np.concatenate([label, 1 - label]),
    )
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def calibrated(judge: Judge, slope: float, intercept: float) -> Judge:
    """The judge, whose log-odds are now `slope * odds + intercept`."""
    with torch.no_grad():
        judge.head.weight.mul_(slope)
        judge.head.bias.mul_(slope).add_(intercept)
    return judge


def log_loss(label: np.ndarray, probability: np.ndarray) -> float:
    """Cross-entropy with soft labels, nats for each row."""
    probability = probability.clip(1e-6, 1 - 1e-6)
    return float(-(label * np.log(probability) + (1 - label) * np.log(1 - probability)).mean())


def reliability(probability: np.ndarray, label: np.ndarray) -> list[dict]:
    """Tenths of the rows, by what the judge says: mean probability, mean label and number of rows of each."""
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
    part: np.ndarray,
    source: np.ndarray,
    config: HeldOutConfig,
) -> dict:
    """
    The judge beside the training-free scores on held-out rows.

    Args:
        labels (`datasets.Dataset`): The rows.
        label (`np.ndarray` of shape `(rows,)`): Their label, in [0, 1].
        odds (`np.ndarray` of shape `(rows,)`): Held-out log-odds.
        part (`np.ndarray` of shape `(rows,)`): See [`held_out`]. Probabilities of a part are calibrated on the others.
        source (`np.ndarray` of shape `(rows,)`): Number of the folder that the row is from.

    Returns:
        `dict` with the number of rows and prompts; the mean label; the log loss, and that of the mean label; the
        [`reliability`]; for each score the AUC for a changed answer, over all rows and within each folder (where
        folders differ in how often answers change, telling them apart is half the battle), and the rank correlation
        with 1 − re-convergence elsewhere, each as `[value, low, high]` with a 95 % bootstrap interval over prompts;
        and the mean label, and the share of changed answers, among the 25, 50 and 75 % accepted.
    """
    prompt, probability = np.array(labels["prompt_id"][:]), np.empty(len(odds))
    for number in np.unique(part):
        here = part == number
        slope, intercept = calibrate(odds[~here], label[~here])
        probability[here] = expit(slope * odds[here] + intercept)
    flipped = np.array(labels["flipped"][:], dtype=float)
    lost = 1 - np.array(labels["reconvergence"][:], dtype=float)
    scalars = np.stack(labels.with_format("numpy")["scalars"][:])
    margin, logprob = (scalars[:, SCALARS.index(name)] for name in ("margin", "candidate_logprob"))
    known = ~np.isnan(flipped)
    result = {
        "rows": len(label),
        "prompts": len(set(prompt)),
        "rows_checked": int(known.sum()),
        "changed_answers": int(np.nansum(flipped)),
        "mean_label": float(label.mean()),
        "log_loss": log_loss(label, probability),
        "log_loss_of_the_mean": log_loss(label, np.full_like(probability, label.mean())),
        "reliability": reliability(probability, label),
        "scores": {},
    }
    for name, score in {"judge": odds, "margin": margin, "low log-probability": -logprob}.items():
        result["scores"][name] = {
            "auc_changed_answer": interval(flipped, score, prompt, known, auc, config),
            "auc_within": [
                interval(flipped, score, prompt, known & (source == number), auc, config)
                for number in range(int(source.max()) + 1)
            ],
            "rank_correlation_text": interval(lost, score, prompt, ~known & ~np.isnan(lost), rank_correlation, config),
            "mean_label_among_accepted": _by_share(label, score),
            "changed_among_accepted": _by_share(flipped[known], score[known]),
        }
    return result


def _by_share(label: np.ndarray, score: np.ndarray) -> dict[str, float] | None:
    return {str(share): among_accepted(label, score, share) for share in ACCEPT_SHARES} if len(label) else None


def interval(
    label: np.ndarray,
    score: np.ndarray,
    prompt: np.ndarray,
    among: np.ndarray,
    measure: Callable[[np.ndarray, np.ndarray], float],
    config: HeldOutConfig,
) -> list[float] | None:
    """`measure(label, score)` among some rows as `[value, low, high]`, with a 95 % bootstrap interval over whole
    prompts; `None` where it is undefined."""
    label, score, prompt = label[among], score[among], prompt[among]
    if not len(label) or np.isnan(value := measure(label, score)):
        return None
    rng, prompts = np.random.default_rng(config.seed), np.unique(prompt)
    rows = {name: np.flatnonzero(prompt == name) for name in prompts}
    samples = []
    for _ in range(config.resamples):
        index = np.concatenate([rows[name] for name in rng.choice(prompts, len(prompts))])
        samples.append(measure(label[index], score[index]))
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return [value, float(low), float(high)]
