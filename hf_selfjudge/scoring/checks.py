"""In: a prompt and answers to it. Out: whether two answers have the same result, and how right an answer is.

Each kind of check is an entry in [`CHECKS`]; how final answers are read is in `final_answers.py`, and which column a
kind needs in `data/rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import eq
from typing import NamedTuple

from ..data.prompts import Prompt
from ..models.load import resolve_model
from .codeblocks import has_code
from .final_answers import (
    ARTICLES,
    final_call,
    final_choice,
    final_number,
    final_span,
    final_value,
    has_allowed_call,
    normalised,
)
from .meaning import can_compare, computes_the_same, passes_tests


# A text and questions about it -> the replies, or `None` if there are none.
Reply = Callable[[str, Sequence[str]], Sequence[str] | None]


class CheckedAnswer(NamedTuple):
    """The text of an answer, and whether it ended by itself, not at the limit of tokens."""

    text: str
    finished: bool


class Check:
    """The base class, for which every result is unknown. It is used where code must not be run, or nobody can be
    asked."""

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        """Whether two answers have the same result; `None` if that is unknown."""
        return None

    def unchanged(self, prompt: Prompt, own: CheckedAnswer, answer: CheckedAnswer) -> bool | None:
        """Whether an answer has the result of the target's `own` answer, right or wrong: `False` if only its result
        is unknown, `None` if that of `own` is."""
        return None

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        """How right an answer is, in [0, 1]; `None` if that is unknown."""
        return None


class TextCheck(Check):
    """Answers without a result. They are scored by references if the prompt's category is in [`REFERENCE_SCORES`]:
    those of MT-Bench are not, since each of its references is only one of many right answers."""

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        if not prompt.references or prompt.category not in REFERENCE_SCORES:
            return None
        return REFERENCE_SCORES[prompt.category](answer.text, prompt.references)


@dataclass(frozen=True)
class ResultCheck(Check):
    """
    Answers that end in a final answer, right or wrong. An answer that did not end has none.

    Args:
        read (`Callable[[str, Prompt], Hashable | None]`): The final answer of a text; `None` if there is none. Two
            that are unknown are not the same.
        is_right (`Callable[[str, str, Prompt], bool]`, *optional*): Whether a text has the final answer of a
            reference. By default both are read, the reference as the text of an answer.
    """

    read: Callable[[str, Prompt], Hashable | None]
    is_right: Callable[[str, str, Prompt], bool] | None = None

    def result(self, prompt: Prompt, answer: CheckedAnswer) -> Hashable | None:
        """The final answer; `None` if it is unknown."""
        return self.read(answer.text, prompt) if answer.finished else None

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        if (result := self.result(prompt, first)) is None:
            return None
        return None if (other := self.result(prompt, second)) is None else result == other

    def unchanged(self, prompt: Prompt, own: CheckedAnswer, answer: CheckedAnswer) -> bool | None:
        result = self.result(prompt, own)
        return None if result is None else self.result(prompt, answer) == result

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        if not prompt.references:
            return None
        if self.is_right is not None:
            rights = (self.is_right(answer.text, reference, prompt) for reference in prompt.references)
            return float(answer.finished and any(rights))
        result = self.result(prompt, answer)
        return float(result is not None and result in {self.read(each, prompt) for each in prompt.references})


class CodeCheck(Check):
    """Whether an answer's code passes the prompt's tests. Two answers that fail them are the same if they compute the
    same values in them. It **runs the code** (`sandbox.py`)."""

    def same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        ended = first.finished and second.finished
        if not ended and not (has_code(first.text) and has_code(second.text)):
            return None
        return self._same(prompt, first, second)

    def unchanged(self, prompt: Prompt, own: CheckedAnswer, answer: CheckedAnswer) -> bool | None:
        return self._same(prompt, own, answer)

    def _same(self, prompt: Prompt, first: CheckedAnswer, second: CheckedAnswer) -> bool | None:
        passed = [self._passes(prompt, answer) for answer in (first, second)]
        if passed == [False, True] and not can_compare(prompt.tests):
            return None  # of such tests only changes would be known
        if any(passed):
            return all(passed)
        return computes_the_same(first.text, second.text, prompt.tests, prompt.conversation)

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        return float(self._passes(prompt, answer))

    def _passes(self, prompt: Prompt, answer: CheckedAnswer) -> bool:
        return passes_tests(answer.text, prompt.tests, prompt.conversation)


@dataclass(frozen=True)
class QuestionsCheck(ResultCheck):
    """Texts, from each of which the target answers the prompt's questions. What it answers to them is the result."""

    def score(self, prompt: Prompt, answer: CheckedAnswer) -> float | None:
        """Share of the questions that are answered as in the references, of which there is one for each."""
        if not prompt.references:
            return None
        if (result := self.result(prompt, answer)) is None:
            return 0.0
        right = [final_span(f"Answer: {reference}") for reference in prompt.references]
        return sum(map(eq, result, right)) / len(right)


def _marked(read: Callable[[str, Prompt], Hashable | None]) -> ResultCheck:
    """Final answers that stand behind "Answer:" in a text, and alone in a reference."""

    def is_right(text: str, reference: str, prompt: Prompt) -> bool:
        result = read(text, prompt)
        return result is not None and result == read(f"Answer: {reference}", prompt)

    return ResultCheck(read, is_right)


CHECKS = {
    "number": ResultCheck(lambda text, prompt: final_number(text)),
    "choice": _marked(lambda text, prompt: final_choice(text, prompt.text)),
    "span": _marked(lambda text, prompt: final_span(text)),
    "value": _marked(lambda text, prompt: final_value(text)),
    "call": ResultCheck(
        lambda text, prompt: final_call(text), lambda text, reference, prompt: has_allowed_call(text, reference)
    ),
    "tests": CodeCheck(),
    "questions": Check(),  # unless there is one to ask
    "text": TextCheck(),
}


def check_of(prompt: Prompt, allow_code: bool, reply: Reply | None = None) -> Check:
    """The check of a prompt. Without `allow_code` the tests of prompts are not run, and without `reply` questions are
    not answered: then nothing is known."""
    if prompt.check == "questions" and reply is not None:
        return QuestionsCheck(lambda text, prompt: _spans(reply(text, prompt.questions)))
    return Check() if prompt.check == "tests" and not allow_code else CHECKS[prompt.check]


def _spans(replies: Sequence[str] | None) -> tuple[str, ...] | None:
    """The final answers of replies; `None` if one has none."""
    spans = tuple(map(final_span, replies or [""]))
    return None if None in spans else spans


def contains(text: str, references: Sequence[str]) -> float:
    """Whether an answer contains one of the references, without case, articles and punctuation (normalised as in
    SQuAD, https://huggingface.co/papers/1606.05250)."""
    return float(any(_contains(text, reference) for reference in references))


def _contains(text: str, right: str) -> bool:
    right = normalised(right)
    text = normalised(text, keep_articles=ARTICLES.fullmatch(right) is not None)
    return f" {right} " in f" {text} "


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of stemmed words with the best reference
    (https://aclanthology.org/W04-1013)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True).score_multi(references, text)["rougeL"].fmeasure


def chrf(text: str, references: Sequence[str]) -> float:
    """F2 of character 6-grams with all references (https://aclanthology.org/W15-3049)."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(text, references).score / 100


# By category of Spec-Bench.
REFERENCE_SCORES = {"translation": chrf, "summarization": rouge_l, "qa": contains, "rag": contains}


def check_can_score(prompts: Sequence[Prompt], embeddings: str | None) -> None:
    """
    Find what is missing before the work begins.

    Raises:
        ValueError: If a library is missing that scores `prompts` by references, or loads the model `embeddings`.
        SourceError: If that model cannot be found.
    """
    categories = {p.category for p in prompts if p.references and isinstance(CHECKS[p.check], TextCheck)}
    try:
        for category in sorted(categories & REFERENCE_SCORES.keys()):
            REFERENCE_SCORES[category]("text", ["text"])
        if embeddings:
            import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"`prompts` need {error.name} to be scored: pip install 'hf-selfjudge[bench]'.") from error
    if embeddings:
        resolve_model(embeddings)
