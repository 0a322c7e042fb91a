"""What mined labels say: rates, scores beside each other, and substitutions in context for a person to judge.

In: folders of labels and the target's tokenizer. Out: tables, a plot, text with the substitution in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..scoring.statistics import among_accepted, auc, rank_correlation
from ..training.evaluation import HeldOutConfig, interval
from ..utils.files import atomic_write
from ..utils.text import INCOMPLETE, in_plot, in_terminal, pieces
from .labels import CHEAP_SCORES, load_labels, mining_of


TITLES = {"replaced": "token replaced", "kind": "kind of substitution"}
REWRITE_SCORES = ("lost", "says_no")  # what a rewrite tells, beside `flipped`
COMPONENTS, FOLDS, ACCEPTED = 16, 5, 0.75
DECILES = (0.1, 0.5, 0.9)
CONTEXT = 24  # tokens shown before and behind a substitution


@dataclass
class Labels:
    """
    Rows of labels, with what is looked up again and again.

    Args:
        rows (`datasets.Dataset`): As [`load_labels`] gives them.
        columns (`dict[str, np.ndarray]`): The short ones: strings, and numbers with NaN where nothing is known.
    """

    rows: datasets.Dataset
    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, folders: Sequence[str | os.PathLike], tokenizer: PreTrainedTokenizerBase) -> Labels:
        """
        Raises:
            FileNotFoundError: If a folder has none.
            ValueError: If they are of different models or layers.
        """
        mining_of(folders)
        return cls.of(datasets.concatenate_datasets([load_labels(folder) for folder in folders]), tokenizer)

    @classmethod
    def of(cls, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Labels:
        """Of rows that are at hand."""
        columns = {name: np.array(rows[name][:]) for name in ("prompt_id", "category", "check", "kind", "substitute")}
        for name in (*CHEAP_SCORES, "changed", "reconvergence", "says_no", "flipped", "draft_logprob"):
            columns[name] = np.array(rows[name][:], dtype=float)
        columns["lost"] = 1 - columns["reconvergence"]
        tokens = rows["token"][:]
        kinds = {token: token_kind(tokenizer.decode([token])) for token in {*tokens}}
        columns["replaced"] = np.array([kinds[token] for token in tokens])
        return cls(rows, columns)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rewritten(self) -> np.ndarray:
        return ~np.isnan(self.columns["changed"])


def token_kind(text: str) -> str:
    """Number, punctuation, space, function word, name (begins with a capital letter), word, or a part of a
    character."""
    word = text.strip()
    if not word:
        return "space"
    if INCOMPLETE in word:
        return "part of a character"
    if any(character.isdigit() for character in word):
        return "number"
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if word.lower() in ENGLISH_STOP_WORDS:
        return "function word"
    return "name" if word[0].isupper() else "word"


def rates(labels: Labels, by: str, config: HeldOutConfig) -> list[dict]:
    """
    What rewriting did, for each value of a column (`category`, `kind`, `replaced`, …).

    Returns:
        `list[dict]` with the number of substitutions, how many were rewritten, the share of changed answers (final
        number, tests) among those where that is known, and the mean share of the original's 4-grams that was lost; the
        last two as `[value, low, high]`, or `None`.
    """
    column, prompts, known = labels.columns[by], labels.columns["prompt_id"], ~np.isnan(labels.columns["flipped"])
    result = []
    for value in sorted(set(column)):
        here = column == value
        rows = {
            by: str(value),
            "substitutions": int(here.sum()),
            "rewritten": int((here & labels.rewritten).sum()),
            "checked": int((here & known).sum()),
        }
        for name, score, among in (("changed", "flipped", known), ("lost", "lost", labels.rewritten)):
            rows[name] = interval(labels.columns[score], labels.columns[score], prompts, here & among, _mean, config)
        result.append(rows)
    return result


def distributions(labels: Labels, by: str) -> list[dict]:
    """Of each cheap score, for each value of a column: its 10, 50 and 90 % quantiles, nats, or `None`."""
    result = []
    for value in sorted(set(labels.columns[by])):
        here = labels.columns[by] == value
        scores = {name: labels.columns[name][here] for name in CHEAP_SCORES}
        known = {name: values[np.isfinite(values)] for name, values in scores.items()}
        quantiles = {name: np.quantile(v, DECILES).tolist() if len(v) else None for name, v in known.items()}
        result.append({by: str(value), **quantiles})
    return result


def correlations(labels: Labels) -> tuple[list[str], np.ndarray]:
    """Names of scores and the rank correlation of each two, over the rows that have both; shape `(n, n)`."""
    names = [
        name
        for name in (*CHEAP_SCORES, *REWRITE_SCORES, "flipped")
        if np.isfinite(labels.columns[name]).sum() > 2 and np.nanstd(labels.columns[name]) > 0
    ]
    matrix = np.full((len(names), len(names)), np.nan)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            a, b = labels.columns[first], labels.columns[second]
            both = np.isfinite(a) & np.isfinite(b)
            if both.sum() > 2 and np.ptp(a[both]) and np.ptp(b[both]):
                matrix[i, j] = spearmanr(a[both], b[both]).statistic
    return names, matrix


def predictors(labels: Labels, config: HeldOutConfig) -> list[dict]:
    """
    How well each score, and simple models fitted on other prompts, tell what a rewrite did.

    Returns:
        `list[dict]` with, for each: AUC for a changed answer, rank correlation with the share of 4-grams lost (both
        `[value, low, high]` with a 95 % bootstrap interval over prompts, or `None`), and the share of changed answers
        and of 4-grams lost among the 75 % that would be accepted (of the rows where each is known). Empty if nothing
        was rewritten; without the models if there are too few changed answers to fit them.
    """
    keep = np.flatnonzero(labels.rewritten)
    if not len(keep):
        return []
    columns = {name: values[keep] for name, values in labels.columns.items()}
    scores = {name: columns[name] for name in CHEAP_SCORES}
    scores["low log-probability of the draft"] = -columns["draft_logprob"]
    rows = labels.rows.select(keep).with_format("numpy")
    parts = {
        "scalars": np.stack(rows["scalars"][:]),
        "hidden before": np.stack(rows["hidden_before"][:]).astype(np.float32),
        "hidden after": np.stack(rows["hidden_after"][:]).astype(np.float32),
    }
    label = (columns["changed"] > 0.5).astype(int)
    least = min((len(set(columns["prompt_id"][label == value])) for value in (0, 1)), default=0)
    if least >= FOLDS:  # then both labels are in every fold's training rows
        for name, features in parts.items():
            most = min(COMPONENTS, features.shape[1], len(features) // 2)
            steps = [StandardScaler(), *([PCA(most, random_state=config.seed)] if name != "scalars" else [])]
            model = make_pipeline(*steps, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            name = f"logistic regression, {name}" + (f" (PCA-{most})" if len(steps) > 1 else "")
            scores[name] = cross_val_predict(
                model,
                features,
                label,
                groups=columns["prompt_id"],
                cv=StratifiedGroupKFold(FOLDS),
                method="predict_proba",
            )[:, 1]
    result = []
    for name, score in scores.items():
        usable = np.isfinite(score)
        known, prompt = usable & np.isfinite(columns["flipped"]), columns["prompt_id"]
        result.append(
            {
                "score": name,
                "auc": interval(columns["flipped"], score, prompt, known, auc, config),
                "correlation": interval(columns["lost"], score, prompt, usable, rank_correlation, config),
                "changed_among_accepted": among_accepted(columns["flipped"][known], score[known], ACCEPTED),
                "lost_among_accepted": among_accepted(columns["lost"][usable], score[usable], ACCEPTED),
            }
        )
    return result


def _mean(values: np.ndarray, _) -> float:
    return float(values.mean())


def in_context(labels: Labels, index: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """One rewritten substitution: the text before it, the two tokens, and how each answer goes on."""
    row = labels.rows[index]
    position, ways = row["position"], []
    for ids in (row["answer_ids"], row["rewritten_ids"]):
        end = min(position + 1 + CONTEXT, len(ids))
        _, *shown, _ = pieces(tokenizer, ids, [max(0, position - CONTEXT), position, position + 1, end, len(ids)])
        ways.append(shown)
    changed = "" if row["flipped"] is None else ", the answer changed" if row["flipped"] else ", the answer stayed"
    told = f"{row['category']}, {row['prompt_id']}: {1 - row['reconvergence']:.0%} lost{changed}\n"
    text = Text().append(in_terminal(told, "bold"))
    text.append(in_terminal(f"  … {ways[0][0]}\n".replace("\n", " "), "dim"))
    for name, style, (_, token, rest) in zip(("target", "other "), ("green", "magenta"), ways, strict=True):
        text.append(f"\n  {name} ").append(in_terminal(token.replace("\n", "⏎"), f"{style} reverse"))
        text.append(in_terminal(rest.replace("\n", "⏎") + " …", style))
    return text.append("\n")


def examples(labels: Labels, harmful: bool, count: int, seed: int) -> list[int]:
    """Rows to show, of different prompts: where the answer changed (or, in text, most was lost), or where it did
    not."""
    label = labels.columns["changed"]
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero(label >= 0.8 if harmful else label <= 0.2)
    chosen, prompts = [], set()
    for index in np.random.default_rng(seed).permutation(rows):
        if len(chosen) < count and (prompt := labels.columns["prompt_id"][index]) not in prompts:
            prompts.add(prompt)
            chosen.append(int(index))
    return chosen


def _table(by: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(TITLES.get(by, by))
    return table


def distributions_table(rows: list[dict], by: str) -> Table:
    """Rows of [`distributions`] for the terminal."""
    table = _table(by, f"scores by {TITLES.get(by, by)}: 10, 50 and 90 %, nats")
    for name in CHEAP_SCORES:
        table.add_column(name, justify="right")
    for row in rows:
        values = (row[name] for name in CHEAP_SCORES)
        table.add_row(in_terminal(row[by]), *("–" if v is None else "{:.2f} {:.2f} {:.2f}".format(*v) for v in values))
    return table


def rates_table(rows: list[dict], by: str) -> Table:
    """Rows of [`rates`] for the terminal."""
    table = _table(by, f"by {TITLES.get(by, by)}")
    for name in ("substitutions", "rewritten", "answers checked", "changed", "4-grams lost"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("substitutions", "rewritten", "checked"))
        table.add_row(in_terminal(row[by]), *counts, _shown(row["changed"]), _shown(row["lost"]))
    return table


def predictors_table(rows: list[dict]) -> Table:
    """Rows of [`predictors`] for the terminal."""
    table = Table(title="what tells a changed answer without a rewrite (held-out prompts)", title_justify="left")
    table.add_column("score")
    for name in ("AUC, changed answer", "rank correlation, lost", "changed among 75 %", "lost among 75 %"):
        table.add_column(name, justify="right")
    for row in rows:
        accepted = (row["changed_among_accepted"], row["lost_among_accepted"])
        shares = ("–" if share is None else f"{share:.3f}" for share in accepted)
        table.add_row(row["score"], _shown(row["auc"]), _shown(row["correlation"]), *shares)
    return table


def correlations_table(names: list[str], matrix: np.ndarray) -> Table:
    """The matrix of [`correlations`] for the terminal."""
    table = Table(title="rank correlation of scores", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, values in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.2f}" if np.isfinite(value) else "–" for value in values))
    return table


def _shown(value: list[float] | None) -> str:
    return "–" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def plot(labels: Labels, path: str | os.PathLike) -> None:
    """
    Distribution of each cheap score by category and by the kind of token that is replaced, and how the share of
    changed answers and of lost 4-grams rises with it, over tenths of the rewritten rows.

    Raises:
        ValueError: If the ending of `path` is no format that matplotlib writes.
    """
    figure = Figure(figsize=(4 * len(CHEAP_SCORES), 10))
    axes = figure.subplots(3, len(CHEAP_SCORES), squeeze=False)
    for column, name in zip(axes.T, CHEAP_SCORES, strict=True):
        values = labels.columns[name]
        usable = np.isfinite(values)
        if not usable.any():
            continue
        edges = np.linspace(*np.quantile(values[usable], [0.01, 0.99]), 40)
        for axis, by in zip(column, ("category", "replaced"), strict=False):
            for value in sorted(set(labels.columns[by])):
                here = usable & (labels.columns[by] == value)
                axis.hist(values[here], edges, histtype="step", density=True, label=in_plot(value))
            axis.set(title=f"{name}, by {TITLES.get(by, by)}", xlabel="nats", ylabel="density")
        for target, among in (("flipped", "changed answers"), ("lost", "4-grams lost")):
            known = usable & np.isfinite(labels.columns[target])
            if known.sum() >= 20:
                parts = np.array_split(np.argsort(values[known]), 10)
                means = [(values[known][part].mean(), labels.columns[target][known][part].mean()) for part in parts]
                column[2].plot(*zip(*means, strict=True), "o-", label=among)
        column[2].set(xlabel=f"{name}, nats", ylabel="share", ylim=(0, 1))
    for axis in axes[:, 0]:
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    path = Path(path)
    with atomic_write(path) as incomplete:
        figure.savefig(incomplete)
