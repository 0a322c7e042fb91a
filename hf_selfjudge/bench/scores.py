"""How good the answers of a bench are, by several measures.

In: [`AnswerRecord`]s and their prompts. Out: a [`Grid`] with every measure of every answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.meaning import reconvergence, repetition, says_no, similarity
from ..utils.files import JsonlLog
from .answers import AnswerRecord
from .methods import Method
from .tradeoff import BASE, Grid


@dataclass
class Scorer:
    """
    Every measure of one answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the pair.
        folder (`Path`): Scores that cost a forward are kept there, in `views.jsonl`.
        allow_code (`bool`): Whether code of answers may be run.
        target ([`~transformers.PreTrainedModel`], *optional*): Is asked whether an answer says the same as the
            lossless one: the measure `same`.
        embeddings (`str`, *optional*): A sentence-transformers model for the measure `similarity`.
    """

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    allow_code: bool = False
    target: PreTrainedModel | None = None
    embeddings: str | None = None

    def __post_init__(self):
        self.views = JsonlLog(self.folder / "views.jsonl")
        self.known = {(row["measure"], row["texts"]): row["value"] for row in self.views}

    def scores(self, prompt: Prompt, record: AnswerRecord, lossless: AnswerRecord) -> dict[str, float | None]:
        """Of an answer beside the lossless one; `None` where a measure does not apply."""
        own, text = (self.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in (lossless, record))
        answer, check = CheckedAnswer(text, record.finished), check_of(prompt, self.allow_code)
        unchanged = check.unchanged(prompt, CheckedAnswer(own, lossless.finished), answer)
        scores = {
            "task": check.score(prompt, answer),
            "unchanged": None if unchanged is None else float(unchanged),
            "agreement": reconvergence(lossless.tokens, record.tokens),
            "logprob": record.logprob / max(1, len(record.tokens)),
            "repetition": repetition(record.tokens),
            "length": len(record.tokens) / max(1, len(lossless.tokens)),
            "finished": float(record.finished),
        }
        if self.target is not None:
            different = self._view(
                "same",
                (self.target.config.name_or_path, prompt.text, own, text),
                lambda: 0.0 if text == own else says_no(self.target, self.tokenizer, prompt.text, own, text),
            )
            scores["same"] = None if different is None else 1 - different
        if self.embeddings is not None:
            texts = self.embeddings, own, text
            scores["similarity"] = self._view("similarity", texts, lambda: similarity(*texts))
        return scores

    def _view(self, measure: str, texts: Sequence[str], compute: Callable[[], float | None]) -> float | None:
        key = measure, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = compute()
            self.views.add({"measure": measure, "texts": key[1], "value": self.known[key]})
        return self.known[key]


def grid_of(
    records: Sequence[AnswerRecord], prompts: Sequence[Prompt], methods: Sequence[Method], scorer: Scorer
) -> Grid:
    """Every measure of every answer, with a progress bar. `records` are what [`decode`] returns in mode quality."""
    by_key = {(record.method, record.prompt): record for record in records}
    shape = (len(methods), len(prompts))
    scores: dict[str, np.ndarray] = {}
    tokens, rounds = np.zeros(shape), np.full(shape, np.nan)
    for column, prompt in enumerate(track(prompts, "Measure")):
        for row, method in enumerate(methods):
            record = by_key[method.name, prompt.id]
            tokens[row, column], rounds[row, column] = len(record.tokens), len(record.lengths) or np.nan
            for name, value in scorer.scores(prompt, record, by_key[BASE, prompt.id]).items():
                if value is not None:
                    scores.setdefault(name, np.full(shape, np.nan))[row, column] = value
    names, curves = [method.name for method in methods], [method.curve for method in methods]
    return Grid(names, curves, np.array([prompt.category for prompt in prompts]), tokens, rounds, scores)
