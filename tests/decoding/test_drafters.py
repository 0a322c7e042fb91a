"""Every candidate generator of transformers, and the length of drafts."""

import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import AssistedCandidateGenerator, MinLengthLogitsProcessor

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.auto_length import AutoLength
from hf_selfjudge.rules import Coin, Lossless
from tests.builders import VOCAB, perturbed
from tests.drafters import DRAFTERS, dflash, other_tokenizer


NEW = 24  # tokens


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_every_drafter(llama, tokenizer, drafter, do_sample, monkeypatch):
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    outputs, stats = [], []
    for rule in (None, Lossless(), Coin(1.0)):
        # Built anew each time: sampling from a draft with another tokenizer prunes the draft.
        target, options = drafter(llama[0], tokenizer, monkeypatch)
        model = target if rule is None else JudgedModel(target, rule)
        torch.manual_seed(0)
        outputs.append(
            model.generate(ids, **options, max_new_tokens=NEW, do_sample=do_sample, top_k=0, pad_token_id=0)
        )
        stats.append(None if rule is None else model.stats)
    stock, never, always = outputs
    # (Sampling from a draft with another tokenizer, transformers does not repeat itself under one seed: these are then
    # three texts, and what one of them has more of is chance.)
    if not (drafter is other_tokenizer and do_sample):
        assert torch.equal(stock, never)
        assert do_sample or torch.equal(never, target.generate(ids, max_new_tokens=NEW, pad_token_id=0))
        assert stats[2].judged > 0
        assert stats[2].tokens_per_round >= stats[1].tokens_per_round
    assert stats[1].judged == 0
    assert stats[1].drafted > 0
    assert stats[1].tokens == never.shape[1] - ids.shape[1]
    assert stats[2].tokens == always.shape[1] - ids.shape[1]


def test_stateful_targets_are_refused_before_the_first_token():
    config = AutoConfig.for_model("mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    target = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="not supported with stateful models, such as MambaForCausalLM"):
        JudgedModel(target, Lossless()).generate(torch.ones(1, 4, dtype=torch.long), prompt_lookup_num_tokens=3)


# The draft without the preparations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize("confidence", [0.0, 0.6])
@pytest.mark.parametrize("minimum", [None, 100])
def test_drafts_are_those_of_transformers(pair, prompt, do_sample, confidence, minimum, monkeypatch):
    """Same candidates and logits, round for round, also where the draft stops on low confidence, and where its own
    config has a least length, which is the target's to choose."""
    target, draft = pair[0], perturbed(pair[0])
    draft.generation_config.assistant_confidence_threshold = confidence
    draft.generation_config.min_length = minimum
    # Greedy text comes to this end token after some rounds.
    end = None if do_sample else int(target.generate(prompt, max_new_tokens=NEW)[0, -1])
    seen: list[list] = [[], []]
    get_candidates = AssistedCandidateGenerator.get_candidates
    for run, model in zip(seen, (target, JudgedModel(target, Lossless())), strict=True):

        def spy(self, input_ids, run=run, **kwargs):
            run.append(get_candidates(self, input_ids, **kwargs))
            return run[-1]

        monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", spy)
        torch.manual_seed(0)
        model.generate(
            prompt, assistant_model=draft, max_new_tokens=NEW, do_sample=do_sample, top_k=0, eos_token_id=end
        )
    assert len(seen[0]) == len(seen[1])
    for (ids, logits), (fast_ids, fast_logits) in zip(*seen, strict=True):
        assert torch.equal(ids, fast_ids)
        if logits is not None:
            torch.testing.assert_close(logits, fast_logits, atol=1e-4, rtol=1e-4)


def test_generate_of_the_draft_runs_once(llama, prompt, monkeypatch):
    target, draft = llama
    calls = []
    generate = type(draft).generate
    monkeypatch.setattr(type(draft), "generate", lambda self, *a, **k: calls.append(self) or generate(self, *a, **k))
    judged = JudgedModel(target, Lossless())
    judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    assert judged.stats.rounds > 3
    assert sum(model is draft for model in calls) == 1


def test_drafting_asks_no_processor_that_changes_nothing(llama, prompt, monkeypatch):
    target, draft = llama
    monkeypatch.setattr(MinLengthLogitsProcessor, "__call__", lambda *arguments: pytest.fail("was asked"))
    JudgedModel(target, Lossless()).generate(prompt, assistant_model=draft, max_new_tokens=NEW, eos_token_id=0)


def test_nothing_outlives_a_call(llama, prompt, monkeypatch):
    """Caches go when the call ends, not at the next garbage collection."""
    target, draft = llama
    generators = []
    get_candidates = AssistedCandidateGenerator.get_candidates

    def spy(self, input_ids, **kwargs):
        generators.append(weakref.ref(self))
        return get_candidates(self, input_ids, **kwargs)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", spy)
    gc.collect()
    gc.disable()
    try:
        JudgedModel(target, Lossless(), "auto").generate(prompt, assistant_model=draft, max_new_tokens=NEW)
        assert generators
        assert generators[0]() is None
    finally:
        gc.enable()


def test_early_exit_leaves_the_config_alone(llama, prompt):
    target, _ = llama

    def fail_while_drafting(ids, scores):
        if ids.shape[1] > prompt.shape[1] + 2:
            1 / 0  # noqa: B018
        return scores

    with pytest.raises(ZeroDivisionError):
        JudgedModel(target, Lossless()).generate(
            prompt, assistant_early_exit=1, max_new_tokens=NEW, logits_processor=[fail_while_drafting]
        )
    assert target.config.num_hidden_layers == 2


# Draft length --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 8])
def test_fixed_length(llama, prompt, length):
    target, draft = llama
    judged = JudgedModel(target, Lossless(), draft_length=length)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=NEW))
    assert len(judged.stats.offered_at) == length
    assert draft.generation_config.num_assistant_tokens == 5


def test_auto_length_is_lossless_too(llama, prompt):
    target, draft = llama
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        judged = JudgedModel(target, Lossless(), draft_length="auto")
        output = judged.generate(prompt.repeat(1, 3), max_new_tokens=60, **options)
        assert torch.equal(output, target.generate(prompt.repeat(1, 3), max_new_tokens=60))


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("length", [3, "auto"])
@pytest.mark.filterwarnings("error:Unfeasible length")
def test_length_with_a_minimum_and_transformers_own_schedules(llama, prompt, length, schedule):
    target, _ = llama
    draft = perturbed(target, noise=0.005)
    draft.generation_config.assistant_confidence_threshold = 0.4
    draft.generation_config.num_assistant_tokens_schedule = schedule
    options = {"max_new_tokens": 60, "min_new_tokens": 20, "eos_token_id": 7}
    judged = JudgedModel(target, Lossless(), draft_length=length)
    output = judged.generate(prompt, assistant_model=draft, **options)
    assert torch.equal(output, target.generate(prompt, **options))
    assert len(judged.stats.offered_at) <= (3 if length == 3 else AutoLength.longest)
    assert draft.generation_config.num_assistant_tokens == 5


def test_length_of_drafts_that_have_their_own(llama, tokenizer, prompt, monkeypatch):
    target, options = dflash(llama[0], tokenizer, monkeypatch)
    with pytest.raises(ValueError, match="`draft_length` cannot be set for DFlashTokenCandidateGenerator"):
        JudgedModel(target, Lossless(), draft_length=3).generate(prompt, max_new_tokens=NEW, **options)


def test_heuristic_schedule_is_kept_as_transformers_keeps_it(llama, prompt):
    target, draft = llama
    lengths = []
    for model in (target, JudgedModel(target, Lossless())):
        draft = perturbed(target, noise=0.0)
        draft.generation_config.num_assistant_tokens_schedule = "heuristic"
        model.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
        lengths.append(draft.generation_config.num_assistant_tokens)
    assert lengths[0] == lengths[1] != 5
