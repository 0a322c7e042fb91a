"""Labels -> judge.

In: folders of mined labels. Out: a fitted [`Judge`] and what it measured on prompts it was not fitted on. Needs no
model in memory and takes seconds: normalisation, principal components, logistic regression.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from .features import SCALARS
from .judge import Judge, JudgeInfo
from .labels import load_labels


COMPONENTS = (8, 16, 32, 64)
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
ACCEPT_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class FitConfig:
    """
    How a judge is fitted.

    Args:
        accept_share (`float`): Share of held-out mismatches (the draft's first choices, which decoding meets) that
            the judge's own threshold accepts. Thresholds are set by acceptance: published constants do not carry over
            from one pair to another.
        folds (`int`): Of the cross-validation, split by prompt.
        resamples (`int`): Bootstrap resamples of prompts for the intervals.
        seed (`int`): Of the bootstrap and the randomised components.
    """

    accept_share: float = 0.5
    folds: int = 5
    resamples: int = 1000
    seed: int = 0


@dataclass
class Table:
    """Labels as arrays: `scalars` `(rows, len(SCALARS))`, `hidden` `(rows, 2, hidden_size)`, `changed` `(rows,)` in
    [0, 1], `flipped` `(rows,)` with NaN where unknown, `prompt` and `kind` `(rows,)`."""

    scalars: np.ndarray
    hidden: np.ndarray
    changed: np.ndarray
    flipped: np.ndarray
    prompt: np.ndarray
    kind: np.ndarray

    @classmethod
    def of(cls, labels: datasets.Dataset) -> Table:
        columns = labels.with_format("numpy")
        hidden = np.stack([np.stack(columns[name][:]) for name in ("hidden_before", "hidden_after")], axis=1)
        flipped = np.array([np.nan if value is None else float(value) for value in labels["flipped"]])
        prompt, kind = (np.array(labels[name]) for name in ("prompt_id", "kind"))
        changed = columns["changed"][:]
        return cls(np.stack(columns["scalars"][:]), hidden.astype(np.float32), changed, flipped, prompt, kind)

    def rows(self, index: np.ndarray) -> Table:
        return Table(*(column[index] for column in vars(self).values()))


class Projection:
    """Normalised scalars beside whitened principal components of each hidden state, most variance first."""

    def __init__(self, table: Table, components: int, seed: int):
        self.scaler = StandardScaler().fit(table.scalars)
        # Each dimension is scaled first: a handful of the target's dimensions are a hundred times the others.
        self.normal = [StandardScaler().fit(table.hidden[:, side]) for side in (0, 1)]
        self.pca = [
            PCA(components, whiten=True, svd_solver="randomized", random_state=seed).fit(
                normal.transform(table.hidden[:, s])
            )
            for s, normal in enumerate(self.normal)
        ]

    def __call__(self, table: Table, components: int) -> np.ndarray:
        parts = [self.scaler.transform(table.scalars)]
        for side, (normal, pca) in enumerate(zip(self.normal, self.pca, strict=True)):
            parts.append(pca.transform(normal.transform(table.hidden[:, side]))[:, :components])
        return np.concatenate(parts, axis=1)


def fit_judge(folders: list[str | os.PathLike], config: FitConfig | None = None) -> Judge:
    """
    Fit a judge on mined labels. The number of components and the penalty are those with the least held-out log loss.

    Args:
        folders (`list`): Folders written by [`mine`], all of one target and draft.
        config ([`FitConfig`], *optional*): How.

    Returns:
        [`Judge`]; `judge.info.training` holds what was measured, on held-out prompts only.

    Raises:
        FileNotFoundError: If a folder has no labels.
        ValueError: If the folders are of different models, have too few prompts, or no rewrites.
    """
    config = config or FitConfig()
    mining = mining_of(folders)
    first = mining[0]
    labels = datasets.concatenate_datasets([load_labels(folder) for folder in folders])
    rewritten = [row for row, changed in enumerate(labels["changed"]) if changed is not None]
    if not rewritten:
        raise ValueError("`labels`: no substitution was rewritten. Mine with `rewrites` above 0.")
    table = Table.of(labels.select(rewritten))
    if len(set(table.prompt)) < 2 * config.folds:
        raise ValueError(
            f"`labels`: {len(set(table.prompt))} prompts are too few for {config.folds} folds. Mine at least "
            f"{2 * config.folds}."
        )
    most = min(max(COMPONENTS), table.hidden.shape[-1], len(table.changed) // 2)
    components, penalty, held_out = _select(table, most, config)
    met = held_out[table.kind == "mismatch"]
    threshold = float(np.quantile(met if len(met) else held_out, config.accept_share))
    info = JudgeInfo(
        target=first["target"],
        target_fingerprint=first["target_fingerprint"],
        hidden_size=first["hidden_size"],
        vocab_size=first["vocab_size"],
        draft=first["draft"],
        special_tokens=first["special_tokens"],
        components=components,
        threshold=threshold,
        training={
            "mining": mining,
            "fit": {**asdict(config), "components": components, "inverse_penalty": penalty},
            "held_out": evaluate(table, held_out, config),
        },
    )
    projection = Projection(table, components, config.seed)
    return _assemble(info, projection, _logistic(projection(table, components), table.changed, penalty))


def mining_of(folders: Sequence[str | os.PathLike]) -> list[dict]:
    """
    How labels were mined, for each folder.

    Raises:
        FileNotFoundError: If one of them is not one of labels.
        ValueError: If they are of different models.
    """
    mining = []
    for folder in folders:
        path = Path(folder) / "mining.json"
        if not path.is_file():
            raise FileNotFoundError(f"`labels`: {folder} has no mining.json. Make labels with `hf-selfjudge mine`.")
        mining.append(json.loads(path.read_text(encoding="utf-8")))
        for name in ("target", "target_fingerprint", "draft"):
            if mining[-1][name] != mining[0][name]:
                raise ValueError(
                    f"`labels`: the folders are of different models ({name}: {mining[0][name]!r} and "
                    f"{mining[-1][name]!r}). Take those of one pair."
                )
    return mining


def _select(table: Table, most: int, config: FitConfig) -> tuple[int, float, np.ndarray]:
    """Cross-validate; returns components, inverse penalty and the held-out probabilities of shape `(rows,)`."""
    grid = [(c, p) for c in COMPONENTS if c <= most for p in INVERSE_PENALTIES]
    held_out = np.zeros((len(grid), len(table.changed)))
    for train, test in GroupKFold(config.folds).split(table.scalars, groups=table.prompt):
        projection = Projection(table.rows(train), most, config.seed)
        inside, outside = projection(table.rows(train), most), projection(table.rows(test), most)
        for g, (components, penalty) in enumerate(grid):
            keep = _columns(components, most)
            model = _logistic(inside[:, keep], table.changed[train], penalty)
            held_out[g, test] = model.predict_proba(outside[:, keep])[:, 1]
    best = int(np.argmin([log_loss(table.changed, probability) for probability in held_out]))
    return *grid[best], held_out[best]


def _columns(components: int, most: int) -> list[int]:
    scalars = len(SCALARS)
    return [*range(scalars + components), *range(scalars + most, scalars + most + components)]


def _logistic(features: np.ndarray, changed: np.ndarray, inverse_penalty: float) -> LogisticRegression:
    """Logistic regression on soft labels: each row counts as changed with weight y, as unchanged with 1 − y."""
    twice = np.concatenate([features, features])
    label = np.repeat([1, 0], len(features))
    weight = np.concatenate([changed, 1 - changed])
    return LogisticRegression(C=inverse_penalty, max_iter=2000).fit(twice, label, sample_weight=weight)


def _assemble(info: JudgeInfo, projection: Projection, model: LogisticRegression) -> Judge:
    judge = Judge(info)
    with torch.no_grad():
        judge.scalar_mean.copy_(torch.from_numpy(projection.scaler.mean_))
        judge.scalar_scale.copy_(torch.from_numpy(projection.scaler.scale_))
        for side, (normal, pca) in enumerate(zip(projection.normal, projection.pca, strict=True)):
            # The normalised states have mean 0, so the components' own centre is 0 as well.
            matrix = pca.components_.T / np.sqrt(pca.explained_variance_) / normal.scale_[:, None]
            judge.hidden_mean[side] = torch.from_numpy(normal.mean_)
            judge.projection[side] = torch.from_numpy(matrix)
        judge.head.weight.copy_(torch.from_numpy(model.coef_))
        judge.head.bias.copy_(torch.from_numpy(model.intercept_))
    return judge.eval()


# ---------------------------------------------------------------------------------------------------------------------
# What the held-out rows say


def log_loss(changed: np.ndarray, probability: np.ndarray) -> float:
    """Cross-entropy with soft labels, nats for each row."""
    probability = probability.clip(1e-6, 1 - 1e-6)
    return float(-(changed * np.log(probability) + (1 - changed) * np.log(1 - probability)).mean())


def evaluate(table: Table, probability: np.ndarray, config: FitConfig) -> dict:
    """
    The judge beside the training-free scores on held-out rows.

    Returns:
        `dict` with the number of rows and prompts; the mean label; the log loss, and that of the mean label; for each
        score the AUC for a changed final number and the rank correlation with 1 − re-convergence, each as
        `[value, low, high]` with a 95 % bootstrap interval over prompts; and the mean label among the 25, 50 and 75 %
        accepted.
    """
    margin, logprob = (table.scalars[:, SCALARS.index(name)] for name in ("margin", "candidate_logprob"))
    scores = {"judge": probability, "margin": margin, "low log-probability": -logprob}
    known, text = ~np.isnan(table.flipped), np.isnan(table.flipped)
    result = {
        "rows": len(table.changed),
        "prompts": len(set(table.prompt)),
        "rows_checked_by_number": int(known.sum()),
        "changed_numbers": int(np.nansum(table.flipped)),
        "mean_label": float(table.changed.mean()),
        "log_loss": log_loss(table.changed, probability),
        "log_loss_of_the_mean": log_loss(table.changed, np.full_like(probability, table.changed.mean())),
        "scores": {},
    }
    for name, score in scores.items():
        accepted = {}
        for share in ACCEPT_SHARES:
            inside = score <= np.quantile(score, share)
            accepted[str(share)] = float(table.changed[inside].mean())
        result["scores"][name] = {
            "auc_changed_number": interval(table.flipped, score, table.prompt, known, auc, config),
            "rank_correlation_text": interval(table.changed, score, table.prompt, text, _correlation, config),
            "mean_label_among_accepted": accepted,
        }
    return result


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; NaN where all labels are the same."""
    return float(roc_auc_score(label, score)) if 0 < label.sum() < len(label) else float("nan")


def _correlation(label: np.ndarray, score: np.ndarray) -> float:
    return float(spearmanr(label, score).statistic) if np.ptp(label) and np.ptp(score) else float("nan")


def interval(
    label: np.ndarray, score: np.ndarray, prompt: np.ndarray, among: np.ndarray, measure: Callable, config: FitConfig
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
