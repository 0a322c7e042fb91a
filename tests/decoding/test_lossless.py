"""`Lossless()` gives the text of the target alone, token for token and to the end, whatever the caller asks for; or it
is refused before the first token. What it is compared with is plain greedy decoding, not stock assisted generation."""

import copy
import gc
import string
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchEncoding,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.rules import Coin, KLGate, Lossless
from tests.builders import (
    HEADS,
    NO_EOS,
    SIZES,
    VOCAB,
    Collect,
    build,
    perturbed,
    random_judge,
    shortened,
    tiny_tokenizer,
)
from tests.drafters import DRAFTERS, assistant, dflash, mtp, other_tokenizer, prompt_lookup


NEW = 30  # tokens


def new_tokens(output, prompt):
    return output[0, prompt.shape[1] :].tolist()


# Stopping criteria ---------------------------------------------------------------------------------------------------


class Counter(StoppingCriteria):
    """Ends the text when it is asked for the `limit`-th time, and notes what it is asked about."""

    def __init__(self, limit: int):
        self.limit, self.asked, self.scores = limit, [], []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        self.scores.append(None if scores is None else len(scores))
        return torch.full((len(input_ids),), len(self.asked) >= self.limit)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("limit", [1, 2, 7, 11])
def test_criteria_are_asked_about_each_kept_token(llama, tokenizer, drafter, limit, monkeypatch):
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    target, options = drafter(llama[0], tokenizer, monkeypatch)
    plain, ours = Counter(limit), Counter(limit)
    expected = target.generate(ids, max_new_tokens=NEW, stopping_criteria=[plain])
    judged = JudgedModel(target, Lossless())
    output = judged.generate(ids, max_new_tokens=NEW, stopping_criteria=[ours], **options)
    assert torch.equal(output, expected)
    assert ours.asked == plain.asked == list(range(ids.shape[1] + 1, ids.shape[1] + limit + 1))
    assert judged.stats.tokens == len(judged.stats.sources) == limit


@pytest.mark.parametrize("draft_length", [None, 5, "auto"])
@pytest.mark.parametrize("drafter", [assistant, prompt_lookup], ids=lambda d: d.__name__)
def test_stop_strings_end_the_text_where_they_end(llama, tokenizer, drafter, draft_length, monkeypatch):
    """Every character of the answer in turn is a stop string, also two at once; alone, streamed and in a batch."""
    target, options = drafter(llama[0], tokenizer, monkeypatch)
    if "assistant_model" in options:
        options["assistant_model"] = perturbed(target, noise=0.0)  # long accepted blocks
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    free = tokenizer.decode(target.generate(ids, max_new_tokens=NEW)[0, ids.shape[1] :])
    judged = JudgedModel(target, Lossless(), draft_length)
    for stop in {free[place : place + 2] for place in range(0, len(free), 3)}:
        how = {"max_new_tokens": NEW, "stop_strings": [stop], "tokenizer": tokenizer}
        expected = target.generate(ids, **how)
        streamer = Collect()
        assert torch.equal(judged.generate(ids, **how, **options, streamer=streamer), expected)
        assert streamer.tokens == expected[0].tolist()
        assert streamer.ended
        batch = judged.generate(torch.cat([ids, ids]), **how, **options, pad_token_id=0)
        assert torch.equal(batch, expected.repeat(2, 1))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_everything_that_is_returned_ends_with_the_text(pair, prompt, do_sample):
    """Scores, logits, states and the cache; also a cache with a sliding window, which goes on as it should."""
    target, draft = pair
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": do_sample}
    details |= {"output_hidden_states": True, "max_new_tokens": NEW}
    for limit in range(1, 14):
        criterion, judged = Counter(limit), JudgedModel(target, Lossless() if not do_sample else Coin(0.5))
        output = judged.generate(prompt, assistant_model=draft, stopping_criteria=[criterion], **details)
        length = prompt.shape[1] + limit
        assert output.sequences.shape[1] == length
        assert len(output.scores) == len(output.logits) == len(output.hidden_states) == limit
        assert criterion.scores == list(range(1, limit + 1))
        assert output.past_key_values.get_seq_length() == length - 1
        assert "crop" not in vars(output.past_key_values)
        # The next token, from the cache that was returned and from none.
        again = target(output.sequences[:, -1:], past_key_values=output.past_key_values).logits[0, -1]
        torch.testing.assert_close(again, target(output.sequences).logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: d.__name__)
def test_hidden_states_are_those_of_plain_decoding(llama, tokenizer, drafter, monkeypatch):
    """Of the first round, too, in which candidates follow the prompt."""
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    target, options = drafter(llama[0], tokenizer, monkeypatch)
    if drafter is assistant:
        options["assistant_model"] = perturbed(target, noise=0.0)
    how = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_hidden_states": True}
    plain = target.generate(ids, **how)
    if drafter in (dflash, mtp):
        with pytest.raises(ValueError, match="`output_hidden_states` cannot be returned .* made of the target's"):
            JudgedModel(target, Lossless()).generate(ids, **how, **options)
        return
    output = JudgedModel(target, Lossless()).generate(ids, **how, **options)
    assert torch.equal(output.sequences, plain.sequences)
    for states, expected in zip(output.hidden_states, plain.hidden_states, strict=True):
        for layer, other in zip(states, expected, strict=True):
            torch.testing.assert_close(layer, other, atol=1e-4, rtol=1e-4)


def test_states_that_cannot_be_returned_are_refused(llama, prompt):
    target, draft = llama
    how = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.raises(ValueError, match="`output_hidden_states` cannot be returned .* `past_key_values`"):
        JudgedModel(target, Lossless()).generate(
            prompt, assistant_model=draft, past_key_values=filled(target, prompt, 3), **how
        )
    windowed = build("gemma3")
    windowed.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="`output_attentions` cannot be returned .* attention has a window"):
        JudgedModel(windowed, Lossless()).generate(
            prompt, assistant_model=perturbed(windowed), **how, output_attentions=True
        )


def test_a_criterion_may_ask_a_processor(llama, prompt):
    """A grammar says when it is complete."""
    target, draft = llama[0], perturbed(llama[0], noise=0.0)
    outputs = []
    for model, drafts in ((target, {}), (JudgedModel(target, Lossless(), 6), {"assistant_model": draft})):
        grammar = Repeats()
        ends = [lambda ids, scores, grammar=grammar: torch.tensor([len(grammar.seen) >= 3])]
        outputs.append(
            model.generate(prompt, max_new_tokens=NEW, logits_processor=[grammar], stopping_criteria=ends, **drafts)
        )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("place", [1, 2, 5])
def test_a_cache_after_a_criterion_that_raised(pair, prompt, place):
    """It holds what was kept, and the conversation goes on with it."""
    target, draft = pair
    cache, asked = DynamicCache(config=target.config), []

    def fails(ids, scores):
        asked.append(ids)
        if len(asked) == place:
            raise KeyError("stop")
        return torch.zeros(1, dtype=torch.bool)

    judged = JudgedModel(target, Lossless())
    with pytest.raises(KeyError):
        judged.generate(prompt, assistant_model=draft, stopping_criteria=[fails], past_key_values=cache)
    assert "crop" not in vars(cache)
    text = target.generate(prompt, max_new_tokens=NEW)
    held = cache.get_seq_length()
    assert asked[-1].shape[1] - 1 <= held < text.shape[1]
    output = judged.generate(text[:, : held + 1], assistant_model=draft, past_key_values=cache, max_new_tokens=9)
    assert torch.equal(output, target.generate(text[:, : held + 1], max_new_tokens=9))


def test_scores_that_criteria_see_are_the_targets_own(llama, prompt):
    target, draft = llama
    seen = []

    def spy(ids, scores):
        seen.append(scores[-1])
        return torch.zeros(1, dtype=torch.bool)

    judged = JudgedModel(target, Coin(1.0))
    output = judged.generate(
        prompt, assistant_model=draft, max_new_tokens=NEW, stopping_criteria=[spy],
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert judged.stats.judged
    assert all(torch.isfinite(row).all() for row in seen)
    assert all(torch.equal(*rows) for rows in zip(seen, output.scores, strict=True))


def test_criteria_without_a_draft_are_those_of_plain_decoding(llama, prompt):
    target, _ = llama
    for options in ({}, {"num_beams": 3}):
        plain, ours, streamer = Counter(5), Counter(5), Collect()
        expected = target.generate(prompt, max_new_tokens=NEW, stopping_criteria=[plain], **options)
        options |= {} if "num_beams" in options else {"streamer": streamer}
        output = JudgedModel(target, Lossless()).generate(
            prompt, max_new_tokens=NEW, stopping_criteria=[ours], **options
        )
        assert torch.equal(output, expected)
        assert ours.asked == plain.asked
        assert streamer.tokens in ([], expected[0].tolist())


# Contexts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_length", [None, 7, "auto"])
@pytest.mark.parametrize("length", [5, 20, 31, 32, 33, 40])
def test_drafts_end_with_the_drafts_context(draft_length, length):
    target = build("gpt2")
    draft = shortened(target, 32)
    ids = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    judged = JudgedModel(target, Lossless(), draft_length)
    output = judged.generate(ids, assistant_model=draft, max_new_tokens=NEW)
    assert torch.equal(output, target.generate(ids, max_new_tokens=NEW))
    assert (judged.stats.drafted > 0) == (length < 32)
    # To the last place: after that the target adds its tokens one at a time.
    sources = judged.stats.sources
    assert all(source == "target" for source in sources[max(0, 32 - length) + 1 :])
    assert "matched" in sources or length > 30
    batch = judged.generate(ids.repeat(2, 1), assistant_model=draft, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(batch, output.repeat(2, 1))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_drafts_with_another_tokenizer_end_with_the_drafts_context(tokenizer, do_sample, monkeypatch):
    """It may make more tokens of the same text."""
    target, options = other_tokenizer(None, tokenizer, monkeypatch)
    draft = build("gpt2", n_positions=24)
    draft.resize_token_embeddings(len(options["assistant_tokenizer"]))
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    judged = JudgedModel(target, Lossless())
    output = judged.generate(
        ids, **options | {"assistant_model": draft}, max_new_tokens=40, do_sample=do_sample, pad_token_id=0
    )
    assert judged.stats.drafted > 0
    assert do_sample or torch.equal(output, target.generate(ids, max_new_tokens=40, pad_token_id=0))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 10}, {"draft": True}], ids=["lookup", "assistant"])
def test_candidates_end_with_the_targets_context(options):
    """The text may end before its context does, though a draft would run beyond."""
    target = build("gpt2", n_positions=32)
    ids = torch.tensor([[3, 4, 5, 6] * 5])
    free = target.generate(ids, max_new_tokens=12)[0]
    if options.pop("draft", False):
        options["assistant_model"] = build("gpt2")
    for limits in ({"max_new_tokens": 12}, {"max_new_tokens": 100, "eos_token_id": int(free[30])}):
        expected = target.generate(ids, **limits)
        assert torch.equal(JudgedModel(target, Lossless(), 10).generate(ids, **options, **limits), expected)


# A cache that was filled before --------------------------------------------------------------------------------------


def filled(target, ids: torch.LongTensor, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=target.config)
    target(ids[:, :tokens], past_key_values=cache)
    return cache


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 11])
def test_a_cache_that_holds_a_part_of_the_prompt(pair, tokens, masked):
    target, draft = pair
    ids = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(5)).repeat(1, 2)[:, :12]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    plain = target.generate(ids, max_new_tokens=NEW, past_key_values=filled(target, ids, tokens), **mask)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=NEW))
    for drafts in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        judged = JudgedModel(target, Lossless())
        output = judged.generate(
            ids, max_new_tokens=NEW, past_key_values=filled(target, ids, tokens), **drafts, **mask
        )
        assert torch.equal(output, plain)
        assert judged.stats.drafted


def test_a_conversation_on_one_cache(pair):
    """Turn by turn: each goes on with the cache that the last one left."""
    target, draft = pair
    judged, ids = JudgedModel(target, Lossless()), torch.tensor([[5, 6, 7, 8]])
    cache = DynamicCache(config=target.config)
    for turn in range(3):
        expected = target.generate(ids, max_new_tokens=9)
        output = judged.generate(ids, assistant_model=draft, max_new_tokens=9, past_key_values=cache)
        assert torch.equal(output, expected)
        ids = torch.cat([output, torch.tensor([[9 + turn, 3, 4]])], dim=1)


def test_early_exit_with_a_filled_cache(llama):
    target, _ = llama
    ids = torch.arange(1, 13)[None]
    output = JudgedModel(target, Lossless()).generate(
        ids, assistant_early_exit=1, max_new_tokens=NEW, past_key_values=filled(target, ids, 7)
    )
    assert torch.equal(output, target.generate(ids, max_new_tokens=NEW))


def test_caches_that_cannot_be_continued(llama, tokenizer, monkeypatch):
    target, draft = llama
    ids = torch.arange(1, 13)[None]
    judged = JudgedModel(target, Lossless())
    whole = {"input_ids": ids, "assistant_model": draft, "past_key_values": filled(target, ids, 12)}
    with pytest.raises(ValueError, match="`past_key_values` holds 12 tokens, `input_ids` has 12 and"):
        judged.generate(**whole)
    rest = {"input_ids": ids[:, 7:], "attention_mask": torch.ones_like(ids), "assistant_model": draft}
    with pytest.raises(ValueError, match=r"holds 7 tokens, `input_ids` has 5 and `attention_mask` 12"):
        judged.generate(**rest, past_key_values=filled(target, ids, 7))
    _, options = dflash(target, tokenizer, monkeypatch)
    with pytest.raises(ValueError, match="which DFlashTokenCandidateGenerator would have to see too"):
        judged.generate(ids, **options, past_key_values=filled(target, ids, 7))
    assert "prepare_inputs_for_generation" not in vars(target)


def test_prompts_of_embeddings(pair):
    target, draft = pair
    ids = torch.tensor([[5, 6, 7, 8] * 4])
    embeds, judged = target.get_input_embeddings()(ids[:, :12]), JudgedModel(target, Lossless())
    for prompt in ({"inputs_embeds": embeds}, {"input_ids": ids[:, :12], "inputs_embeds": embeds}):
        expected = target.generate(**prompt, max_new_tokens=NEW)
        assert torch.equal(judged.generate(**prompt, prompt_lookup_num_tokens=4, max_new_tokens=NEW), expected)
        assert judged.stats.drafted
        for drafts in ({"assistant_model": draft}, {"assistant_early_exit": 1}):
            with pytest.raises(ValueError, match="`inputs_embeds` are the target's own, and a draft model cannot"):
                judged.generate(**prompt, **drafts, max_new_tokens=NEW)
    with pytest.raises(ValueError, match="needs a decoder-only target and `input_ids`"):
        judged.generate(**prompt, prompt_lookup_num_tokens=4, past_key_values=filled(target, ids, 3))


def test_early_exit_by_the_targets_own_config_leaves_nothing(llama, prompt):
    target = copy.copy(llama[0])
    target.generation_config = copy.deepcopy(target.generation_config)
    target.generation_config.assistant_early_exit = 1
    judged = JudgedModel(target, Lossless())
    assert torch.equal(judged.generate(prompt, max_new_tokens=9), llama[0].generate(prompt, max_new_tokens=9))
    gc.collect()
    gc.disable()
    try:
        judged.generate(prompt, max_new_tokens=9)
        caches = [thing for thing in gc.get_objects() if isinstance(thing, DynamicCache)]
    finally:
        gc.enable()
    assert not caches


# Vocabularies of two sizes -------------------------------------------------------------------------------------------


def resized(model, size: int):
    """The same model with `size` rows of embeddings."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@pytest.mark.parametrize("size", [60, *(pytest.param(size, marks=pytest.mark.heavy) for size in (64, 72))])
@pytest.mark.parametrize("own", [True, False], ids=["one tokenizer", "equal tokenizers"])
def test_equal_tokenizers_need_no_translation(llama, tokenizer, size, own):
    target, draft = llama[0], resized(perturbed(llama[0], noise=0.0), size)
    ids = tokenizer("abc, abc", return_tensors="pt").input_ids
    two = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer if own else tiny_tokenizer()}
    judged = JudgedModel(target, Lossless())
    plain = target.generate(ids, max_new_tokens=NEW)
    assert torch.equal(judged.generate(ids, assistant_model=draft, max_new_tokens=NEW, **two), plain)
    assert judged.stats.matched > NEW / 2  # but for the tokens that only the target has
    batch = judged.generate(ids.repeat(2, 1), assistant_model=draft, max_new_tokens=NEW, pad_token_id=0, **two)
    assert torch.equal(batch, plain.repeat(2, 1))
    assert draft.config.vocab_size == size
    for rule in (Lossless(), KLGate(1.0), Coin(0.5), JudgeRule(random_judge(target), 0.5)):
        judged = JudgedModel(target, rule)
        for constraint in ({}, {"bad_words_ids": [[3], [63]], "sequence_bias": [[[62], 5.0]], "top_k": 5}):
            output = judged.generate(
                ids, assistant_model=draft, max_new_tokens=NEW, do_sample=True, **two, **constraint
            )
            assert judged.stats.tokens == output.shape[1] - ids.shape[1] == NEW
            assert not constraint or not {3, 63} & {*new_tokens(output, ids)}
        batch = judged.generate(
            ids.repeat(2, 1), assistant_model=draft, max_new_tokens=NEW, do_sample=True, pad_token_id=0, **two
        )
        assert batch.shape == (2, ids.shape[1] + NEW)


@pytest.mark.heavy
def test_samples_with_a_smaller_vocabulary_follow_the_target():
    """The first of two tokens of many samples; speculative sampling leaves the target's distribution as it is."""
    from scipy.stats import chisquare

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": 8}, **HEADS, **NO_EOS)
    target, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    draft = resized(draft, 6)
    draft.generation_config.num_assistant_tokens = 1
    characters = {c: i for i, c in enumerate(string.ascii_lowercase[:8])}
    core = Tokenizer(models.WordLevel(characters, unk_token="a"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokens = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        p = target(ids).logits[0, -1].softmax(-1)
    judged, counts = JudgedModel(target, Lossless()), torch.zeros(8)
    torch.manual_seed(0)
    for _ in range(1500):
        output = judged.generate(
            ids, assistant_model=draft, max_new_tokens=2, do_sample=True, top_k=0, tokenizer=tokens,
            assistant_tokenizer=tokens,
        )  # fmt: skip
        counts[output[0, 3]] += 1
    assert chisquare(counts.numpy(), (p / p.sum() * counts.sum()).numpy()).pvalue > 1e-3


def test_sizes_that_differ_ask_for_tokenizers_that_then_work(llama, prompt, tokenizer):
    target, draft = llama[0], resized(llama[1], 60)
    judged = JudgedModel(target, Lossless())
    with pytest.raises(ValueError, match="a vocabulary of 60 tokens, the target one of 64. Pass `tokenizer` and"):
        judged.generate(prompt, assistant_model=draft)


# Processors with a memory --------------------------------------------------------------------------------------------


class Repeats(LogitsProcessor):
    """Remembers the tokens that it has seen, and makes each unlikelier the more often it came."""

    def __init__(self):
        self.seen, self.counts, self.model = [], torch.zeros(VOCAB), None

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.shape[1])
        self.counts[input_ids[0, -1]] += 1
        return scores - 3 * self.counts[: scores.shape[-1]]


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda d: d.__name__)
def test_processors_see_each_kept_token_once(llama, tokenizer, drafter, monkeypatch):
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    target, options = drafter(llama[0], tokenizer, monkeypatch)
    plain, ours = Repeats(), Repeats()
    ours.model = target  # shared with the copies
    expected = target.generate(ids, max_new_tokens=NEW, logits_processor=[plain])
    judged = JudgedModel(target, Lossless())
    output = judged.generate(ids, max_new_tokens=NEW, logits_processor=[ours], **options)
    assert torch.equal(output, expected)
    assert ours.seen == plain.seen
    assert torch.equal(ours.counts, plain.counts)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
@pytest.mark.parametrize(
    "constraint",
    [
        {"bad_words_ids": [[token] for token in range(2, 40, 2)]},
        {"sequence_bias": [[[3], 9.0], [[50], 9.0]]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [51, 52]},
        {"repetition_penalty": 1.5},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_constraints_are_not_asked_of_another_vocabulary(tokenizer, constraint, do_sample, monkeypatch):
    target, options = other_tokenizer(None, tokenizer, monkeypatch)
    ids = tokenizer("abc, abc, abc, ", return_tensors="pt").input_ids
    how = {"max_new_tokens": NEW, "pad_token_id": 0, **constraint}
    judged = JudgedModel(target, Lossless())
    output = judged.generate(ids, **options, **how, do_sample=do_sample)
    assert judged.stats.drafted > 0
    assert judged.stats.tokens == NEW
    assert do_sample or torch.equal(output, target.generate(ids, **how))


def test_processors_with_a_memory_in_a_batch(llama):
    """What one remembers is of its row."""
    target, draft = llama
    ids = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))
    alone = [target.generate(row[None], max_new_tokens=NEW, logits_processor=[Repeats()])[0] for row in ids]
    judged = JudgedModel(target, Lossless())
    batch = judged.generate(
        ids, assistant_model=draft, max_new_tokens=NEW, logits_processor=[Repeats()], pad_token_id=0
    )
    assert torch.equal(batch, torch.stack(alone))


def closure(model):
    """Remembers in variables that it closes over."""
    counts, calls = torch.zeros(VOCAB), 0

    def processor(ids, scores):
        nonlocal calls
        calls += 1
        counts[ids[0, -1]] += calls % 3 + model.config.vocab_size / VOCAB
        return scores - counts

    return [processor]


def attribute(model):
    """Remembers in what a function among its attributes closes over."""
    holder = Repeats()
    (holder.inner,) = closure(model)
    return [Calls(holder.inner)]


def shared(model):
    """Two that remember together."""
    first, second = Repeats(), Repeats()
    second.counts = first.counts
    return [first, second]


class Calls(LogitsProcessor):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, input_ids, scores):
        return self.inner(input_ids, scores)


@pytest.mark.parametrize("make", [closure, attribute, shared], ids=lambda make: make.__name__)
def test_what_processors_remember_elsewhere(llama, prompt, make):
    target, draft = llama
    expected = target.generate(prompt, max_new_tokens=NEW, logits_processor=make(target))
    judged = JudgedModel(target, Lossless())
    how = {"assistant_model": draft, "max_new_tokens": NEW, "pad_token_id": 0}
    assert torch.equal(judged.generate(prompt, logits_processor=make(target), **how), expected)
    batch = judged.generate(prompt.repeat(2, 1), logits_processor=make(target), **how)
    assert torch.equal(batch, expected.repeat(2, 1))


def test_processors_that_cannot_be_copied(llama, prompt):
    target, draft = llama

    class Same(Repeats):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(ValueError, match="Same cannot be copied .its copy is the same object"):
        JudgedModel(target, Lossless()).generate(prompt, assistant_model=draft, logits_processor=[Same()])

    class Locked(Repeats):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    judged = JudgedModel(target, Lossless())
    with pytest.raises(ValueError, match="`logits_processor`: Locked cannot be copied .cannot pickle"):
        judged.generate(prompt, assistant_model=draft, logits_processor=[Locked()])
    judged.generate(prompt, logits_processor=[Locked()], max_new_tokens=3)  # without a draft it is as good as any


def test_a_watermark_with_a_memory(llama, prompt):
    target, draft = llama
    how = {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3), "max_new_tokens": NEW}
    output = JudgedModel(target, Lossless()).generate(prompt, assistant_model=draft, **how)
    assert torch.equal(output, target.generate(prompt, **how))


def test_guidance_is_refused(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, Lossless())
    for drafts in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="`guidance_scale` cannot be used with a draft"):
            judged.generate(prompt, guidance_scale=1.5, **drafts)
    with pytest.raises(ValueError, match="`guidance_scale` cannot be used with a draft"):
        judged.generate(prompt.repeat(2, 1), guidance_scale=1.5, assistant_model=draft, pad_token_id=0)
    output = judged.generate(prompt, guidance_scale=1.5, max_new_tokens=NEW)
    assert torch.equal(output, target.generate(prompt, guidance_scale=1.5, max_new_tokens=NEW))


# Arguments of the wrong type -----------------------------------------------------------------------------------------


def test_arguments_of_the_wrong_type(llama, prompt):
    target, draft = llama
    judged, mask = JudgedModel(target, Lossless()), torch.ones_like(prompt)
    encoding = BatchEncoding({"input_ids": prompt, "attention_mask": mask})
    for wrong, error, message in (
        (
            {"inputs": encoding},
            TypeError,
            r"`inputs` must be a tensor .*, got BatchEncoding. .*\(\*\*encoding",
        ),
        ({"input_ids": encoding}, TypeError, "`input_ids` must be a tensor .*, got BatchEncoding"),
        (
            {"inputs": prompt.tolist()},
            TypeError,
            "`inputs` must be a tensor of shape .*, got list",
        ),
        ({"input_ids": "why?"}, TypeError, "`input_ids` must be a tensor .*, got str"),
        ({"input_ids": prompt[None]}, ValueError, r"`input_ids` has shape \(1, 1, 9\)"),
        ({"inputs": prompt[0]}, ValueError, r"`inputs` has shape \(9,\), expected `\(prompts, tokens\)`"),
        ({"inputs": prompt, "attention_mask": [[1] * 9]}, TypeError, "`attention_mask` must be a tensor .*, got list"),
        ({"inputs": prompt, "assistant_model": (draft, None)}, TypeError, "`assistant_model` must be .*, got tuple"),
        ({"inputs": prompt, "assistant_model": "me/draft"}, TypeError, "`assistant_model` must be .*, got str"),
    ):
        with pytest.raises(error, match=message):
            judged.generate(**{"assistant_model": draft} | wrong, max_new_tokens=3)
    with pytest.raises(ValueError, match="`draft_length` must be a number of tokens, 'auto' or None, got True"):
        JudgedModel(target, Lossless(), draft_length=True)
    output = judged.generate(**encoding, assistant_model=draft, max_new_tokens=3)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=3))
