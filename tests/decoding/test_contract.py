"""What this package relies on in transformers, one test for each behaviour: a new version fails here first."""

import copy
import functools
import inspect

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.utils import _speculative_sampling

from tests.builders import VOCAB


NEW = 20  # tokens


class Noted(LogitsProcessor):
    """Does nothing, and notes how long its input was."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (
            GenerationMixin._get_candidate_generator,
            {"generation_config", "input_ids", "logits_processor", "model_kwargs", "assistant_model"},
        ),
        (GenerationMixin._get_logits_processor, {"generation_config", "logits_processor"}),
        (GenerationMixin._get_stopping_criteria, {"generation_config", "stopping_criteria", "tokenizer"}),
        (GenerationMixin.prepare_inputs_for_generation, {"next_sequence_length", "is_first_iteration"}),
        (GenerationMixin.generate, {"assistant_model", "custom_generate", "streamer"}),
        (CandidateGenerator.update_candidate_strategy, {"input_ids", "scores", "num_matches"}),
        (AssistedCandidateGenerator._generate_candidates, {"generation_args"}),
        (
            AssistedCandidateGenerator._prepare_generation_args,
            {"input_ids", "min_new_tokens", "max_new_tokens"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signatures(method, names):
    """The methods that are overridden or called, and the arguments that are read."""
    assert names <= set(inspect.signature(method).parameters)


def test_generate_asks_the_instance(llama, prompt, monkeypatch):
    """Overrides on an instance are used, once each, and are given keywords only."""
    target, draft = llama
    seen = []
    names = ["_get_logits_processor", "_get_stopping_criteria", "_get_candidate_generator"]
    for name in names:
        build = getattr(target, name)

        def override(build=build, name=name, **arguments):
            seen.append(name)
            return build(**arguments)

        monkeypatch.setattr(target, name, override, raising=False)
    target.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    assert seen == names


def test_order_of_processors(llama):
    """The caller's processors come after the constraints and before temperature and filters."""
    target, _ = llama
    config = target._prepare_generation_config(None, do_sample=True, temperature=2.0, suppress_tokens=[3])[0]
    processors = target._get_logits_processor(
        generation_config=config, input_ids_seq_length=4, device="cpu", logits_processor=LogitsProcessorList([Noted()])
    )
    kinds = [type(processor) for processor in processors]
    order = [kinds.index(kind) for kind in (SuppressTokensLogitsProcessor, Noted, TemperatureLogitsWarper)]
    assert order == sorted(order)


def test_a_round(llama, prompt, monkeypatch):
    """Draft, one forward with `k + 1` rows through the output embeddings, one call of the processors for each row,
    then `update_candidate_strategy` with the text so far."""
    target, draft = llama
    noted, events = Noted(), []
    get_candidates = AssistedCandidateGenerator.get_candidates

    def drafted(self, input_ids):
        ids, logits = get_candidates(self, input_ids)
        noted.lengths.clear()
        events.append(("draft", ids.shape[1] - input_ids.shape[1], None if logits is None else tuple(logits.shape)))
        return ids, logits

    def updated(self, input_ids, scores, num_matches):
        start = noted.lengths[0]
        events.append(("update", input_ids.shape[1] - start, int(num_matches), list(noted.lengths), start))

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", drafted)
    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", updated)
    hooks = [
        target.lm_head.register_forward_pre_hook(lambda m, inputs: events.append(("head", inputs[0].shape[1]))),
        target.register_forward_hook(lambda m, inputs, output: events.append(("end", output.logits.shape[1]))),
    ]
    target.generate(prompt, assistant_model=draft, max_new_tokens=NEW, logits_processor=LogitsProcessorList([noted]))
    for hook in hooks:
        hook.remove()
    rounds = [events[i : i + 4] for i in range(0, len(events), 4)]
    assert len(rounds) > 2
    for (name, k, shape), head, end, (_, added, matches, lengths, start) in rounds:
        assert name == "draft"
        assert shape in (None, (1, k, VOCAB))
        assert head == ("head", k + 1)
        assert end == ("end", k + 1)
        assert lengths == list(range(start, start + k + 1))
        assert added == matches + 1


def test_the_end_of_a_round(llama, prompt, monkeypatch):
    """First what was kept is streamed, then the cache is cropped, then the generator is updated, then the criteria are
    asked. The scores that they get include those of the round."""
    target, draft = llama
    events, cache = [], DynamicCache(config=target.config)

    class Streamer:
        def put(self, value):
            events.append("stream")

        def end(self):
            events.append("end")

    def crop(tokens):
        events.append("crop")
        DynamicCache.crop(cache, tokens)

    def asked(input_ids, scores):
        events.append("criteria")
        assert len(scores) == input_ids.shape[1] - prompt.shape[1]
        return torch.zeros(1, dtype=torch.bool)

    cache.crop = crop
    monkeypatch.setattr(
        AssistedCandidateGenerator, "update_candidate_strategy", lambda *arguments: events.append("update")
    )
    target.generate(
        prompt, assistant_model=draft, max_new_tokens=NEW, past_key_values=cache, streamer=Streamer(),
        stopping_criteria=[asked], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert events[0] == "stream"  # the prompt
    assert events[-1] == "end"
    rounds = [events[i : i + 4] for i in range(1, len(events) - 1, 4)]
    assert len(rounds) > 2
    assert all(events == ["stream", "crop", "update", "criteria"] for events in rounds)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_one_hot_row_is_always_accepted(weight):
    """In speculative sampling: p = 1 on the candidate is never less than q. The row after it is untouched."""
    torch.manual_seed(0)
    for _ in range(50):
        draft_logits, logits = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
        candidates = torch.randint(0, 8, (1, 2))
        logits[0, 0] = -torch.inf
        logits[0, 0, candidates[0, 0]] = 0.0
        tokens, matches = _speculative_sampling(candidates, draft_logits, 2, logits, assistant_ensemble_weight=weight)
        assert matches >= 1
        assert tokens[0, 0] == candidates[0, 0]


def test_custom_generate_hands_over_what_it_prepared(llama, prompt):
    target, _ = llama

    def method(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return model, input_ids, logits_processor, generation_config, model_kwargs

    model, ids, processors, config, kwargs = target.generate(prompt, custom_generate=method, suppress_tokens=[3])
    assert model is target
    assert torch.equal(ids, prompt)
    assert [type(processor) for processor in processors] == [SuppressTokensLogitsProcessor]
    assert config._eos_token_tensor is None
    assert isinstance(kwargs["past_key_values"], DynamicCache)
    assert kwargs["position_ids"].shape == prompt.shape


def test_what_an_assisted_generator_holds(llama, prompt, monkeypatch):
    target, draft = llama
    monkeypatch.setattr(draft.generation_config, "assistant_confidence_threshold", 0.4)
    built = []
    build = target._get_candidate_generator
    monkeypatch.setattr(
        target, "_get_candidate_generator", lambda **a: built.append(build(**a)) or built[0], raising=False
    )
    target.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    (generator,) = built
    assert type(generator) is AssistedCandidateGenerator
    assert generator.assistant_model is draft
    assert generator.num_assistant_tokens == 5
    assert generator.generation_config.stop_strings is None
    assert len(generator.probs) > 0
    assert generator.assistant_kwargs["past_key_values"].get_seq_length() >= prompt.shape[1]
    lookup = PromptLookupCandidateGenerator(num_output_tokens=3, max_length=64)
    lookup.num_output_tokens = 2
    assert lookup.get_candidates(torch.tensor([[1, 2, 3, 4, 1, 2]]))[0].shape == (1, 8)


def test_heuristic_lengths_are_written_back_by_type(llama, prompt):
    """Only for generators that it built itself; in a wrapper they must be written back by hand."""
    source = inspect.getsource(GenerationMixin._assisted_decoding)
    assert "isinstance(candidate_generator, AssistedCandidateGenerator)" in source
    assert 'num_assistant_tokens_schedule == "heuristic"' in source


def test_cache_layers(llama, prompt):
    """Mining cuts and joins caches: keys and values of shape `(batch, heads, length, size)`, cropped from the end."""
    target, _ = llama
    cache = target(prompt, use_cache=True).past_key_values
    assert all(type(layer) is DynamicLayer for layer in cache.layers)
    assert cache.layers[0].keys.shape[0::2] == (1, prompt.shape[1])
    cache.crop(-2)
    assert cache.get_seq_length() == prompt.shape[1] - 2
    joined = DynamicCache()
    for index, layer in enumerate(cache.layers):
        joined.update(layer.keys, layer.values, index)
    output = target(prompt[:, -2:], past_key_values=joined, attention_mask=torch.ones_like(prompt))
    torch.testing.assert_close(output.logits, target(prompt).logits[:, -2:], atol=1e-4, rtol=1e-4)


def test_a_forward_of_an_instance_is_called_with_names_and_its_cache(llama, prompt):
    """What rows of a batch wait with: a `forward` set on the instance, named arguments, a cache of their own."""
    target, _ = llama
    model = copy.copy(target)
    seen = []

    def forward(**arguments):
        seen.append({name for name, value in arguments.items() if value is not None})
        return target(**arguments)

    model.forward = functools.wraps(target.forward)(forward)
    model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=6)
    assert seen
    for names in seen:
        assert {"input_ids", "past_key_values", "position_ids", "logits_to_keep"} <= names
    assert "forward" not in vars(target)
