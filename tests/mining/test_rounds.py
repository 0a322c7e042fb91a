"""Rounds in an answer against judged decoding by stock `generate`, in fp32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_selfjudge import JudgedModel, MiningConfig, mine
from hf_selfjudge.judge.features import SCALARS, STATES
from hf_selfjudge.mining import labels as labels_module
from hf_selfjudge.mining.answers import target_answers
from hf_selfjudge.mining.label_files import both_answers, load_answers
from hf_selfjudge.mining.labels import label_rounds
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import Rule
from tests.builders import MINING, PROMPTS, build, perturbed


CONFIG = MiningConfig(max_new_tokens=24, rounds=50, round_length=6, window=3, forward_tokens=48)


class Keep(Rule):
    """Accepts chosen tokens at chosen places, and notes what it was asked."""

    special_tokens = ()

    def __init__(self, *kept):
        self.kept, self.asked, self.states = kept, [], {}

    def keep(self, mismatches):
        places = [*zip(mismatches.positions.tolist(), mismatches.tokens.tolist(), strict=True)]
        kept = [place in self.kept for place in places]
        self.asked += places[: [*kept, False].index(False) + 1]
        self.states |= zip([(places[0], place) for place in places], mismatches.hidden.half().numpy(), strict=True)
        return torch.tensor(kept)


def decode(pair, ids, rule, config):
    draft = {"prompt_lookup_num_tokens": config.lookup} if pair.draft is None else {"assistant_model": pair.draft}
    length = config.lookup or config.round_length
    judged = JudgedModel(pair.target, rule, length, tokenizer=pair.tokenizer)
    return judged.generate(ids, max_new_tokens=40, do_sample=False, **draft)[0, ids.shape[1] :].tolist(), judged.stats


@pytest.fixture(params=["draft model", "prompt lookup"])
def case(request, tokenizer):
    """A pair, a config, and ids of prompts; texts end at many tokens."""
    target = build("llama")
    target.generation_config.eos_token_id = [1, 30, 45]
    ids = torch.randint(2, 12, (3, 24), generator=torch.Generator().manual_seed(4)).split(1)
    if request.param == "prompt lookup":
        return Pair(target, None, tokenizer), replace(CONFIG, lookup=6), ids
    return Pair(target, perturbed(target, 0.02), tokenizer), CONFIG, ids


@torch.no_grad()
def test_each_round_is_what_decoding_meets(case):
    """Its first mismatch is what lossless decoding asks about; with the first ones kept, decoding asks about the next
    one and goes on as the rewrite does."""
    pair, config, all_ids = case
    kept_several = 0
    for answer, ids in zip(target_answers(pair.target, PROMPTS, all_ids, 24), all_ids, strict=True):
        parts = label_rounds(pair.target, pair, answer, config)
        lossless = Keep()
        text, stats = decode(pair, ids, lossless, config)
        assert text[: len(answer.text)] == answer.text
        first = [(rows[0]["position"], rows[0]["substitute"]) for _, rows in parts if rows]
        assert first == [place for place in lossless.asked if place[0] < len(answer.text)]
        for _, rows in parts:
            places = [(row["position"], row["substitute"]) for row in rows]
            for row, place in zip(rows, places, strict=True):
                seen = lossless.states[places[0], place]
                np.testing.assert_allclose([row[name] for name in STATES], seen, atol=2e-3, rtol=1e-2)
        assert first
        assert len(parts) <= stats.rounds
        several = sorted(parts, key=lambda part: -len(part[1]))[:3]
        for number, (round, rows) in enumerate([*several, parts[-1]]):
            row = round.row(answer, number)
            assert row["answer_ids"][: round.start] == answer.text[: round.start]
            assert len(row["answer_ids"]) == round.start + row["drafted"] == len(row["entropies"])
            mismatches = [(r["position"], r["substitute"]) for r in rows]
            for count, label in enumerate(rows, start=1):
                rule = Keep(*mismatches[:count])
                judged, _ = decode(pair, ids, rule, config)
                original, rewritten = both_answers(label | row)
                if count == 1:
                    assert original == answer.text
                length = min(len(judged), len(rewritten))
                assert judged[:length] == rewritten[:length]
                assert {*mismatches[: count + 1]} <= {*rule.asked}
                kept_several += count > 1
            logprobs = pair.target(torch.tensor([ids[0].tolist() + row["answer_ids"]])).logits[0].log_softmax(-1)
            logprobs = logprobs[ids.shape[1] - 1 : -1]
            np.testing.assert_allclose(row["choice_logprobs"], logprobs.amax(-1), atol=2e-3, rtol=1e-2)
            for label in rows:
                before = logprobs[label["position"]]
                assert label["token"] == int(before.argmax())
                margin = float(before.max() - before[label["substitute"]])
                assert label["scalars"][SCALARS.index("margin")] == pytest.approx(margin, abs=1e-3)
    assert kept_several or pair.draft is None


def test_rounds_are_written_beside_their_answers(llama, tokenizer, tmp_path):
    config = replace(MINING, max_new_tokens=32, rounds=2, round_length=6)
    rows = mine(Pair(*llama, tokenizer), PROMPTS, config, tmp_path / "labels")
    answers = load_answers(tmp_path / "labels").to_pylist()
    assert len({answer["answer"] for answer in answers}) == len(answers) == 9
    for answer in answers:
        assert answer["own"] == (answer["answer"] % 3 == 0) == (answer["drafted"] is None)
        assert len(answer["choice_logprobs"]) == len(answer["entropies"]) == len(answer["answer_ids"])
    rounds = {answer["answer"]: answer for answer in answers if answer["drafted"] is not None}
    assert {*rows["answer"]} <= {*rounds}
    for row in rows:
        assert row["answer_ids"] == rounds[row["answer"]]["answer_ids"]
        assert row["answer_ids"][row["position"]] == row["substitute"]
        assert row["position"] >= len(row["answer_ids"]) - row["drafted"]
    # The same rounds again, whatever is computed together.
    again = mine(Pair(*llama, tokenizer), PROMPTS, replace(config, answers_at_once=1), tmp_path / "again")
    columns = ["answer", "position", "token", "substitute", "answer_ids", "rewritten_suffix", "changed"]
    assert rows.select_columns(columns).to_dict() == again.select_columns(columns).to_dict()


@torch.no_grad()
def test_rounds_beyond_the_context_of_the_draft(case):
    """There is no draft any more."""
    pair, config, all_ids = case
    if pair.draft is None:
        pytest.skip("prompt lookup has no context")
    pair.draft.config.max_position_embeddings = 32
    (answer,) = target_answers(pair.target, PROMPTS[:1], all_ids[:1], 24)
    parts = label_rounds(pair.target, pair, answer, config)
    assert {24 + round.start >= 32 for round, _ in parts} == {False, True}
    assert all(not round.tokens and not rows for round, rows in parts if 24 + round.start > 32)


@torch.no_grad()
def test_rounds_end_with_the_context_of_the_target(case):
    pair, config, all_ids = case
    (answer,) = target_answers(pair.target, PROMPTS[:1], all_ids[:1], 24)
    pair.target.config.max_position_embeddings = context = len(answer.ids) + 1
    ends = [24 + round.start + len(round.tokens) for round, _ in label_rounds(pair.target, pair, answer, config)]
    assert max(ends) == context if pair.draft else max(ends) < context


@pytest.mark.parametrize("given", ["answer", "judge"])
def test_rounds_need_the_targets_own_answers(llama, tokenizer, tmp_path, given):
    prompts = [replace(PROMPTS[0], answer="because")] if given == "answer" else PROMPTS
    judged = JudgedModel(llama[0], Keep(), tokenizer=tokenizer) if given == "judge" else None
    with pytest.raises(ValueError, match="`rounds` are those of the target's own answers"):
        mine(Pair(*llama, tokenizer), prompts, replace(MINING, rounds=1), tmp_path, judged=judged)


@torch.no_grad()
def test_packed_and_unpacked_agree(case, monkeypatch):
    pair, config, ids = case
    answers = target_answers(pair.target, PROMPTS, ids, 24)
    packed = [label_rounds(pair.target, pair, answer, config) for answer in answers]
    monkeypatch.setattr(labels_module, "packs", lambda model: False)
    alone = [label_rounds(pair.target, pair, answer, config) for answer in answers]
    for first, second in zip(packed, alone, strict=True):
        for (round, rows), (other, others) in zip(first, second, strict=True):
            assert (round.start, round.tokens, round.choices) == (other.start, other.tokens, other.choices)
            for row, same in zip(rows, others, strict=True):
                for name in ("position", "substitute", "rewritten_suffix", "original_suffix", "round_flipped"):
                    assert row[name] == same[name]
                np.testing.assert_allclose(row["hidden_before"], same["hidden_before"], atol=2e-3, rtol=1e-2)
                np.testing.assert_allclose(row["hidden_after"], same["hidden_after"], atol=2e-3, rtol=1e-2)
