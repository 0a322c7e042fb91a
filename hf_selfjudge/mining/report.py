"""In: labels and the target's tokenizer. Out: what the labels say, as figures and as tables and text for the terminal:
how often answers change, how well scores predict it, and substitutions in context."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import numpy as np
import pandas
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..scoring.statistics import Interval, among_accepted, auc, bootstrap, rank_correlation
from ..utils.text import INCOMPLETE, in_terminal, pieces
from .label_files import CHEAP_SCORES, both_answers


DRAFT_SCORE = "low log-probability of the draft"
ACCEPTED = 0.75  # share of the rows that a score would accept
CONTEXT = 24  # tokens shown before and after a substitution
RESAMPLES = 1000  # of the bootstrap
# Titles of columns in tables, where the name in the rows is not plain enough.
TITLES = {
    "kind": "kind of substitution",
    "replaced": "token replaced",
    "checked": "answers checked",
    "lost": "4-grams lost",
    "auc": "AUC, changed answer",
    "auc_of_a_label": "AUC of one label for the other",
    "changed_again": "changed again",
    "same_label": "same label",
    "correlation": "rank correlation, lost",
    "changed_among_accepted": "changed among 75 %",
    "lost_among_accepted": "lost among 75 %",
}


def short_columns(labels: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> pandas.DataFrame:
    """What the report needs of labels, with NaN for unknown numbers. Besides columns of `labels` it has `lost`, the
    share of the original suffix's 4-grams that the rewritten one lacks; `replaced`, the [`token_kind`] of the target's
    choice; and [`DRAFT_SCORE`]. `tokenizer` is the target's."""
    numbers = [*CHEAP_SCORES, "changed", "flipped", "reconvergence", "draft_logprob"]
    columns = labels.select_columns(["prompt_id", "category", "kind", "token", *numbers]).to_pandas()
    columns[numbers] = columns[numbers].astype(float)
    columns["lost"] = 1 - columns["reconvergence"]
    columns[DRAFT_SCORE] = -columns["draft_logprob"]
    kinds = {token: token_kind(tokenizer.decode([token])) for token in columns["token"].unique().tolist()}
    columns["replaced"] = columns["token"].map(kinds)
    return columns


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


def change_rates(columns: pandas.DataFrame, by: str, resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """
    How often rewritten answers changed, for each value of one of the [`short_columns`] (`category`, `kind`, …).

    Returns:
        `list[dict]` with the value; the number of `substitutions`, of those `rewritten`, and of those `checked` by
        final answer or tests; the share of `changed` answers among the checked; and the mean `lost` among the
        rewritten. The last two are [`Interval`]s (bootstrap over prompts), or `None` where there are no rows.
    """
    result = []
    for value, rows in columns.groupby(by):
        rewritten, checked = rows[rows["changed"].notna()], rows[rows["flipped"].notna()]
        counts = {"substitutions": len(rows), "rewritten": len(rewritten), "checked": len(checked)}
        changed = interval(np.mean, checked, ["flipped"], resamples, seed)
        lost = interval(np.mean, rewritten, ["lost"], resamples, seed)
        result.append({by: value, **counts, "changed": changed, "lost": lost})
    return result


def score_predictions(columns: pandas.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """
    How well each score that needs no rewrite predicts what the rewrite did.

    Returns:
        `list[dict]` with the name of the `score`; its `auc` for a changed answer and its rank `correlation` with the
        share of 4-grams lost, as [`Interval`]s or `None`; and the share of changed answers and of 4-grams lost among
        the 75 % of rows that it would accept. Empty if nothing was rewritten.
    """
    rewritten, result = columns[columns["changed"].notna()], []
    for score in (*CHEAP_SCORES, DRAFT_SCORE) if len(rewritten) else ():
        scored = rewritten[np.isfinite(rewritten[score])]
        checked = scored[scored["flipped"].notna()]
        result.append(
            {
                "score": score,
                "auc": interval(auc, checked, ["flipped", score], resamples, seed),
                "correlation": interval(rank_correlation, scored, ["lost", score], resamples, seed),
                "changed_among_accepted": among_accepted(checked["flipped"], checked[score], ACCEPTED),
                "lost_among_accepted": among_accepted(scored["lost"], scored[score], ACCEPTED),
            }
        )
    return result


def interval(
    measure: Callable[..., float], rows: pandas.DataFrame, names: list[str], resamples: int, seed: int
) -> Interval | None:
    """A measure of some columns, with its interval over the prompts in `prompt_id`; `None` where there are no rows."""
    prompts, *values = (rows[name].to_numpy() for name in ("prompt_id", *names))
    return bootstrap(measure, tuple(values), prompts, resamples, seed)


def as_table(rows: list[dict], title: str) -> Table:
    """Rows of [`change_rates`], [`score_predictions`] or [`agreement`](ceiling.py), at least one, for the terminal."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(TITLES.get(name, name), justify="right" if number else "left")
    for row in rows:
        first, *figures = row.values()
        shown = ("–" if x is None else format(x, "," if isinstance(x, int) else ".3f") for x in figures)
        table.add_row(in_terminal(first), *shown)
    return table


def examples(columns: pandas.DataFrame, harmful: bool, count: int, seed: int) -> list[int]:
    """Numbers of random rows to show, each of another prompt: where the answer changed (or most of its wording was
    lost), or where it did not."""
    label = columns["changed"]
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(label >= 0.8 if harmful else label <= 0.2))
    return columns.iloc[rows].drop_duplicates("prompt_id").index[:count].tolist()


def in_context(row: dict, tokenizer: PreTrainedTokenizerBase) -> Text:
    """A rewritten substitution: the text before it, both tokens, and how each answer goes on."""
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
