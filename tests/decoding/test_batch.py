"""Several prompts at once: each row as if it were alone."""

import gc
from contextvars import ContextVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StoppingCriteria, TextStreamer

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.auto_length import AutoLength
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.forward.lockstep import exchange, run_in_lockstep
from hf_selfjudge.forward.tap import ForwardTap
from hf_selfjudge.rules import Coin, KLGate, LookAhead, Lossless, Margin, TopK
from tests.architectures import KINDS
from tests.architectures import build as build_any
from tests.builders import VOCAB, Collect, build, perturbed, random_judge
from tests.drafters import other_tokenizer


NEW = 16  # tokens
BRIEF = ("llama-greedy", "llama-sample", "gemma3_text-greedy")  # the others are heavy


def cells():
    for kind in ("dense", "sliding window", "mixture of experts", "vision-language"):
        for name in KINDS[kind]:
            for decoding in ("greedy", "sample"):
                cell = f"{name}-{decoding}"
                marks = [] if cell in BRIEF else [pytest.mark.heavy]
                yield pytest.param(kind, name, decoding == "sample", id=cell, marks=marks)


def padded(prompts: list[torch.Tensor], pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch as a tokenizer with `padding_side="left"` gives it."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [torch.cat([prompt.new_full((longest - len(prompt),), pad), prompt]) for prompt in prompts]
    masks = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def prompts_of(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def alone(judged: JudgedModel, prompt: torch.Tensor, seed: int | None, **options) -> list[int]:
    if seed is not None:
        torch.manual_seed(seed)
    return judged.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)[0].tolist()


def rows_of(judged: JudgedModel, prompts: list[torch.Tensor], **options) -> list[list[int]]:
    """The answers of a batch after their prompts, without padding."""
    batch = padded(prompts)
    output = judged.generate(**batch, **options)
    starts = batch["attention_mask"].argmax(-1).tolist()
    lengths = [stats.tokens for stats in judged.stats.rows]
    width = batch["input_ids"].shape[1]
    return [row[start : width + new].tolist() for row, start, new in zip(output, starts, lengths, strict=True)]


@pytest.mark.parametrize(("kind", "name", "do_sample"), cells())
def test_a_row_is_the_same_prompt_alone(kind, name, do_sample):
    target = build_any(kind, name)
    draft = perturbed(target)
    rules = [Lossless(), TopK(3), Margin(1.0), KLGate(0.5), LookAhead(1, 0.0), JudgeRule(random_judge(target), 0.5)]
    for count in (1, 2, 5, 16):
        prompts = prompts_of(count)
        seeds = list(range(count)) if do_sample else None
        for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
            options |= {
                "max_new_tokens": NEW,
                "do_sample": do_sample,
                "top_k": 0,
                "eos_token_id": 7,
                "pad_token_id": 0,
            }
            mine = [rule for rule in rules if "assistant_model" in options or not rule.needs_draft_logits]
            mine = [mine[i % len(mine)] for i in range(count)]
            together = rows_of(JudgedModel(target, Lossless()), prompts, rules=mine, seeds=seeds, **options)
            for i, prompt in enumerate(prompts):
                seed = seeds[i] if do_sample else None
                assert together[i] == alone(JudgedModel(target, mine[i]), prompt, seed, **options), (count, i, mine[i])


@pytest.mark.heavy
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    eos=st.lists(st.integers(1, VOCAB - 1), max_size=12, unique=True),
    new=st.integers(1, 24),
    draft_length=st.one_of(st.none(), st.integers(1, 8), st.just("auto")),
    do_sample=st.booleans(),
)
def test_ragged_rows(lengths, seed, eos, new, draft_length, do_sample):
    target, draft = PAIR
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]
    do_sample = do_sample and draft_length != "auto"  # its lengths follow the clock, and random numbers the lengths
    seeds = [seed + i for i in range(len(prompts))] if do_sample else None
    rule = TopK(2) if draft_length != "auto" else Lossless()
    options = {
        "assistant_model": draft, "max_new_tokens": new, "eos_token_id": eos or None, "pad_token_id": 0,
        "do_sample": do_sample, "top_k": 0,
    }  # fmt: skip
    judged = JudgedModel(target, rule, draft_length)
    together = rows_of(judged, prompts, seeds=seeds, **options)
    assert judged.stats.tokens == sum(stats.tokens for stats in judged.stats.rows)
    for i, prompt in enumerate(prompts):
        assert together[i] == alone(judged, prompt, seeds[i] if do_sample else None, **options)


PAIR = (build("llama"), perturbed(build("llama")))


def test_forwards_are_shared_and_rows_go_their_own_way(llama):
    target, draft = llama
    judged, prompts = JudgedModel(target, Lossless()), prompts_of(8)
    forwards = []
    with ForwardTap(target, lambda hidden, logits: forwards.append(len(logits))):
        judged.generate(**padded(prompts), assistant_model=draft, max_new_tokens=NEW)
    rounds = [stats.rounds for stats in judged.stats.rows]
    assert len(set(rounds)) > 1
    # None waits longer than the slowest takes; the prompts, of 1 to 11 tokens, are read in two forwards.
    assert len(forwards) == max(rounds) + 1
    assert sum(forwards) == sum(rounds)  # those that have ended take no part
    assert judged.stats.calls == 8
    assert judged.total.tokens == judged.stats.tokens == 8 * NEW


def test_processors_criteria_and_limits_see_one_row_without_padding(llama):
    target, draft = llama
    judged, prompts = JudgedModel(target, Margin(1.0)), prompts_of(4)

    class Ends(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] > 13])

    def counts_tokens(ids, scores):
        return scores - ids.shape[1] * (torch.arange(VOCAB) % 3)

    width = max(len(prompt) for prompt in prompts)
    plain = {"assistant_model": draft, "pad_token_id": 0}
    for options in (
        {"repetition_penalty": 1.5, "max_new_tokens": NEW},
        {"no_repeat_ngram_size": 2, "max_new_tokens": NEW},
        {"stopping_criteria": [Ends()], "max_new_tokens": NEW},
        {"logits_processor": [counts_tokens], "max_new_tokens": NEW},
    ):
        together = rows_of(judged, prompts, **plain, **options)
        assert together == [alone(judged, prompt, None, **plain, **options) for prompt in prompts]
    for limit in (
        {"max_length": width + 5},
        {"min_length": width + 3, "max_new_tokens": 9, "eos_token_id": [5, 6, 7]},
    ):
        together = rows_of(judged, prompts, **plain, **limit)
        for row, prompt in zip(together, prompts, strict=True):
            own = {name: n - width + len(prompt) if "length" in name else n for name, n in limit.items()}
            assert row == alone(judged, prompt, None, **plain, **own)
    allowed = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
    together = rows_of(
        judged, prompts, **plain, max_new_tokens=NEW, prefix_allowed_tokens_fn=lambda row, ids: allowed[row]
    )
    for row, prompt, tokens in zip(together, prompts, allowed, strict=True):
        assert set(row[len(prompt) :]) <= set(tokens)


def test_stop_strings(tokenizer):
    target = build("llama", vocab_size=len(tokenizer))
    judged, prompts = JudgedModel(target, Margin(1.0)), [p % len(tokenizer) for p in prompts_of(4)]
    options = {"assistant_model": perturbed(target), "max_new_tokens": 40, "pad_token_id": 0}
    free = rows_of(judged, prompts, **options)
    stop = tokenizer.decode(free[0][len(prompts[0]) + 4])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    together = rows_of(judged, prompts, **options)
    assert together == [alone(judged, prompt, None, **options) for prompt in prompts]
    assert len(together[0]) < len(free[0])


def test_drafts_with_another_tokenizer(tokenizer, monkeypatch):
    target, options = other_tokenizer(None, tokenizer, monkeypatch)
    judged, prompts = JudgedModel(target, Margin(1.0)), [p % len(tokenizer) for p in prompts_of(3)]
    options |= {"max_new_tokens": NEW, "pad_token_id": 0}
    assert rows_of(judged, prompts, **options) == [alone(judged, prompt, None, **options) for prompt in prompts]
    with pytest.raises(ValueError, match="`assistant_tokenizer` cannot be used for a batch"):
        judged.generate(**padded(prompts), **options, do_sample=True)


@pytest.mark.parametrize("kept", [(), ("scores",), ("logits",)])
def test_outputs_that_were_not_requested(llama, kept):
    target, draft = llama
    output = JudgedModel(target, Margin(1.0)).generate(
        **padded(prompts_of(2)), assistant_model=draft, max_new_tokens=5, return_dict_in_generate=True,
        **{f"output_{name}": True for name in kept},
    )  # fmt: skip
    assert {name for name in ("scores", "logits") if output.get(name) is not None} == set(kept)


def test_what_a_config_leaves_open_is_the_targets(prompt):
    target = build("llama")
    target.generation_config.update(pad_token_id=3, eos_token_id=[5, 6, 7, 8, 9], do_sample=True, top_k=0)
    judged, batch = JudgedModel(target, Lossless()), padded(prompts_of(4), pad=3)
    config = target.generation_config.__class__(max_new_tokens=NEW)
    outputs = []
    for options in ({"generation_config": config}, {"max_new_tokens": NEW}):
        torch.manual_seed(0)
        outputs.append(judged.generate(**batch, assistant_model=perturbed(target), **options))
    assert torch.equal(*outputs)
    ended = outputs[0][:, batch["input_ids"].shape[1] :] == 3
    assert [NEW - min(stats.tokens, NEW) for stats in judged.stats.rows] != [0] * 4
    assert ended.any()


WHERE = ContextVar("where", default="lost")
seen_contexts = set()


def note_where(ids, scores):
    seen_contexts.add(WHERE.get())
    return scores


def test_hooks_and_context_are_those_of_the_caller(llama):
    target, draft = llama
    judged, forwards = JudgedModel(target, Lossless()), []
    WHERE.set("here")
    handle = target.register_forward_hook(lambda module, inputs, output: forwards.append(len(output.logits)))
    try:
        judged.generate(
            **padded(prompts_of(3)), assistant_model=draft, max_new_tokens=4,
            logits_processor=[note_where],
        )  # fmt: skip
    finally:
        handle.remove()
    assert seen_contexts == {"here"}
    assert sum(forwards) == judged.stats.rounds


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_follow_the_longest_row(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 24}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    target = build("llama", rope_parameters=rope)
    prompts = [torch.arange(1, 4), torch.arange(1, 27)]
    judged = JudgedModel(target, Lossless())
    options = {"assistant_model": perturbed(target), "max_new_tokens": 8, "pad_token_id": 0}
    assert rows_of(judged, prompts, **options) == [alone(judged, prompt, None, **options) for prompt in prompts]


def test_streamers_and_details(llama):
    target, draft = llama
    judged, prompts = JudgedModel(target, Margin(1.0)), prompts_of(3)

    streamers = [Collect() for _ in prompts]
    output = judged.generate(
        **padded(prompts), assistant_model=draft, max_new_tokens=NEW, eos_token_id=[5, 6, 7, 8], pad_token_id=0,
        streamer=streamers, return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    width = max(len(prompt) for prompt in prompts)
    lengths = [stats.tokens for stats in judged.stats.rows]
    assert output.sequences.shape == (3, width + max(lengths))
    assert len(output.scores) == len(output.logits) == max(lengths)
    for i, (streamer, prompt) in enumerate(zip(streamers, prompts, strict=True)):
        assert streamer.ended
        answer = output.sequences[i, width : width + lengths[i]]
        assert streamer.tokens == [*prompt.tolist(), *answer.tolist()]
        assert not output.sequences[i, width + lengths[i] :].any()
        for step in range(lengths[i]):
            assert output.logits[step][i].argmax() == answer[step] or judged.stats.rows[i].sources[step] == "judged"
        for step in range(lengths[i], max(lengths)):
            assert not output.scores[step][i].any()


def test_one_prompt_under_many_rules(llama, prompt):
    target, draft = llama
    rules = [Lossless(), Coin(0.5), TopK(2), JudgeRule(random_judge(target), 1.0)]
    judged = JudgedModel(target, Lossless())
    output = judged.generate(prompt.expand(4, -1), rules=rules, assistant_model=draft, max_new_tokens=NEW)
    assert torch.equal(output[:1], target.generate(prompt, max_new_tokens=NEW))
    assert judged.stats.rows[0].judged == 0 < judged.stats.rows[3].judged


def test_without_seeds_samples_follow_the_global_seed(llama):
    target, draft = llama
    judged, batch = JudgedModel(target, Lossless()), padded(prompts_of(4))
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(judged.generate(**batch, assistant_model=draft, max_new_tokens=NEW, do_sample=True, top_k=0))
    assert torch.equal(*outputs[:2])
    assert not torch.equal(*outputs[1:])


def test_plain_batches_are_the_targets_own(llama):
    target, _ = llama
    batch = padded(prompts_of(4))
    judged = JudgedModel(target, Lossless())
    options = {"max_new_tokens": NEW, "pad_token_id": 0}
    assert torch.equal(judged.generate(**batch, **options), target.generate(**batch, **options))


def test_options_that_a_batch_refuses(llama):
    target, draft = llama
    judged, batch = JudgedModel(target, Lossless()), padded(prompts_of(3))
    right = {name: tensor.flip(-1) for name, tensor in batch.items()}
    empty = {**batch, "attention_mask": batch["attention_mask"] * torch.tensor([[1], [0], [1]])}
    unmasked = {"input_ids": batch["input_ids"], "pad_token_id": 0}
    unmasked["generation_config"] = judged.target.generation_config.__class__(pad_token_id=0)
    for options, message in (
        (right, "`input_ids` is padded on the right"),
        (empty, "Row 1 of `input_ids` is empty"),
        (unmasked, "`attention_mask` is missing, and a row begins with padding"),
        ({**batch, "attention_mask": batch["attention_mask"][:, 1:]}, "`attention_mask` has shape"),
        ({**batch, "output_hidden_states": True}, "`output_hidden_states` cannot be used for a batch"),
        ({**batch, "num_return_sequences": 2}, "`num_return_sequences` cannot be used for a batch"),
        ({**batch, "token_type_ids": batch["input_ids"]}, "`token_type_ids` cannot be used for a batch"),
        ({**batch, "guidance_scale": 1.5}, "`guidance_scale` cannot be used with a draft"),
        ({**batch, "past_key_values": DynamicCache()}, "`past_key_values` cannot be used for a batch"),
        ({**batch, "assistant_early_exit": 1}, "`assistant_early_exit` cannot be used for a batch"),
        ({**batch, "streamer": TextStreamer(None)}, "`streamer` must be a list with one entry for each of the 3 rows"),
        ({**batch, "rules": [Lossless()]}, "`rules` must be a list with one entry for each of the 3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            judged.generate(**options, assistant_model=draft, max_new_tokens=4)
    with pytest.raises(TypeError, match="`rules` must be a Rule, got int"):
        judged.generate(**batch, assistant_model=draft, rules=[1, 2, 3])


def test_an_exception_in_one_row_ends_all_and_leaves_nothing(llama):
    target, draft = llama
    judged, batch = JudgedModel(target, Lossless()), padded(prompts_of(5))
    before, total = set(vars(target)), judged.total.tokens
    allowed = list(range(VOCAB))

    def fail_in_row_3(row, ids):  # when row 0 has ended
        return [7] if row == 0 else allowed if row != 3 or len(ids) < 14 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        judged.generate(**batch, assistant_model=draft, max_new_tokens=NEW, prefix_allowed_tokens_fn=fail_in_row_3)
    assert set(vars(target)) == before
    assert not target._forward_hooks
    assert not target.lm_head._forward_pre_hooks
    assert judged.total.tokens == total
    assert judged.stats.calls == 0
    judged.generate(**batch, assistant_model=draft, max_new_tokens=NEW)


@pytest.mark.heavy
def test_nothing_is_kept_after_many_batches(llama):
    target, draft = llama
    judged, batch = JudgedModel(target, Margin(1.0)), padded(prompts_of(3))

    def tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()  # what goes only with a garbage collection is kept too long
    try:
        for batches in (1, 1, 198):
            for _ in range(batches):
                judged.generate(**batch, assistant_model=draft, max_new_tokens=4)
            counts.append(tensors())
    finally:
        gc.enable()
    assert counts[1] == counts[2]


def test_calls_that_meet():
    target, _ = PAIR
    ids = torch.tensor([[3, 4, 5]])

    def call(model, name, forwards):
        for _ in range(forwards):
            model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        return exchange(name, "other" if name == "d" else "names")

    calls = [lambda m, n=name, f=f: call(m, n, f) for name, f in (("a", 1), ("b", 1), ("c", 3), ("d", 1))]
    assert run_in_lockstep([target], calls) == [["a", "b"], ["a", "b"], ["c"], ["d"]]
    assert exchange("alone", "names") == ["alone"]


@pytest.mark.parametrize("price", [0.2, 1.0, 3.0])
def test_auto_length_is_one_decision_for_all_rows(price, monkeypatch):
    """Rows draft on together while what they expect in all exceeds the price of one more token."""
    target, draft = PAIR
    asked = []

    def goes_on(self, confidence, goes_on=AutoLength.goes_on):
        decision = goes_on(self, confidence)
        if self.sums[0]:
            asked.append((len(self.confidences), self.reach * self.all_kept / self.all_tested, decision))
        return decision

    monkeypatch.setattr(AutoLength, "goes_on", goes_on)
    monkeypatch.setattr(AutoLength, "_drafts", lambda self, unread: True)
    monkeypatch.setattr(AutoLength, "_speed", lambda self: 1.0)
    monkeypatch.setattr(AutoLength, "_cost", lambda self: price / 4)  # of four rows: the price of a token
    judged = JudgedModel(target, Lossless(), "auto")
    prompts = [torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 5, 8, 9)]
    rows_of(judged, prompts, assistant_model=draft, max_new_tokens=30, do_sample=False)
    turns = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    together = [turn for turn in turns if len(turn) == 4 and len({length for length, _, _ in turn}) == 1]
    assert len(together) > 3
    for turn in together[:3]:  # before the first row ends
        expected = sum(gain for _, gain, _ in turn)
        assert {decision for *_, decision in turn} == {expected > price}
