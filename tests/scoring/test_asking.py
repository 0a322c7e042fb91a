"""What the target says of answers when it is asked, on tiny random models in fp32."""

from functools import partial

import pytest
import torch

from hf_selfjudge.data.prompts import Prompt, encode
from hf_selfjudge.forward.lockstep import run_in_lockstep
from hf_selfjudge.scoring.asking import ABOUT, REPLY, Asked, differing
from hf_selfjudge.scoring.checks import CheckedAnswer, check_of
from tests.builders import greedy


QUESTIONS = ["Why?", "Why not?", "How many are there?"]


def test_differing_passages():
    words = " ".join(f"w{i}" for i in range(60))
    assert differing(words, words) == (" ".join(words.split()[-12:]),) * 2
    first, second = differing(f"{words} is red {words}", f"{words} looks red {words}")
    assert first.split() == [*words.split()[-12:], "is", "red", *words.split()[:11]]
    assert second.split()[12] == "looks"
    assert differing("a b", "c d") == ("a b", "c d")
    assert differing("", "c d") == ("", "c d")


def test_the_target_is_asked(llama, tokenizer):
    """Its probability of "no" against "yes", whichever way they are spelt; none if the question is too long."""
    target, _ = llama
    target.config.max_position_embeddings = 2048
    no = Asked(target, tokenizer).says_no("why?", "it is so", "it is not so")
    target.config.max_position_embeddings = 256
    assert 0 < no < 1
    head = target.get_output_embeddings()
    bias = torch.zeros(64)
    bias[tokenizer.encode("n")[0]] = 100.0  # one token a character: the first tells
    head.bias = torch.nn.Parameter(bias)
    target.config.max_position_embeddings = 2048
    sure = Asked(target, tokenizer).says_no("why?", "it is so", "it is not so")
    target.config.max_position_embeddings = 256
    head.bias = None
    assert sure > 0.999
    assert Asked(target, tokenizer).says_no("why?" * 100, "it is so", "it is not so") is None


@torch.no_grad()
@pytest.mark.parametrize("side_by_side", [False, True])
def test_replies_are_those_of_each_question_alone(llama, tokenizer, monkeypatch, side_by_side):
    target, _ = llama
    monkeypatch.setattr(target.config, "max_position_embeddings", 4096)
    texts = ["it is so", "it is not so at all"]

    def alone(text, question):
        ids = encode(tokenizer, ABOUT.format(text=text, question=question), None, 0)
        return tokenizer.decode(greedy(target, ids[0], REPLY), skip_special_tokens=True)

    def replies(model, text):
        return Asked(model, tokenizer).replies(text, QUESTIONS)

    if side_by_side:
        found = run_in_lockstep([target], [partial(replies, text=text) for text in texts])
    else:
        found = [replies(target, text) for text in texts]
    assert found == [tuple(alone(text, question) for question in QUESTIONS) for text in texts]
    assert len({*found[0], *found[1]}) > 1


def test_replies_are_kept(llama, tokenizer, monkeypatch):
    target, _ = llama
    monkeypatch.setattr(target.config, "max_position_embeddings", 4096)
    asked = Asked(target, tokenizer)
    first = asked.replies("it is so", QUESTIONS)
    monkeypatch.setattr(asked, "_reply", None)
    assert asked.replies("it is so", QUESTIONS) == first


def test_there_is_no_reply_to_a_text_that_is_too_long(llama, tokenizer):
    assert Asked(llama[0], tokenizer).replies("it is so" * 100, QUESTIONS) is None


SEEN = {
    "red and big": ("Answer: Red.", "Answer: big"),
    "red": ("Answer: the red", "Answer: unknown"),
    "blue": ("?", ""),
}


@pytest.mark.parametrize(
    ("own", "text", "finished", "unchanged", "score"),
    [
        ("red and big", "red and big", True, True, 1.0),
        ("red and big", "red", True, False, 0.5),
        ("red", "red and big", True, False, 1.0),
        ("red", "red", False, False, 0.0),
        ("red", "blue", True, False, 0.0),  # a reply has no final answer
        ("blue", "red", True, None, 0.5),
        ("red", "white", True, False, 0.0),  # too long to be asked about
    ],
)
def test_the_result_is_what_is_replied(own, text, finished, unchanged, score):
    prompt = Prompt("p", "?", check="questions", questions=["Colour?", "Size?"], references=["red", "Big"])
    check = check_of(prompt, False, lambda text, questions: SEEN.get(text) if questions == prompt.questions else 1 / 0)
    answers = CheckedAnswer(own, True), CheckedAnswer(text, finished)
    assert check.unchanged(prompt, *answers) is unchanged
    known = finished and "blue" not in (own, text) and text != "white"
    assert check.same(prompt, *answers) is (unchanged if known else None)
    assert check.score(prompt, answers[1]) == score


def test_without_one_to_ask_nothing_is_known():
    prompt = Prompt("p", "?", check="questions", questions=["Colour?"], references=["red"])
    check, answer = check_of(prompt, True), CheckedAnswer("red", True)
    assert (check.same(prompt, answer, answer), check.score(prompt, answer)) == (None, None)
    assert check.unchanged(prompt, answer, answer) is None
