"""Every measure with an answer that is known."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hf_selfjudge.data import rows
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.scoring.checks import CHECKS, CheckedAnswer, check_can_score, check_of
from hf_selfjudge.scoring.meaning import repetition, similarity


def prompt(category="math_reasoning", check="text", references=None, tests=None):
    return Prompt("1", "question", category, check, tests=tests, references=references)


GSM8K = prompt(check="number", references=["1,000 + 5\n#### 1,005"])


@pytest.mark.parametrize(
    ("asked", "text", "finished", "score"),
    [
        (GSM8K, "So it is $1005.00.", True, 1),
        (GSM8K, "So it is 1006.", True, 0),
        (GSM8K, "It is 1005.", False, 0),
        (GSM8K, "No idea.", True, 0),
        (prompt(check="number", references=["none"]), "No idea.", True, 0),
        (prompt(check="number", references=["10-15"]), "It is 10-15.", True, 0),
        (prompt(check="number", references=["none", "#### 1,000"]), "\\boxed{1{,}000}", True, 1),
        (prompt("qa", references=["A"]), "The answer is A.", True, 1),
        (prompt("qa", references=["A"]), "", True, 0),
        (prompt("rag", references=["George Harrison", "James Ray"]), "Well: the James  Ray!", True, 1),
        (prompt("qa", references=["Ray"]), "James Rayner", True, 0),
        (prompt("qa", references=["The Beatles"]), "By Beatles.", True, 1),
        # Longest common subsequence of 4 words; precision 4/6, recall 4/5.
        (prompt("summarization", references=["police kill the gunman today"]), "the police kill gunman today again",
         True, 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5)),
        (prompt("summarization", references=["x", "He walks"]), "he walked", True, 1),
        (prompt("translation", references=["The cat"]), "The cat", True, 1),
        (prompt("translation", references=["The cat"]), "Ein Hund", True, 0),
        (prompt("mt_bench", references=["an essay"]), "an essay", True, None),
        (prompt("qa"), "anything", True, None),
        (prompt(check="tests", tests="assert f(2) == 4"), "```python\ndef f(x):\n    return x * x\n```", True, 1),
        (prompt(check="tests", tests="assert f(2) == 4"), "```python\ndef f(x):\n    return x\n```", True, 0),
    ],
)  # fmt: skip
def test_task_scores(asked, text, finished, score):
    found = check_of(asked, allow_code=True).score(asked, CheckedAnswer(text, finished))
    assert found == (score if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("check", "own", "own_finished", "text", "finished", "score"),
    [
        ("number", "So it is 4.", True, "4 apples, then.", True, 1.0),
        ("number", "So it is 4.", True, "5", True, 0.0),
        ("number", "So it is 4.", True, "So it is 4", False, 0.0),
        ("number", "So it is 4", False, "4", True, None),
        ("number", "None at all.", True, "4", True, None),
        ("number", "So it is 4.", True, "None at all.", True, 0.0),
        ("number", "So it is 4-5.", True, "So it is 4-5.", True, None),
        ("number", "So it is 15.", True, "So it is 10-15.", True, 0.0),
        ("number", "So it is $4.", True, "\\boxed{4.00}", True, 1.0),
        ("text", "So it is 4.", True, "4", True, None),
    ],
)
def test_unchanged(check, own, own_finished, text, finished, score):
    prompt, answers = Prompt("p", "?", check=check), (CheckedAnswer(own, own_finished), CheckedAnswer(text, finished))
    assert check_of(prompt, allow_code=False).unchanged(prompt, *answers) == score


def test_chrf_by_hand():
    # Characters of "ab" and "ac" share 1 of 2, their one pair is not shared: the mean F2 of both orders.
    asked = prompt("translation", references=["ab"])
    found = check_of(asked, allow_code=False).score(asked, CheckedAnswer("ac", True))
    assert found == pytest.approx((0.5 + 0) / 2)


def test_code_is_run_after_the_imports_of_the_prompt():
    code = "```python\ndef f(x: List[int]):\n    return len(x)\n```"
    asked = Prompt("1", "from typing import List\n\ndef f(x: List[int]):", check="tests", tests="assert f([7]) == 1")
    conversation = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": "?"}]
    later = replace(asked, text="Go.", messages=[*conversation, {"role": "user", "content": "Go."}])
    scores = [
        check_of(each, allow_code=True).score(each, CheckedAnswer(code, True))
        for each in (asked, later, replace(asked, text="Go."))
    ]
    assert scores == [1, 1, 0]


def test_code_is_not_run_unasked():
    asked = prompt("qa", check="tests", tests="assert False", references=["x"])
    check, answer = check_of(asked, allow_code=False), CheckedAnswer("x", True)
    assert (check.score(asked, answer), check.same(asked, answer, answer)) == (None, None)
    assert check.unchanged(asked, answer, answer) is None


PASSES, FAILS = "```python\nx = 2\n```", "```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("check", "first", "second", "same"),
    [
        ("number", ("It is 4.", True), ("4", True), True),
        ("number", ("It is 4.", True), ("5", True), False),
        ("number", ("It is 4.", True), ("4", False), None),
        ("number", ("No idea.", True), ("No idea.", True), None),
        ("tests", (PASSES, True), (FAILS, True), False),
        ("tests", (PASSES, True), (f"So: {PASSES}", True), True),
        ("tests", (FAILS, True), (FAILS, True), True),
        ("tests", (PASSES, False), (FAILS, True), False),  # both have whole code
        ("tests", (PASSES, True), ("```python\nx = 1", False), None),
        ("tests", ("x = 2", True), (PASSES, False), None),  # code without a fence may go on
        ("text", ("a", True), ("a", True), None),
    ],
)
def test_same_result(check, first, second, same):
    asked = Prompt("p", "?", check=check, tests="assert x == 2")
    answers = CheckedAnswer(*first), CheckedAnswer(*second)
    assert check_of(asked, allow_code=True).same(asked, *answers) is same


def test_tests_of_which_only_changes_would_be_known():
    """What failing code computes in them cannot be compared, so that it is never known to be unchanged."""
    asked = Prompt("p", "?", check="tests", tests="def check(y):\n    assert y == 2\ncheck(x)")
    passes, fails = CheckedAnswer(PASSES, True), CheckedAnswer(FAILS, True)
    check = check_of(asked, allow_code=True)
    assert check.same(asked, fails, fails) is check.same(asked, fails, passes) is None
    assert check.same(asked, passes, fails) is False


def test_no_call_may_be_the_right_answer():
    asked = Prompt("p", "?", check="call", references=["[]"])
    scores = [
        CHECKS["call"].score(asked, CheckedAnswer(text, True))
        for text in ("None fits.", '{"name": "f", "arguments": {}}')
    ]
    assert scores == [1, 0]


def test_every_check_is_known_where_prompts_are_read():
    assert list(rows.CHECK_COLUMNS) == [*CHECKS]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    check_can_score([prompt("qa", references=["a"]), prompt("translation"), GSM8K], None)
    check_can_score([prompt("translation", check="number", references=["4"])], None)
    with pytest.raises(ValueError, match="`prompts` need sacrebleu.metrics to be scored: pip install"):
        check_can_score([prompt("translation", references=["a"])], None)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0), ([1, 1, 1], 0), ([1, 2, 3, 4, 5], 0), ([1] * 8, 4 / 5), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("first", "second", "cosine"),
    [("cat", "cat", 1), ("cat", "dog", 0), ("cat dog", "cat", 0.5**0.5), ("cat dog", "dog cat", 1)],
)
def test_similarity(tmp_path, first, second, cosine):
    words = Tokenizer(WordLevel({"cat": 0, "dog": 1}))
    words.pre_tokenizer = Whitespace()
    vectors = StaticEmbedding(words, embedding_weights=2 * np.eye(2))
    SentenceTransformer(modules=[vectors]).save(str(tmp_path))
    assert similarity(str(tmp_path), first, second) == pytest.approx(cosine)
