"""How good is an answer? Several views, none of which is enough alone.

In: an answer, its prompt, and the target's own answer. Out: numbers. Whether a number means anything is shown by how
far it tells the target's answers from those of a coin and of the draft (`curve.py`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from ..data.prompts import Prompt
from ..models.load import resolve_model
from .meaning import GRAM, final_number, passes_tests


# Categories of Spec-Bench whose references are scored in a way of their own.
TASKS = {"translation": "chrf", "summarization": "rouge_l", "qa": "contains", "rag": "contains"}
ARTICLES = re.compile(r"\b(a|an|the)\b")


def task_of(prompt: Prompt, allow_code: bool) -> str | None:
    """
    How answers to a prompt can be scored without asking anyone: `"number"` and `"tests"` as the prompt says, else by
    its references: `"chrf"` for the category translation, `"rouge_l"` for summarization, `"contains"` for qa and rag.
    `None` where there is nothing to compare with: MT-Bench's references are one answer of many that are right.
    """
    if prompt.check == "tests":
        return "tests" if allow_code else None
    if not prompt.references:
        return None
    return "number" if prompt.check == "number" else TASKS.get(prompt.category)


def task_score(prompt: Prompt, text: str, finished: bool, allow_code: bool) -> float | None:
    """
    How right an answer is, in [0, 1], by [`task_of`] its prompt; `None` if nothing tells.

    - `number`: whether it ends in the reference's final number. An answer that did not end, or whose number cannot be
      read, has none: 0.
    - `tests`: whether its code passes, behind the imports of the prompt's. It **runs the code** (`sandbox.py`).
    - `contains`: whether one of the references stands in it, without case, articles and punctuation (as SQuAD
      normalises, https://huggingface.co/papers/1606.05250).
    - `rouge_l`: F1 of the longest common subsequence (https://aclanthology.org/W04-1013), words stemmed; the best
      reference.
    - `chrf`: F2 of character 6-grams (https://aclanthology.org/W15-3049); all references.
    """
    task = task_of(prompt, allow_code)
    if task == "number":
        right = {final_number(reference) for reference in prompt.references} - {None}
        return float(finished and final_number(text) in right)
    if task == "tests":
        return float(passes_tests(text, prompt.tests, prompt.said))
    if task == "contains":
        return float(any(_contains(text, right) for right in prompt.references))
    if task == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        score = RougeScorer(["rougeL"], use_stemmer=True).score_multi(prompt.references, text)
        return score["rougeL"].fmeasure
    if task == "chrf":
        from sacrebleu.metrics import CHRF

        return CHRF().sentence_score(text, prompt.references).score / 100
    return None


def unchanged(prompt: Prompt, own: str, own_finished: bool, text: str, finished: bool) -> float | None:
    """
    Whether an answer ends in the same final number as the target's `own`, right or wrong: what a judge's label is,
    where a prompt asks for a number. An answer that did not end, or whose number cannot be read, has none: 0. `None`
    for other prompts, or if `own` has none.
    """
    number = final_number(own) if prompt.check == "number" and own_finished else None
    return None if number is None else float(finished and final_number(text) == number)


def check_tasks(tasks: Sequence[str | None], embeddings: str | None) -> None:
    """
    Fail before the work, not after it.

    Raises:
        ValueError: If a library is missing that one of `tasks` or `embeddings` needs.
        SourceError: If the model for `embeddings` cannot be had.
    """
    needed = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}
    modules = {needed[task] for task in tasks if task in needed}
    modules |= {"sentence_transformers"} if embeddings else set()
    for module in sorted(modules):
        try:
            __import__(module)
        except ImportError as error:
            raise ValueError(f"`prompts` need {module} to be scored: pip install 'hf-selfjudge[bench]'.") from error
    if embeddings:
        resolve_model(embeddings)


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that stood in the answer before, in [0, 1]."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _contains(text: str, right: str) -> bool:
    text, right = (part.lower().translate(str.maketrans("", "", string.punctuation)) for part in (text, right))
    if ARTICLES.sub(" ", right).strip():  # it may be nothing but an article: the letter A
        text, right = (ARTICLES.sub(" ", part) for part in (text, right))
    return f" {' '.join(right.split())} " in f" {' '.join(text.split())} "


@lru_cache(maxsize=1)
def _encoder(model: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(resolve_model(model), device="cpu", model_kwargs={"use_safetensors": True})


def similarity(model: str, first: str, second: str) -> float:
    """Cosine of the sentence embeddings of two texts, by a sentence-transformers model (folder or Hub id)."""
    one, other = _encoder(model).encode([first, second], normalize_embeddings=True)
    return float(one @ other)
