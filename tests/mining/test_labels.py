"""Rows of labels on tiny random models, in fp32."""

import numpy as np
import pytest
import torch

from hf_selfjudge import MiningConfig
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.judge.features import SCALARS, candidate_scalars
from hf_selfjudge.mining import labels as labels_module
from hf_selfjudge.mining.answers import Answer, read_answers, target_answers
from hf_selfjudge.mining.label_files import both_answers
from hf_selfjudge.mining.labels import label_answer, label_rounds, label_row
from hf_selfjudge.mining.rewrites import Continuation
from hf_selfjudge.mining.substitutions import Substitution
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.models.tokens import eos_tokens
from hf_selfjudge.scoring.asking import Asked
from hf_selfjudge.scoring.final_answers import final_number
from tests.builders import VOCAB, greedy


CONFIG = MiningConfig(max_new_tokens=24, top=2, floor=0.0, per_answer=10, rewrites=6, window=5)
PROMPTS = [Prompt("a", "a"), Prompt("b", "b", check="number"), Prompt("c", "c", check="tests", tests="1 / 0")]


def ids_of(count=3):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, VOCAB, (1, 5 + i), generator=generator) for i in range(count)]


def rows_of(target, draft, tokenizer, answer, config=CONFIG):
    with torch.no_grad():
        return label_answer(target, Pair(target, draft, tokenizer), answer, config)


@torch.no_grad()
def test_rows(pair, tokenizer):
    target, draft = pair
    for answer in target_answers(target, PROMPTS, ids_of(), 24):
        rows = rows_of(target, draft, tokenizer, answer)
        assert len(rows) == 10
        assert sum("changed" in row for row in rows) == 6
        mismatches = [row for row in rows if row["kind"] == "mismatch"]  # they go before alternatives
        assert len(mismatches) == min(10, rows[0]["mismatches"])
        assert sum("changed" in row for row in mismatches) == min(6, len(mismatches))
        assert [row["position"] for row in rows] == sorted(row["position"] for row in rows)
        logits = target(answer.ids[None]).logits[0].log_softmax(-1)
        drafted = draft(answer.ids[None]).logits[0].log_softmax(-1)
        for row in rows:
            place = answer.prompt_length + row["position"]
            before, guess = logits[place - 1], drafted[place - 1]
            assert row["token"] == answer.ids[place] != row["substitute"]
            assert row["margin"] == pytest.approx(float(before.max() - before[row["substitute"]]), abs=1e-4)
            assert row["scalars"][SCALARS.index("margin")] == row["margin"] >= 0
            assert row["draft_logprob"] == pytest.approx(float(guess[row["substitute"]]), abs=1e-4)
            kl = float((before.exp() * (before - guess)).sum())
            assert row["kl_target_draft"] == pytest.approx(kl, abs=1e-4)
            assert row["mismatches"] == sum(
                a != b and a not in (0, 1) and b not in (0, 1)
                for a, b in zip(drafted.argmax(-1)[answer.prompt_length - 1 : -1].tolist(), answer.tokens.tolist(),
                                strict=True)
            )  # fmt: skip
            assert len(row["hidden_before"]) == len(row["hidden_after"]) == 32
            assert row["hidden_before"].dtype == np.float16
            suffix = answer.ids[place + 1 :][:5]
            swapped = torch.cat([answer.ids[:place], torch.tensor([row["substitute"]]), suffix])
            after = target(swapped[None]).logits[0, place:-1].log_softmax(-1)
            if not len(suffix):
                assert row["likelihood"] is row["confidence"] is None
                continue
            following = slice(place, place + len(suffix))
            drop = (logits[following] - after).gather(-1, suffix[:, None]).mean()
            assert row["likelihood"] == pytest.approx(float(drop), abs=1e-3)
            assert row["confidence"] == pytest.approx(
                float((logits[following].amax(-1) - after.amax(-1)).mean()), abs=1e-3
            )


def test_packed_and_unpacked_agree(llama, tokenizer, monkeypatch):
    target, draft = llama
    (answer,) = target_answers(target, PROMPTS[:1], ids_of(1), 24)
    packed = rows_of(target, draft, tokenizer, answer)
    monkeypatch.setattr(labels_module, "packs", lambda model: False)
    alone = rows_of(target, draft, tokenizer, answer)
    for a, b in zip(packed, alone, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, (float, np.ndarray)) or key == "scalars":
                np.testing.assert_allclose(value, b[key], atol=2e-3, rtol=1e-2)
            else:
                assert value == b[key], key


def test_labels(llama, tokenizer, monkeypatch):
    """By the final number, by tests if code may run, else by what is left of the wording."""
    target, draft = llama
    monkeypatch.setattr(target.generation_config, "eos_token_id", list(range(40, 64)))
    ends = []
    for allow in (False, True):
        config = MiningConfig(max_new_tokens=40, top=3, floor=0.0, per_answer=40, rewrites=40, allow_code=allow)
        for answer in target_answers(target, PROMPTS, ids_of(), 40):
            for row in rows_of(target, draft, tokenizer, answer, config):
                # Random code fails its tests before and after, which tells nothing.
                ended = answer.prompt.check == "number" and answer.finished and row["rewrite_finished"]
                ends.append(ended)
                answers = both_answers(row | {"answer_ids": answer.tokens.tolist()})
                assert answers[0] == answer.tokens.tolist()
                texts = [tokenizer.decode(ids) for ids in answers]
                known = ended and None not in map(final_number, texts)
                assert (row["flipped"] is not None) == known
                assert row["changed"] == (float(row["flipped"]) if known else 1 - row["reconvergence"])
                assert answers[1][: row["position"]] == answers[0][: row["position"]]
                assert answers[1][row["position"]] == row["substitute"]
                assert row["says_no"] is None
    assert {*ends} == {True, False}


@pytest.mark.parametrize("rounds", [0, 2])
def test_labels_by_what_the_target_replies(llama, tokenizer, monkeypatch, rounds):
    """It is asked once about each text: the answer is compared with all of its rewrites."""
    target, draft = llama
    monkeypatch.setattr(target.generation_config, "eos_token_id", list(range(40, 64)))
    monkeypatch.setattr(target.config, "max_position_embeddings", 4096)
    seen = []

    def reply(self, ids):
        seen.append(ids[0][0].tolist())
        return tuple(f"Answer: {row.shape[1] % 3}" for row in ids)

    monkeypatch.setattr(Asked, "_reply", reply)
    prompt = Prompt("a", "a", check="questions", questions=["Why?", "Who is it?"])
    config = MiningConfig(max_new_tokens=40, top=3, floor=0.0, per_answer=40, rewrites=40, rounds=rounds)
    labels, ended = set(), set()
    for answer in target_answers(target, [prompt] * 3, ids_of(), 40):
        if rounds:
            with torch.no_grad():
                found = label_rounds(target, Pair(target, draft, tokenizer), answer, config)
            rows = [row for _, rows in found for row in rows]
        else:
            rows = rows_of(target, draft, tokenizer, answer, config)
            finished = [answer.finished and row["rewrite_finished"] for row in rows]
            assert [row["flipped"] is not None for row in rows] == finished
        labels |= {row["flipped"] for row in rows}
        ended.add(answer.finished)
        assert len(seen) == len({*map(tuple, seen)})
        seen.clear()
    assert (labels, ended) == ({None, True, False}, {True, False})


class Speller:
    """A tokenizer whose tokens are the words of a list."""

    def __init__(self, *words):
        self.words = words

    def decode(self, tokens, **kwargs):
        return "".join(self.words[token] for token in tokens)


@pytest.mark.parametrize(
    ("check", "words", "flipped"),
    [
        ("number", ("so ", "it is ", "4", "5"), (False, True)),
        ("number", ("so ", "it is ", "4", "4.00"), (False, False)),
        ("number", ("so ", "it is ", "few", "5"), (None, None)),
        ("number", ("so ", "it is ", "4-5", "-5"), (None, None)),
        ("number", ("so ", "it is ", "5", "4-5"), (False, None)),
        ("tests", ("def f(): ", "return ", "4", "5"), (False, True)),
        ("tests", ("def f(): ", "return ", "6", "4"), (False, True)),  # the answer itself is wrong
        ("text", ("so ", "it is ", "4", "5"), (None, None)),
    ],
)
def test_what_a_change_is(check, words, flipped):
    """The answer is words 0, 1, 2; it is rewritten with word 1 again in its place, once the same and once with 3."""
    prompt = Prompt("p", "?", check=check, tests="assert f() == 4" if check == "tests" else None)
    answer = Answer(prompt, torch.tensor([9, 0, 1, 2]), 1, True, True, [], None, None, None, None)
    config = MiningConfig(allow_code=True)
    for end, expected in zip((2, 3), flipped, strict=True):
        new = Continuation(answer, Substitution(1, 1, 1, "mismatch", 0, None), None, None, None, None, [end], True)
        row = label_row(Asked(None, Speller(*words)), new, answer, config)
        assert row["flipped"] is expected
        assert row["changed"] == (float(expected) if expected is not None else float(end == 3))
        assert (row["original_suffix"], row["rewritten_suffix"]) == (None, [end])
    answer.finished = False
    assert label_row(Asked(None, Speller(*words)), new, answer, config)["flipped"] is None


@pytest.mark.parametrize(
    ("words", "flipped"),
    [
        (("```python\n", "def f(): return 4\n", "```\nIt ", "```\nAs "), False),
        (("```python\n", "def f(): return 4\n", "```\nIt ", "f = 5\n```\nAs "), True),
        (("```python\n", "def f(): return 4\n", "# so it ", "```\nAs "), None),
    ],
)
def test_code_that_is_whole_is_tested_though_the_answer_did_not_end(words, flipped):
    prompt = Prompt("p", "?", check="tests", tests="assert f() == 4")
    answer = Answer(prompt, torch.tensor([9, 0, 1, 2]), 1, False, True, [], None, None, None, None)
    new = Continuation(answer, Substitution(1, 1, 1, "mismatch", 0, None), None, None, None, None, [3], False)
    row = label_row(Asked(None, Speller(*words)), new, answer, MiningConfig(allow_code=True))
    assert row["flipped"] is flipped


def test_code_is_labelled_after_the_prompts_imports():
    prompt = Prompt("p", "from math import floor", check="tests", tests="assert f() == 4")
    answer = Answer(prompt, torch.tensor([9, 0, 1, 2]), 1, True, True, [], None, None, None, None)
    words = Speller("def f(): ", "return ", "floor(4.5)", "floor(5)")
    new = Continuation(answer, Substitution(1, 1, 1, "mismatch", 0, None), None, None, None, None, [3], True)
    assert label_row(Asked(None, words), new, answer, MiningConfig(allow_code=True))["flipped"] is True


@torch.no_grad()
def test_text_that_is_not_the_targets_own(pair, tokenizer):
    """Each substitution is compared with how the target continues the text after its own choice."""
    target, draft = pair
    texts = [torch.randint(2, VOCAB, (12,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    eos, differ = eos_tokens(target), 0
    for answer in read_answers(target, PROMPTS, ids_of(), texts):
        for row in rows_of(target, draft, tokenizer, answer):
            place = answer.prompt_length + row["position"]
            assert row["token"] == int(target(answer.ids[None, :place]).logits[0, -1].argmax())
            differ += row["token"] != answer.ids[place]
            # Both tokens in the same place of the same text; what follows is the text's.
            suffix = answer.ids[place + 1 :][:5]
            scores = []
            for token in (row["token"], row["substitute"]):
                swapped = torch.cat([answer.ids[:place], torch.tensor([token]), suffix])
                scores.append(target(swapped[None]).logits[0, place:-1].log_softmax(-1))
            if len(suffix):
                drop = (scores[0] - scores[1]).gather(-1, suffix[:, None]).mean()
                assert row["likelihood"] == pytest.approx(float(drop), abs=1e-3)
                drop = (scores[0].amax(-1) - scores[1].amax(-1)).mean()
                assert row["confidence"] == pytest.approx(float(drop), abs=1e-3)
            if "changed" in row:
                limit = (len(answer.ids) - place - 1) * 5 // 4 + 16
                own = torch.cat([answer.ids[:place], torch.tensor([row["token"]])])
                assert row["original_suffix"] == greedy(target, own, limit)
                whole = [*own[answer.prompt_length :].tolist(), *row["original_suffix"]]
                assert both_answers(row | {"answer_ids": answer.tokens.tolist()})[0] == whole
                assert eos == []
    assert differ > 5


def test_the_target_is_asked(llama, tokenizer, monkeypatch):
    target, draft = llama
    monkeypatch.setattr(target.config, "max_position_embeddings", 4096)
    config = MiningConfig(max_new_tokens=24, top=2, floor=0.0, per_answer=10, rewrites=6, ask=True)
    (answer,) = target_answers(target, PROMPTS[:1], ids_of(1), 24)
    asked = [row["says_no"] for row in rows_of(target, draft, tokenizer, answer, config) if "changed" in row]
    assert len(asked) == 6
    assert all(0 <= value <= 1 for value in asked)


def test_scalars_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    after = torch.log(torch.tensor([[0.25, 0.75, 0.0]]))
    values = candidate_scalars(logits, torch.tensor([2]), after, torch.tensor([3]))[0]
    entropy = -sum(p * torch.tensor(p).log() for p in (0.5, 0.3, 0.2))
    entropy_after = -sum(p * torch.tensor(p).log() for p in (0.25, 0.75))
    expected = [torch.tensor(2.5).log(), torch.tensor(0.2).log(), entropy, torch.tensor(3.0).log(), entropy_after]
    expected += [torch.tensor(0.75).log(), torch.tensor(4.0).log()]
    torch.testing.assert_close(values, torch.stack(expected))
