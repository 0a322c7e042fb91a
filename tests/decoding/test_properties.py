"""What holds for any prompt, draft length, vocabulary, end of text and rule, looked for at random."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.rules import Coin, Lossless, Margin, TopK
from tests.builders import build, perturbed, random_judge


@lru_cache
def models(vocabulary: int):
    target = build("llama", vocab_size=vocabulary)
    return target, perturbed(target), random_judge(target)


@st.composite
def calls(draw):
    vocabulary = draw(st.sampled_from([3, 17, 64, 200]))
    tokens = st.integers(0, vocabulary - 1)
    return {
        "vocabulary": vocabulary,
        "prompt": torch.tensor([draw(st.lists(tokens, min_size=1, max_size=12))]),
        "eos": draw(st.lists(tokens, max_size=3, unique=True)) or None,
        "new": draw(st.integers(1, 30)),
        "draft_length": draw(st.one_of(st.integers(1, 9), st.just("auto"))),
        "do_sample": draw(st.booleans()),
        "lookup": draw(st.booleans()),
        "threshold": draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])),
        "seed": draw(st.integers(0, 99)),
    }


def generate(model, call):
    torch.manual_seed(call["seed"])
    drafter = {"prompt_lookup_num_tokens": 3} if call["lookup"] else {"assistant_model": models(call["vocabulary"])[1]}
    return model.generate(
        call["prompt"], attention_mask=torch.ones_like(call["prompt"]), eos_token_id=call["eos"], pad_token_id=0,
        max_new_tokens=call["new"], do_sample=call["do_sample"], top_k=0, **drafter,
    )  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(calls())
def test_lossless_is_greedy_decoding(call):
    call["do_sample"] = False
    target, _, judge = models(call["vocabulary"])
    plain = target.generate(
        call["prompt"], attention_mask=torch.ones_like(call["prompt"]), eos_token_id=call["eos"], pad_token_id=0,
        max_new_tokens=call["new"],
    )  # fmt: skip
    for rule in (Lossless(), JudgeRule(judge, 0.0)):
        assert torch.equal(generate(JudgedModel(target, rule, call["draft_length"]), call), plain)


@pytest.mark.heavy
@settings(max_examples=80, deadline=None, derandomize=True)
@given(calls())
def test_lossless_is_stock_under_the_same_seed(call):
    target, _, judge = models(call["vocabulary"])
    stock = generate(target, call)
    for rule in (Lossless(), JudgeRule(judge, 0.0)):
        assert torch.equal(generate(JudgedModel(target, rule), call), stock)


@pytest.mark.heavy
@settings(max_examples=80, deadline=None, derandomize=True)
@given(calls())
def test_counts_and_ends(call):
    target, _, judge = models(call["vocabulary"])
    share = call["threshold"]
    for rule in (JudgeRule(judge, share), Coin(share), Margin(4 * share), TopK(1 + int(4 * share))):
        judged = JudgedModel(target, rule, call["draft_length"])
        output = generate(judged, call)[0, call["prompt"].shape[1] :].tolist()
        stats, eos = judged.stats, call["eos"] or []
        assert stats.tokens == len(stats.sources) == len(output)
        assert 1 <= len(output) <= call["new"]
        assert len(output) == call["new"] or output[-1] in eos
        assert not [token for token in output[:-1] if token in eos]
        assert stats.drafted >= stats.matched + stats.judged
        assert stats.target <= stats.rounds <= stats.tokens
        for token, source in zip(output, stats.sources, strict=True):
            assert source != "judged" or token not in [*eos, 0]
