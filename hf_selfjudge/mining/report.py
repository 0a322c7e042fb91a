"""What mined labels say: rates, scores beside each other, and substitutions in context for a person to judge.

In: labels and the target's tokenizer. Out: tables, a plot, and text with the substitution in it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import datasets
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..scoring.statistics import among_accepted, auc, bootstrap, rank_correlation, shown
from ..utils.files import atomic_write
from ..utils.text import INCOMPLETE, in_plot, in_terminal, pieces
from .label_files import CHEAP_SCORES, both_answers


TITLES = {"replaced": "token replaced", "kind": "kind of substitution"}
REWRITE_SCORES = ("lost", "says_no", "flipped")  # known where the answer was rewritten
ACCEPTED = 0.75  # share of the rows that a score would accept
DECILES = (0.1, 0.5, 0.9)
CONTEXT = 24  # tokens shown before and behind a substitution
RESAMPLES = 1000  # of the bootstrap


@dataclass
class LabelColumns:
    """
    Labels with their short columns in memory.

    Args:
        rows (`datasets.Dataset`): As [`load_labels`] gives them.
        columns (`dict[str, np.ndarray]`): Strings, and numbers with NaN where nothing is known. Beside the columns of
            `rows`: `lost`, the share of the original suffix's 4-grams that the rewritten one has not, and `replaced`,
            the [`token_kind`] of the target's choice.
    """

    rows: datasets.Dataset
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> LabelColumns:
        """
        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        """
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
        """Which rows were rewritten; of shape `(rows,)`."""
        return ~np.isnan(self.columns["changed"])


def token_kind(text: str) -> str:
    """`"number"`, `"punctuation"`, `"space"`, `"function word"`, `"name"` (begins with a capital letter), `"word"`, or
    `"part of a character"`."""
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


def change_rates(labels: LabelColumns, by: str, resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """
    How often rewritten answers changed, for each value of a column (`category`, `kind`, `replaced`, …).

    Args:
        by (`str`): The column.
        resamples (`int`): Bootstrap samples of prompts for the intervals.
        seed (`int`): Of the bootstrap.

    Returns:
        `list[dict]` with the value; the number of `substitutions`, of those `rewritten`, and of those `checked` by
        final number or tests; the share of `changed` answers among the checked; and the mean `lost` among the
        rewritten. The last two are [`Interval`]s, or `None` where there are no rows.
    """
    result, columns = [], labels.columns
    for value in sorted(set(columns[by])):
        here = columns[by] == value
        rewritten, checked = here & labels.rewritten, here & ~np.isnan(columns["flipped"])

        def mean(name: str, among: np.ndarray):
            return bootstrap(np.mean, (columns[name][among],), columns["prompt_id"][among], resamples, seed)

        counts = {"substitutions": here, "rewritten": rewritten, "checked": checked}
        result.append(
            {
                by: str(value),
                **{name: int(rows.sum()) for name, rows in counts.items()},
                "changed": mean("flipped", checked),
                "lost": mean("lost", rewritten),
            }
        )
    return result


def score_quantiles(labels: LabelColumns, by: str) -> list[dict]:
    """The 10, 50 and 90 % quantiles of each cheap score, for each value of a column; nats, or `None`."""
    result = []
    for value in sorted(set(labels.columns[by])):
        row = {by: str(value)}
        for name in CHEAP_SCORES:
            scores = labels.columns[name][labels.columns[by] == value]
            scores = scores[np.isfinite(scores)]
            row[name] = np.quantile(scores, DECILES).tolist() if len(scores) else None
        result.append(row)
    return result


def score_correlations(labels: LabelColumns) -> tuple[list[str], np.ndarray]:
    """Names of scores, and the rank correlation of each two over the rows that have both; of shape `(n, n)`, NaN where
    it is undefined."""
    columns = {name: labels.columns[name] for name in (*CHEAP_SCORES, *REWRITE_SCORES)}
    columns = {name: c for name, c in columns.items() if np.isfinite(c).sum() > 2 and np.nanstd(c) > 0}

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        both = np.isfinite(a) & np.isfinite(b)
        return rank_correlation(a[both], b[both]) if both.sum() > 2 else np.nan

    matrix = [[correlation(a, b) for b in columns.values()] for a in columns.values()]
    return list(columns), np.array(matrix)


def score_predictions(labels: LabelColumns, resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """
    How well each score that needs no rewrite predicts what the rewrite did.

    Args:
        resamples, seed (`int`): As for [`change_rates`].

    Returns:
        `list[dict]` with the name of the `score`; its `auc` for a changed answer and its rank `correlation` with the
        share of 4-grams lost, as [`Interval`]s or `None`; and the share of changed answers and of 4-grams lost among
        the 75 % of rows that it would accept, of those where each is known. Empty if nothing was rewritten.
    """
    columns = {name: values[labels.rewritten] for name, values in labels.columns.items()}
    if not len(columns["changed"]):
        return []
    scores = {name: columns[name] for name in CHEAP_SCORES}
    scores["low log-probability of the draft"] = -columns["draft_logprob"]
    result = []
    for name, score in scores.items():
        usable = np.isfinite(score)
        row = {"score": name}
        for label, measure, key, among in (
            ("flipped", auc, "auc", usable & np.isfinite(columns["flipped"])),
            ("lost", rank_correlation, "correlation", usable),
        ):
            pair, title = (columns[label][among], score[among]), "changed" if label == "flipped" else label
            row[key] = bootstrap(measure, pair, columns["prompt_id"][among], resamples, seed)
            row[f"{title}_among_accepted"] = among_accepted(*pair, ACCEPTED)
        result.append(row)
    return result


def examples(labels: LabelColumns, harmful: bool, count: int, seed: int) -> list[int]:
    """Numbers of rows to show, each of another prompt: where the answer changed (or most of its wording was lost), or
    where it did not."""
    label = labels.columns["changed"]
    rows, prompts = np.flatnonzero(label >= 0.8 if harmful else label <= 0.2), labels.columns["prompt_id"]
    chosen: dict[str, int] = {}
    for index in np.random.default_rng(seed).permutation(rows).tolist():
        chosen.setdefault(prompts[index], index)
    return list(chosen.values())[:count]


def in_context(labels: LabelColumns, index: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """A rewritten substitution: the text before it, both tokens, and how each answer goes on."""
    row = labels.rows[index]
    position, passages = row["position"], []
    for ids in both_answers(row):
        end = min(position + 1 + CONTEXT, len(ids))
        _, *passage, _ = pieces(tokenizer, ids, [max(0, position - CONTEXT), position, position + 1, end, len(ids)])
        passages.append(passage)
    changed = {None: "", True: ", the answer changed", False: ", the answer stayed"}[row["flipped"]]
    title = f"{row['category']}, {row['prompt_id']}: {1 - row['reconvergence']:.0%} lost{changed}\n"
    text = Text().append(in_terminal(title, "bold"))
    text.append(in_terminal(f"  … {passages[0][0]}\n".replace("\n", " "), "dim"))
    for name, style, (_, token, rest) in zip(("target", "other "), ("green", "magenta"), passages, strict=True):
        text.append(f"\n  {name} ").append(in_terminal(token.replace("\n", "⏎"), f"{style} reverse"))
        text.append(in_terminal(rest.replace("\n", "⏎") + " …", style))
    return text.append("\n")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def rates_table(rows: list[dict], by: str) -> Table:
    """Rows of [`change_rates`] for the terminal."""
    name = TITLES.get(by, by)
    table = _table(f"by {name}", name, "substitutions", "rewritten", "answers checked", "changed", "4-grams lost")
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("substitutions", "rewritten", "checked"))
        table.add_row(in_terminal(row[by]), *counts, shown(row["changed"], ".3f"), shown(row["lost"], ".3f"))
    return table


def quantiles_table(rows: list[dict], by: str) -> Table:
    """Rows of [`score_quantiles`] for the terminal."""
    name = TITLES.get(by, by)
    table = _table(f"scores by {name}: 10, 50 and 90 %, nats", name, *CHEAP_SCORES)
    for row in rows:
        values = (row[name] for name in CHEAP_SCORES)
        table.add_row(in_terminal(row[by]), *("–" if v is None else "{:.2f} {:.2f} {:.2f}".format(*v) for v in values))
    return table


def correlations_table(names: list[str], matrix: np.ndarray) -> Table:
    """What [`score_correlations`] returns, for the terminal."""
    table = _table("rank correlation of scores", "", *names)
    for name, values in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.2f}" if np.isfinite(value) else "–" for value in values))
    return table


def predictions_table(rows: list[dict]) -> Table:
    """Rows of [`score_predictions`] for the terminal."""
    columns = ("AUC, changed answer", "rank correlation, lost", "changed among 75 %", "lost among 75 %")
    table = _table("what tells a changed answer without a rewrite", "score", *columns)
    for row in rows:
        accepted = (row["changed_among_accepted"], row["lost_among_accepted"])
        shares = ("–" if share is None else f"{share:.3f}" for share in accepted)
        table.add_row(row["score"], shown(row["auc"], ".3f"), shown(row["correlation"], ".3f"), *shares)
    return table


def plot_scores(labels: LabelColumns, path: str | os.PathLike) -> None:
    """
    Plot the distribution of each cheap score, by category and by the kind of token that is replaced; and below, the
    share of changed answers and of 4-grams lost in each tenth of the rewritten rows, ordered by the score.

    Raises:
        ValueError: If matplotlib writes no files with the ending of `path`.
    """
    figure = Figure(figsize=(4 * len(CHEAP_SCORES), 10))
    axes = figure.subplots(3, len(CHEAP_SCORES), squeeze=False)
    for column, name in zip(axes.T, CHEAP_SCORES, strict=True):
        scores = labels.columns[name]
        usable = np.isfinite(scores)
        if not usable.any():
            continue
        edges = np.linspace(*np.quantile(scores[usable], [0.01, 0.99]), 40)
        for axis, by in zip(column, ("category", "replaced"), strict=False):
            for value in sorted(set(labels.columns[by])):
                here = usable & (labels.columns[by] == value)
                axis.hist(scores[here], edges, histtype="step", density=True, label=in_plot(value))
            axis.set(title=f"{name}, by {TITLES.get(by, by)}", xlabel="nats", ylabel="density")
        for label, title in (("flipped", "changed answers"), ("lost", "4-grams lost")):
            known = usable & np.isfinite(labels.columns[label])
            if known.sum() >= 20:
                parts = np.array_split(np.argsort(scores[known]), 10)
                means = [(scores[known][part].mean(), labels.columns[label][known][part].mean()) for part in parts]
                column[2].plot(*zip(*means, strict=True), "o-", label=title)
        column[2].set(xlabel=f"{name}, nats", ylabel="share", ylim=(0, 1))
    for axis in axes[:, 0]:
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    with atomic_write(path) as incomplete:
        figure.savefig(incomplete)
