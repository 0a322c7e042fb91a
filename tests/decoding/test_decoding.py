"""Whatever else the caller asks of `generate`: sampling, constraints, outputs, threads, pipelines."""

import contextlib
import copy
import threading

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, WatermarkingConfig, pipeline
from transformers.generation import AssistedCandidateGenerator

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.forward.tap import ForwardTap
from hf_selfjudge.rules import Coin, Lossless, Mismatches, Rule
from tests.builders import VOCAB, build, perturbed, random_judge


NEW = 30  # tokens


class AcceptAll(Rule):
    """Accepts what it is asked about, and notes it."""

    def __init__(self):
        self.seen: list[Mismatches] = []

    def keep(self, mismatches):
        self.seen.append(mismatches)
        return torch.ones_like(mismatches.tokens, dtype=torch.bool)


def constraint(name: str) -> dict:
    """Options of `generate`; every other token of the vocabulary is forbidden where a list is asked for."""
    even = list(range(0, VOCAB, 2))
    return {
        "temperature": {"do_sample": True, "temperature": 1.7},
        "top_k": {"do_sample": True, "top_k": 5},
        "top_p": {"do_sample": True, "top_p": 0.7},
        "min_p": {"do_sample": True, "min_p": 0.2},
        "typical_p": {"do_sample": True, "typical_p": 0.6},
        "eta and epsilon": {"do_sample": True, "eta_cutoff": 0.05, "epsilon_cutoff": 0.02},
        "all warpers": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "renormalize_logits": True},
        "repetition_penalty": {"repetition_penalty": 1.5},
        "repetition_penalty, sampled": {"repetition_penalty": 1.5, "do_sample": True},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[token] for token in even]},
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: even},
        "suppress_tokens": {"suppress_tokens": even},
        "suppress_tokens, sampled": {"suppress_tokens": even, "do_sample": True},
        "begin_suppress_tokens": {"begin_suppress_tokens": even},
        "forced_eos_token_id": {"forced_eos_token_id": 7},
        "sequence_bias": {"sequence_bias": [[[3], 2.0], [[5], -4.0]]},
        "min_new_tokens": {"min_new_tokens": 20, "eos_token_id": even},
        "min_length": {"min_length": 25, "eos_token_id": even},
        "exponential decay": {"exponential_decay_length_penalty": (20, 1.1), "eos_token_id": 7},
        "watermarking": {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=4.0)},
    }[name]


CONSTRAINTS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "eta and epsilon", "all warpers", "repetition_penalty",
    "repetition_penalty, sampled", "no_repeat_ngram_size", "bad_words_ids", "prefix_allowed_tokens_fn",
    "suppress_tokens", "suppress_tokens, sampled", "begin_suppress_tokens", "forced_eos_token_id", "sequence_bias",
    "min_new_tokens", "min_length", "exponential decay", "watermarking",
)  # fmt: skip


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints(llama, prompt, name):
    target, draft = llama
    options = {"max_new_tokens": NEW, "assistant_model": draft, **constraint(name)}
    outputs = []
    for model in (target, JudgedModel(target, Lossless())):
        torch.manual_seed(0)
        outputs.append(model.generate(prompt, **options))
    assert torch.equal(*outputs)
    if not options.get("do_sample"):
        assert torch.equal(outputs[1], target.generate(prompt, max_new_tokens=NEW, **constraint(name)))

    # Nothing that is masked is put to a rule, so nothing masked can be accepted.
    rule = AcceptAll()
    always = JudgedModel(target, rule)
    torch.manual_seed(0)
    output = always.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert rule.seen
    for mismatches in rule.seen:
        assert torch.isfinite(mismatches.final_scores[0, mismatches.tokens[0]])
    if name in ("bad_words_ids", "suppress_tokens", "suppress_tokens, sampled"):
        assert not [token for token in output if token % 2 == 0]
    if name == "prefix_allowed_tokens_fn":
        assert not [token for token in output if token % 2]
    if name == "min_new_tokens":
        assert len(output) >= 20
    assert always.stats.tokens == len(output)


@pytest.mark.parametrize("options", [{}, {"remove_invalid_values": True}, {"do_sample": True, "top_k": 0}])
def test_a_banned_token_that_the_draft_proposes_all_the_same(llama, prompt, monkeypatch, options):
    """A draft may not know of the ban: prompt lookup, another tokenizer."""
    target, draft = llama
    banned = 11
    get_candidates = AssistedCandidateGenerator.get_candidates

    def meddle(self, input_ids, **kwargs):
        ids, logits = get_candidates(self, input_ids, **kwargs)
        if ids.shape[1] > input_ids.shape[1]:
            ids[0, -1] = banned
        return ids, logits

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", meddle)
    judged = JudgedModel(target, AcceptAll())
    for constraint in ({}, {"bad_words_ids": [[banned]]}, {"prefix_allowed_tokens_fn": lambda *_: range(11)}):
        torch.manual_seed(0)
        output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW, **constraint, **options)
        assert (banned in output[0, prompt.shape[1] :]) == (not constraint)


def test_greedy_choice_is_the_watermarked_one(llama, prompt):
    target, draft = llama
    rule = AcceptAll()
    JudgedModel(target, rule).generate(
        prompt, assistant_model=draft, max_new_tokens=NEW, watermarking_config=WatermarkingConfig(bias=4.0)
    )
    assert rule.seen
    for mismatches in rule.seen:
        assert mismatches.final_scores[0].argmax() != mismatches.tokens[0]


def test_the_rule_is_asked_after_a_candidate_that_the_ensemble_kept(llama, prompt):
    target, draft = llama
    asked = []

    class Refuse(Rule):
        def keep(self, mismatches):
            asked.append(mismatches.positions[0])
            return torch.zeros_like(mismatches.tokens, dtype=torch.bool)

    judged = JudgedModel(target, Refuse())
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW, assistant_ensemble_weight=0.5)
    plain = target.generate(prompt, max_new_tokens=NEW)
    assert not torch.equal(output, plain)  # the ensemble kept what the rule refused
    assert len(asked) > judged.stats.rounds - judged.stats.bonus


@pytest.mark.parametrize("do_sample", [False, True])
def test_ensemble_weight(llama, prompt, do_sample):
    target, draft = llama
    options = {"assistant_ensemble_weight": 0.7, "max_new_tokens": NEW, "do_sample": do_sample, "top_k": 0}
    outputs = []
    for model in (target, JudgedModel(target, Lossless())):
        torch.manual_seed(0)
        outputs.append(model.generate(prompt, assistant_model=draft, **options))
    assert torch.equal(*outputs)


@pytest.mark.heavy
def test_a_rejected_position_follows_the_target():
    """The first token of many short samples: where the coin rejects the candidate it is drawn from the target's
    distribution, where the coin accepts it from the draft's (chi-square, 1 in 1,000)."""
    target = build("llama", vocab_size=8)
    with torch.no_grad():
        target.lm_head.weight.mul_(0.25)  # no token too rare for the test
    draft = perturbed(target, noise=0.3)
    draft.generation_config.num_assistant_tokens = 1
    prompt = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        p = target(prompt).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    counts = {True: torch.zeros(8), False: torch.zeros(8)}
    for seed in range(2000):
        coin = Coin(0.5, seed)
        asked: list[Mismatches] = []

        class Spy(Rule):
            def keep(self, mismatches, coin=coin, asked=asked):
                asked.append(mismatches)
                return coin.keep(mismatches)

        output = JudgedModel(target, Spy()).generate(
            prompt, assistant_model=draft, max_new_tokens=2, do_sample=True, top_k=0
        )
        counts[coin.keep(asked[0]).item()][output[0, 4]] += 1
    q = asked[0].draft_logits[0].softmax(-1)
    for kind, expected in ((False, p), (True, q)):
        n = counts[kind].sum()
        assert n > 800
        assert chisquare(counts[kind], expected.double() * n / expected.double().sum()).pvalue > 1e-3
    # The test can tell the two apart.
    assert chisquare(counts[True], p.double() * counts[True].sum() / p.double().sum()).pvalue < 1e-3


# Around it -----------------------------------------------------------------------------------------------------------

RULES = [Lossless(), Coin(0.5), AcceptAll()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_outputs(llama, prompt, rule):
    target, draft = llama
    flags = ("scores", "logits", "hidden_states", "attentions")
    eager = copy.deepcopy(target)
    eager.set_attn_implementation("eager")
    options = {f"output_{flag}": True for flag in flags} | {"return_dict_in_generate": True, "max_new_tokens": NEW}
    output = JudgedModel(eager, rule).generate(prompt, assistant_model=draft, **options)
    assert len(output.scores) == len(output.logits) == NEW
    plain = eager(output.sequences)
    torch.testing.assert_close(
        torch.cat(output.logits), plain.logits[0, prompt.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4
    )
    states = [step[-1] for step in output.hidden_states]
    assert sum(state.shape[1] for state in states) == output.sequences.shape[1] - 1


def test_configs_lengths_and_masks(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, Coin(0.5))
    expected = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    config = GenerationConfig(max_new_tokens=NEW)
    assert torch.equal(judged.generate(prompt, generation_config=config, assistant_model=draft), expected)
    assert torch.equal(judged.generate(prompt, assistant_model=draft, max_length=prompt.shape[1] + NEW), expected)
    assert torch.equal(judged.generate(input_ids=prompt, assistant_model=draft, max_new_tokens=NEW), expected)
    with torch.inference_mode():
        assert torch.equal(judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW), expected)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(prompt)], dim=1)
    for rule in (Lossless(), AcceptAll()):
        judged = JudgedModel(target, rule)
        output = judged.generate(padded, attention_mask=mask, assistant_model=draft, max_new_tokens=NEW)
        expected = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
        assert torch.equal(output[:, 4:], expected)


def test_stopping(llama, prompt, tokenizer):
    target, draft = llama
    free = JudgedModel(target, AcceptAll()).generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    stop = tokenizer.decode(free[0, prompt.shape[1] + 8])
    plain = target.generate(prompt, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer)
    for rule in RULES:
        judged = JudgedModel(target, rule)
        output = judged.generate(
            prompt, assistant_model=draft, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer
        )
        assert judged.stats.tokens == output.shape[1] - prompt.shape[1]
        if isinstance(rule, Lossless):
            assert torch.equal(output, plain)
    assert stop in tokenizer.decode(output[0, prompt.shape[1] :])
    assert output.shape[1] < free.shape[1]


def test_inputs_embeds(llama, prompt):
    target, draft = llama
    embeds = target.get_input_embeddings()(prompt)
    outputs = []
    for model in (target, JudgedModel(target, Lossless())):
        outputs.append(model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=3, max_new_tokens=NEW))
    assert torch.equal(*outputs)
    assert torch.equal(outputs[1], target.generate(inputs_embeds=embeds, max_new_tokens=NEW))


def test_dtypes(llama, prompt):
    """Target and draft in different precision, both ways."""
    for target_type, draft_type in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        target, draft = (copy.deepcopy(m).to(t) for m, t in zip(llama, (target_type, draft_type), strict=True))
        judged = JudgedModel(target, JudgeRule(random_judge(target), 0.5))
        judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
        assert judged.stats.tokens == NEW
        judged = JudgedModel(target, Lossless())
        output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
        assert torch.equal(output, target.generate(prompt, assistant_model=draft, max_new_tokens=NEW))


def test_pipeline(llama, tokenizer):
    target, draft = llama
    judged = JudgedModel(target, AcceptAll())
    pipe = pipeline("text-generation", model=judged, tokenizer=tokenizer, assistant_model=draft)
    (answer,) = pipe("why is it so?", max_new_tokens=NEW, do_sample=False)
    assert answer["generated_text"].startswith("why is it so?")
    assert judged.stats.judged > 0


# Statistics and threads ----------------------------------------------------------------------------------------------


def test_statistics(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, Coin(0.5))
    calls = []
    for length in (7, 20, NEW):
        judged.generate(prompt, assistant_model=draft, max_new_tokens=length)
        calls.append(judged.stats)
    stats, total = judged.stats, judged.total
    assert sum(stats.offered_at) == stats.drafted
    assert sum(stats.kept_at) == stats.matched + stats.judged
    assert all(0 <= share <= 1 for share in stats.acceptance_by_position)
    assert 0 < stats.bonus < stats.target
    assert min(stats.draft_seconds, stats.verify_seconds, stats.rule_seconds) > 0
    assert total.calls == 3
    for name in ("rounds", "drafted", "matched", "asked", "judged", "target", "bonus", "tokens"):
        assert getattr(total, name) == sum(getattr(call, name) for call in calls), name
    assert total.draft_seconds == pytest.approx(sum(call.draft_seconds for call in calls))
    assert sum(total.offered_at) == total.drafted
    assert not total.sources


def test_threads(llama):
    """Eight threads that share target, draft and judge do what they do one after another, each with its own stats."""
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(random_judge(target), 0.5))
    prompts = torch.randint(1, VOCAB, (8, 1, 9), generator=torch.Generator().manual_seed(5))

    def answer(i: int) -> tuple:
        output = judged.generate(prompts[i], assistant_model=draft, max_new_tokens=40 + i)
        stats = judged.stats
        return output.tolist(), stats.sources, stats.rounds, stats.drafted, stats.logprob_given_up

    alone, together, errors = [answer(i) for i in range(8)], [None] * 8, []
    barrier = threading.Barrier(8)

    def work(i: int) -> None:
        barrier.wait()
        with contextlib.suppress(ZeroDivisionError):  # one call fails amid the others
            if i == 3:
                judged.generate(
                    prompts[i], assistant_model=draft, max_new_tokens=40, stopping_criteria=[lambda *_: 1 / 0]
                )
        try:
            together[i] = answer(i)
        except Exception as error:  # raised again by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert together == alone
    assert not target._forward_hooks
    assert not target.lm_head._forward_pre_hooks
    assert judged.total.calls == 16


def test_a_tap_that_leaves_during_a_forward_of_another_thread(prompt):
    """PyTorch goes through the hooks that there were, but has forgotten that they take keyword arguments."""
    target = build("llama")
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def other():
        with ForwardTap(target, lambda hidden, logits, entered: None, target.model.layers[1]):
            entered.set()
            leave.wait(60)
        left.set()

    def meanwhile(module, inputs):
        leave.set()
        assert left.wait(60)

    expected = target(prompt).logits
    target.register_forward_pre_hook(meanwhile)  # before that of the tap
    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    assert torch.equal(target(prompt).logits, expected)
    thread.join()


def test_stats_of_a_call_in_another_thread(llama, prompt):
    """A streaming call runs in a thread of its own; whoever made no call sees its statistics."""
    target, draft = llama
    judged = JudgedModel(target, Lossless())
    thread = threading.Thread(
        target=judged.generate, args=(prompt,), kwargs={"assistant_model": draft, "max_new_tokens": NEW}
    )
    thread.start()
    thread.join()
    assert judged.stats.tokens == NEW
