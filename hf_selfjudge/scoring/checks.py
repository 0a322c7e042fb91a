"""The kinds of checks: how answers to a prompt are compared with each other and with references.

In: a prompt and answers to it. Out: whether two answers come to the same result (which is the label where it can be
checked), and how right an answer is. A kind of check is one class and its entry in [`CHECKS`]; its name and the column
that it needs are in `data/rows.py`, where prompts are read.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from ..data.prompts import Prompt
from .codeblocks import has_code
from .meaning import final_number, passes_tests


ARTICLES = re.compile(r"\b(a|an|the)\b")


class CheckedAnswer(NamedTuple):
    """An answer's text, and whether it ended by itself, not at a limit."""

    text: str
    finished: bool


class Check:
    """The base class, to which every result is unknown. It is used for `"tests"` where code must not be run."""

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        """Whether two answers come to the same result; `None` if that is unknown."""
        return None

    def unchanged(self, prompt: Prompt, own: CheckedAnswer, answer: CheckedAnswer) -> bool | None:
        """Whether an answer comes to the result of the target's `own` answer, right or wrong. An answer whose result
        is unknown does not. `None` if the result of `own` is unknown."""
        return None

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        """How right an answer is, in [0, 1]; `None` if nothing tells."""
        return None


class TextCheck(Check):
    """Answers without a result. They are scored by the references of prompts whose category is in
    [`REFERENCE_SCORES`]. MT-Bench's are not: its references are one right answer of many."""

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        if not prompt.references or prompt.category not in REFERENCE_SCORES:
            return None
        return REFERENCE_SCORES[prompt.category].score(answer.text, prompt.references)


class ResultCheck(Check):
    """Answers that have a result, right or wrong. A subclass says which."""

    def result(self, prompt: Prompt, answer: CheckedAnswer) -> Hashable | None:
        """The result of an answer; `None` if it is unknown. Two results that are unknown are not the same."""
        raise NotImplementedError

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        results = [self.result(prompt, answer) for answer in (first, second)]
        return None if None in results else results[0] == results[1]

    def unchanged(self, prompt: Prompt, own: CheckedAnswer, answer: CheckedAnswer) -> bool | None:
        result = self.result(prompt, own)
        return None if result is None else self.result(prompt, answer) == result

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        if not prompt.references:
            return None
        right = {self.result(prompt, CheckedAnswer(reference, True)) for reference in prompt.references} - {None}
        return float(self.result(prompt, answer) in right)


class NumberCheck(ResultCheck):
    """The result is the number that an answer ends in ([`final_number`]). An answer that did not end has none."""

    def result(self, prompt: Prompt, answer: CheckedAnswer) -> Hashable | None:
        return final_number(answer.text) if answer.finished else None


class CodeCheck(Check):
    """Whether an answer's code passes the prompt's tests. It **runs the code** (`sandbox.py`)."""

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        ended = first.finished and second.finished
        if not ended and not (has_code(first.text) and has_code(second.text)):
            return None
        passed = [self._passes(prompt, answer) for answer in (first, second)]
        return passed[0] == passed[1] if any(passed) else None  # two failures may be the same or not

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        return float(self._passes(prompt, answer))

    def _passes(self, prompt: Prompt, answer: CheckedAnswer) -> bool:
        return passes_tests(answer.text, prompt.tests, prompt.conversation)


CHECKS = {"number": NumberCheck(), "tests": CodeCheck(), "text": TextCheck()}


def check_of(prompt: Prompt, allow_code: bool) -> Check:
    """The check of a prompt. Without `allow_code` the tests of prompts are not run, and nothing is known."""
    return Check() if prompt.check == "tests" and not allow_code else CHECKS[prompt.check]


def contains(text: str, references: Sequence[str]) -> float:
    """Whether one of the references stands in an answer, without case, articles and punctuation (as SQuAD normalises,
    https://huggingface.co/papers/1606.05250)."""
    return float(any(_contains(text, reference) for reference in references))


def _contains(text: str, right: str) -> bool:
    text, right = (part.lower().translate(str.maketrans("", "", string.punctuation)) for part in (text, right))
    if ARTICLES.sub(" ", right).strip():  # it may be nothing but an article: the letter A
        text, right = (ARTICLES.sub(" ", part) for part in (text, right))
    return f" {' '.join(right.split())} " in f" {' '.join(text.split())} "


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence (https://aclanthology.org/W04-1013), words stemmed; the best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score_multi(references, text)["rougeL"].fmeasure


def chrf(text: str, references: Sequence[str]) -> float:
    """F2 of character 6-grams (https://aclanthology.org/W15-3049); all references."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(text, references).score / 100


class ReferenceScore(NamedTuple):
    """A score of texts by their references, and the library that it needs."""

    score: Callable[[str, Sequence[str]], float]
    library: str | None = None


# By category of Spec-Bench.
REFERENCE_SCORES = {
    "translation": ReferenceScore(chrf, "sacrebleu"),
    "summarization": ReferenceScore(rouge_l, "rouge_score"),
    "qa": ReferenceScore(contains),
    "rag": ReferenceScore(contains),
}
