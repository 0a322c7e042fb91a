"""One prompt, decoded inside stock `generate`.

In: a target, a rule, and the arguments of `generate`. Out: what `generate` returns, and [`Stats`].

The decoding loop is `GenerationMixin._assisted_decoding` of transformers; none of it is rewritten. For the time of the
call, three methods of a shallow copy of the target are overridden, which `generate` calls to build its parts:
[`JudgeCandidateGenerator`] wraps the candidate generator and so learns what was drafted; [`Call.choose`] makes the row
of an accepted candidate one-hot, so that the stock comparison keeps it; [`KeptTokens`] sees what was kept, and ends
the text. [`ForwardTap`] reads the verification forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.candidate_generator import (
    AssistedCandidateGeneratorDifferentTokenizers,
    EarlyExitCandidateGenerator,
    PromptLookupCandidateGenerator,
    UniversalSpeculativeDecodingGenerator,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..forward.tap import ForwardTap
from ..judge.lora import ReplaySession
from ..models.offload import shallow_copy
from ..models.tokens import context_of
from .auto_length import AutoLength
from .drafting import FastDraft, set_draft_length, stay_within_context
from .lookup import LookupBeside
from .rules import Rule
from .stats import Stats
from .stopping import HeldStreamer, KeptTokens, without_last
from .trial import Trial
from .verification import Call, JudgeCandidateGenerator


# Candidate generators whose drafts come without logits, and the one of their subclasses whose drafts have them.
WITHOUT_LOGITS = (PromptLookupCandidateGenerator, AssistedCandidateGeneratorDifferentTokenizers)
WITH_LOGITS = UniversalSpeculativeDecodingGenerator
OVERRIDDEN = ("_get_logits_processor", "_get_stopping_criteria", "_get_candidate_generator")


def decode_one(
    target: PreTrainedModel,
    rule: Rule,
    special_tokens: set[int],
    draft_length: int | str | None,
    inputs: torch.Tensor | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    streamer: BaseStreamer | None = None,
    measured: AutoLength | None = None,
    **kwargs,
) -> tuple[torch.LongTensor | ModelOutput, Stats | None]:
    """
    Decode one prompt, or without a draft any number of them. `special_tokens` are never accepted against the target's
    choice, nor overruled; `measured` is what earlier calls measured, and learns from this one. The other arguments are
    those of [`JudgedModel`] and `generate`, and so are the errors.

    Returns:
        What `generate` returns, and the statistics of the call; `None` if it had no draft.
    """
    _check(target, rule, kwargs.get("input_ids") if inputs is None else inputs, kwargs)
    replay = rule.replay_on(target)
    call = Call(rule, special_tokens, None if replay is None else replay.start())
    processors = LogitsProcessorList([*(logits_processor or []), call.keep_constrained])
    streamer = None if streamer is None else HeldStreamer(streamer)
    # Overridden on a shallow copy: it shares the weights, and other callers of the target do not see the overrides.
    parts = _Parts(copy.copy(target), call, draft_length, streamer, measured or AutoLength())
    try:
        with ForwardTap(parts.target, call.observe, None if replay is None else replay.entering):
            output = parts.target.generate(inputs, logits_processor=processors, streamer=streamer, **kwargs)
    finally:
        parts.release()
    if parts.generator is None:
        return output, None
    if call.replaced:
        output.scores = call.own_scores(output.scores)
    # transformers keeps the length that this schedule arrived at, but does not look for it inside a wrapper.
    inner = parts.generator.inner
    if isinstance(inner, AssistedCandidateGenerator) and draft_length is None:
        config = inner.assistant_model.generation_config
        if config.num_assistant_tokens_schedule == "heuristic":
            config.num_assistant_tokens = inner.num_assistant_tokens
    return without_last(output, parts.criteria.dropped), call.stats


def _check(target: PreTrainedModel, rule: Rule, ids: torch.Tensor | None, kwargs: dict) -> None:
    config = target.config.get_text_config()
    if ids is not None and "inputs_embeds" not in kwargs and not config.is_encoder_decoder:
        length, context = ids.shape[-1], context_of(target)
        if length == 0:
            raise ValueError("`input_ids` is empty. Give at least one token.")
        if context is not None and length >= context:
            raise ValueError(
                f"`input_ids` has {length} tokens, the target's context is {context}. Shorten the prompt."
            )
    draft = kwargs.get("assistant_model")
    if draft is None or draft.get_output_embeddings() is None:  # some drafts use the target's own embeddings
        return
    draft_size = draft.config.get_text_config().vocab_size
    if draft_size != config.vocab_size and kwargs.get("assistant_tokenizer") is None:
        raise ValueError(
            f"`assistant_model` has a vocabulary of {draft_size} tokens, the target one of {config.vocab_size}. "
            "Pass `tokenizer` and `assistant_tokenizer`: tokens are then translated, unless the tokenizers are equal "
            "and the vocabularies differ in padding only."
        )
    rule.check_draft(draft)


class _Parts:
    """What `generate` builds for a call, with the call in it. `target` is a shallow copy, whose methods are overridden
    until [`release`]. There is a `generator` only if the call decodes with a draft."""

    def __init__(
        self,
        target: PreTrainedModel,
        call: Call,
        draft_length: int | str | None,
        streamer: HeldStreamer | None,
        measured: AutoLength,
    ):
        self.target, self.call, self.streamer = target, call, streamer
        self.draft_length, self.measured = draft_length, measured
        self.criteria = self.generator = None
        self.stock_processors, self.stock_criteria, self.stock_generator = (getattr(target, n) for n in OVERRIDDEN)
        overrides = self.build_processors, self.build_criteria, self.build_generator
        vars(target).update(zip(OVERRIDDEN, overrides, strict=True))

    def build_processors(self, **arguments) -> LogitsProcessorList:
        return LogitsProcessorList([*self.stock_processors(**arguments), self.call.choose])

    def build_criteria(self, **arguments) -> StoppingCriteriaList:
        self.criteria = KeptTokens(self.stock_criteria(**arguments), self.call, self.streamer)
        return self.criteria

    def build_generator(self, **arguments) -> JudgeCandidateGenerator:
        processors, cache = arguments["logits_processor"], arguments["model_kwargs"]["past_key_values"]
        own = [self.call.keep_constrained, self.call.choose]
        self.call.trial = Trial(processors, own)
        # The draft gets the target's processors, but not those of the call.
        others = arguments["logits_processor"] = LogitsProcessorList(p for p in processors if p not in own)
        self.call.prepare(arguments["generation_config"], bool(others))
        lookup, draft_length = None, self.draft_length
        if _looks_up_beside(arguments):
            lookup = LookupBeside(self.stock_generator(**arguments))
            config = arguments["generation_config"] = copy.copy(arguments["generation_config"])
            config.prompt_lookup_num_tokens = None
        inner = self.stock_generator(**arguments)
        if draft_length is None and _leaves_length_open(inner, arguments["generation_config"]):
            draft_length = "auto"
        length = self.measured if draft_length == "auto" else draft_length
        self.generator = _wrap(self.target, inner, self.call, length, lookup)
        self.generator.waits = _reads_prompt_first(self.target, self.generator, arguments)
        if cache.get_seq_length():
            _continue_cache(self.target, self.generator, arguments)
        self.criteria.begin(cache)
        return self.generator

    def release(self) -> None:
        """End the overrides: as references to themselves they would keep caches until the next garbage collection."""
        _remove_overrides(self.target)
        if self.generator is not None and self.criteria.cache is not None:
            self.criteria.end()


def _remove_overrides(target: PreTrainedModel) -> None:
    """Give a copy of the target, or a copy of that, its class's own methods back."""
    for name in (*OVERRIDDEN, "prepare_inputs_for_generation"):
        vars(target).pop(name, None)


def _leaves_length_open(inner: CandidateGenerator, config: GenerationConfig) -> bool:
    """Whether nothing says how long drafts are, and their length does not change text that no rule decides."""
    if type(inner) is not AssistedCandidateGenerator or config.do_sample or config.assistant_ensemble_weight:
        return False
    own = inner.assistant_model.generation_config
    lengths = own.num_assistant_tokens, own.num_assistant_tokens_schedule, own.assistant_confidence_threshold
    return all(value is None for value in lengths)


def _looks_up_beside(arguments: dict) -> bool:
    """Whether both a draft model and prompt lookup are asked for. (Stock `generate` ignores the model then.)"""
    config = arguments["generation_config"]
    both = arguments.get("assistant_model") is not None and config.prompt_lookup_num_tokens is not None
    return both and config.assistant_early_exit is None


def _wrap(
    target: PreTrainedModel,
    inner: CandidateGenerator,
    call: Call,
    draft_length: int | AutoLength | None,
    lookup: LookupBeside | None,
) -> JudgeCandidateGenerator:
    """Wrap what transformers built; raise if the rule, the draft length or prompt lookup cannot work with it."""
    if lookup is not None and type(inner) is not AssistedCandidateGenerator:
        raise ValueError(
            f"`prompt_lookup_num_tokens` beside drafts of {type(inner).__name__} is not possible. Use one of the two, "
            "or a draft model with the target's tokenizer."
        )
    for source in filter(None, (inner, lookup and lookup.generator)):
        if call.rule.needs_draft_logits and isinstance(source, WITHOUT_LOGITS) and not isinstance(source, WITH_LOGITS):
            raise ValueError(
                f"`rule` {type(call.rule).__name__} compares target and draft, but drafts of {type(source).__name__} "
                "come without probabilities. Use a draft model with the target's tokenizer alone, or another rule."
            )
    if isinstance(inner, AssistedCandidateGenerator):
        # The target's criteria end the text. transformers would ask the draft for a tokenizer that it cannot give.
        inner.generation_config.stop_strings = None
        stay_within_context(inner)
    if isinstance(inner, AssistedCandidateGeneratorDifferentTokenizers):
        inner.logits_processor = LogitsProcessorList()  # the target's are about its own tokens
    if isinstance(inner, EarlyExitCandidateGenerator):
        inner.assistant_model = _with_own_config(inner.assistant_model)
    length = draft_length if isinstance(draft_length, AutoLength) else None
    if type(inner) is AssistedCandidateGenerator:
        FastDraft(inner, length)
    elif length is not None:
        length.begin_call(pauses=isinstance(inner, PromptLookupCandidateGenerator))
        set_draft_length(inner, length.FIRST)  # refuse now what cannot be set
    if isinstance(draft_length, int):
        set_draft_length(inner, draft_length)
    return JudgeCandidateGenerator(inner, call, length, context_of(target), lookup)


def _with_own_config(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the weights. Early exit changes the config while it drafts with fewer layers; threads that
    verify must not see that, and an exception must not leave it so."""
    model = shallow_copy(model)
    _remove_overrides(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.assistant_early_exit = None  # its own drafts would have drafts
    model._modules = dict(model._modules)
    base = shallow_copy(getattr(model, model.base_model_prefix))
    setattr(model, model.base_model_prefix, base)
    model.config = base.config = copy.copy(base.config)
    return model


def _reads_prompt_first(target: PreTrainedModel, generator: JudgeCandidateGenerator, arguments: dict) -> bool:
    """Whether the target has to read the prompt without candidates. Stock assisted generation returns states of the
    prompt as those of the first candidates; and of a prompt of embeddings it reads logits for candidates that it left
    out of the forward. Raise where that is not enough."""
    config, kwargs = arguments["generation_config"], arguments["model_kwargs"]
    cache, embedded = kwargs["past_key_values"], kwargs.get("inputs_embeds") is not None
    returned = [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name)]
    if returned and config.return_dict_in_generate:
        reasons = {
            "attention has a window": config.output_attentions and any(cache.is_sliding),
            "the prompt is in `past_key_values` or `inputs_embeds`": embedded or cache.get_seq_length(),
            "drafts are made of the target's states": generator.requires_model_outputs,
        }
        if found := [reason for reason, applies in reasons.items() if applies]:
            raise ValueError(
                f"`{returned[-1]}` cannot be returned with a draft where {found[0]}. Decode without a draft."
            )
        return True
    if target.config.is_encoder_decoder or not embedded:
        return False
    if not isinstance(generator.inner, PromptLookupCandidateGenerator):
        raise ValueError(
            "`inputs_embeds` are the target's own, and a draft model cannot read them. Pass `input_ids`, or draft "
            "with `prompt_lookup_num_tokens`."
        )
    return True


def _continue_cache(target: PreTrainedModel, generator: JudgeCandidateGenerator, arguments: dict) -> None:
    """Let the first forward of `target`, a copy, read only what its cache does not hold yet. Stock assisted generation
    reads all of the prompt again, in addition to what the cache holds of it."""
    cache, mask = (arguments["model_kwargs"].get(name) for name in ("past_key_values", "attention_mask"))
    held, length = cache.get_seq_length(), arguments["input_ids"].shape[1]
    masked = arguments["generation_config"]._mask_length if mask is None else mask.shape[-1]
    if target.config.is_encoder_decoder or "inputs_embeds" in arguments["model_kwargs"]:
        raise ValueError("`past_key_values` with tokens in it needs a decoder-only target and `input_ids`.")
    if held >= length or masked != length:
        raise ValueError(
            f"`past_key_values` holds {held} tokens, `input_ids` has {length} and `attention_mask` {masked}. With a "
            "draft, pass all tokens of the prompt, of which the cache holds all but the last at most."
        )
    if generator.requires_model_outputs or isinstance(generator.call.replay, ReplaySession):
        reader = type(generator.inner).__name__ if generator.requires_model_outputs else "the judge's adapter"
        raise ValueError(
            f"`past_key_values` holds {held} tokens, which {reader} would have to see too. Start with an empty cache."
        )
    prepare = target.prepare_inputs_for_generation

    def after_cache(ids: torch.LongTensor, **kwargs) -> dict:
        if kwargs.get("is_first_iteration") and kwargs.get("past_key_values") is cache:
            kwargs["next_sequence_length"] = ids.shape[1] - held
        return prepare(ids, **kwargs)

    target.prepare_inputs_for_generation = after_cache
