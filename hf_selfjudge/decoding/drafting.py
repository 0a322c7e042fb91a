"""How candidates are drafted: the same as in transformers, at less cost and with a length that adapts.

In: a candidate generator of transformers. Out: candidates. Knows nothing of rules.
"""

from __future__ import annotations

import weakref

import torch
from transformers import Cache
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.candidate_generator import (
    PromptLookupCandidateGenerator,
    _prepare_attention_mask,
    _prepare_position_ids,
    _prepare_token_type_ids,
)

from ..forward.lockstep import runs_alone
from ..models.compiled import CroppableStaticCache, shared_cache
from ..models.tokens import context_of
from .auto_length import AutoLength


class FastDraft:
    """
    Drafts the same candidates as [`~transformers.generation.AssistedCandidateGenerator`] without a call of `generate`
    in each round.

    transformers prepares a generation config, processors, criteria and masks anew for every few tokens. Here a call of
    `generate` prepares them once, in the first round, and returns them instead of decoding. Rounds that must not end
    yet (`min_length`) and encoder-decoder drafts go the stock way.

    Args:
        generator ([`~transformers.generation.AssistedCandidateGenerator`]): Its `_generate_candidates` is replaced;
            lengths, masks and thresholds remain its own.
        length ([`AutoLength`], *optional*): Ends drafts instead of the generator's length and thresholds.
    """

    def __init__(self, generator: AssistedCandidateGenerator, length: AutoLength | None = None):
        # The generator owns this object. A strong reference back would keep caches until a garbage collection.
        self.generator, self.length = weakref.proxy(generator), length
        self.prepared: tuple | None = None
        generator._generate_candidates = self
        if length is not None:
            length.begin_call(ends_drafts=True, pauses=True)
            set_draft_length(generator, length.longest)
            for config in (generator.generation_config, generator.assistant_generation_config):
                config.assistant_confidence_threshold = 0.0

    def __call__(self, generation_args: dict) -> tuple[torch.LongTensor, torch.Tensor]:
        draft, kwargs = self.generator.assistant_model, self.generator.assistant_kwargs
        if kwargs.get("past_key_values") is None:  # after rounds without a draft the text is longer than the prompt
            length, is_encoder_decoder = (
                generation_args[self.generator.input_ids_key].shape[1],
                draft.config.is_encoder_decoder,
            )
            _prepare_attention_mask(kwargs, length, is_encoder_decoder)
            _prepare_position_ids(kwargs, length, is_encoder_decoder)
            _prepare_token_type_ids(kwargs, length)
        if generation_args["min_new_tokens"] or draft.config.is_encoder_decoder or "encoder_outputs" in kwargs:
            if self.length is not None:
                blind = self.length.blind()
                for limit in ("min_new_tokens", "max_new_tokens"):
                    generation_args[limit] = min(generation_args[limit], blind)
            return AssistedCandidateGenerator._generate_candidates(self.generator, generation_args)
        if self.prepared is None:
            # `min_new_tokens` of 0 would add a processor that looks for end tokens in the vocabulary and changes
            # nothing; without it a `min_length` of the draft's own would hold.
            generation_args |= {"min_new_tokens": None, "min_length": 0}
            self.prepared = draft.generate(**generation_args, **kwargs, custom_generate=_prepared)
            kwargs["past_key_values"] = self.prepared[2]["past_key_values"] = self._cache()
        return self._decode(generation_args["input_ids"], generation_args["max_new_tokens"])

    def _cache(self) -> Cache:
        """An empty cache for the draft: the one that its compiled step works in, if there is one and it is free."""
        draft, longest = self.generator.assistant_model, self.generator.main_model_max_length
        shared = shared_cache(draft) if runs_alone() else None  # rows side by side share forwards of other shapes
        cache = None if shared is None else shared.take(self, min(longest, context_of(draft) or longest))
        return self.prepared[2]["past_key_values"] if cache is None else cache

    @torch.no_grad()
    def _decode(self, ids: torch.LongTensor, count: int) -> tuple[torch.LongTensor, torch.Tensor]:
        """Up to `count` tokens after `ids` of shape `(1, length)`, all but the last of which are in the draft's
        cache."""
        generator, (processors, config, prepared) = self.generator, self.prepared
        draft, threshold = generator.assistant_model, generator.generation_config.assistant_confidence_threshold or 0.0
        # Masks and positions grow with the text. Those that the generator keeps up to date are taken from it, the
        # others are made from the text, as `generate` would in each round.
        own = {key: value for key, value in generator.assistant_kwargs.items() if value is not None}
        kwargs = prepared | {"attention_mask": None, "position_ids": None} | own
        if "attention_mask" in prepared and kwargs["attention_mask"] is None:
            kwargs["attention_mask"] = draft._prepare_attention_mask_for_generation(ids, config, {})
        if "position_ids" in prepared and kwargs["position_ids"] is None:
            kwargs["position_ids"] = draft._prepare_position_ids_for_generation(ids, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key in prepared}
        cache, scores = kwargs["past_key_values"], []
        ends = set() if config._eos_token_tensor is None else {*config._eos_token_tensor.tolist()}
        if self.length is not None:
            self.length.begin()
        for _ in range(count):
            inputs = draft.prepare_inputs_for_generation(
                ids, next_sequence_length=ids.shape[1] - cache.get_seq_length(), is_first_iteration=False, **kwargs
            )
            outputs = draft(**inputs, return_dict=True)
            if isinstance(cache, CroppableStaticCache):
                cache.held = ids.shape[1]
            kwargs = draft._update_model_kwargs_for_generation(outputs, kwargs)
            row = processors(ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device))
            probabilities = row.softmax(dim=-1)
            if config.do_sample:
                token = torch.multinomial(probabilities, num_samples=1)
            else:
                token = row.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, token], dim=-1)
            scores.append(row)
            # One copy from the device for both; a float holds every id below 2 ** 24.
            chosen, confidence = torch.cat([token, probabilities.gather(-1, token)], dim=-1)[0].tolist()
            if threshold:
                generator.probs.append(confidence)  # it adapts the threshold to these
            if confidence < threshold or (self.length is not None and not self.length.goes_on(confidence)):
                break
            if chosen in ends:
                break
        return ids, torch.stack(scores, dim=1)


def _prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs) -> tuple:
    """A decoding method for `custom_generate` that only returns what `generate` prepared."""
    return logits_processor, generation_config, model_kwargs


class ContextFullError(Exception):
    """The text fills the draft's context: there is no room for a candidate."""


def stay_within_context(generator: AssistedCandidateGenerator) -> None:
    """End drafts where the draft's context ends, which may be before the target's. Without room for a candidate
    `get_candidates` raises [`ContextFullError`]."""
    context = context_of(generator.assistant_model)
    if context is None:
        return
    # The generator owns this function; see `FastDraft`.
    prepare, generator_proxy = type(generator)._prepare_generation_args, weakref.proxy(generator)

    def within(input_ids: torch.LongTensor, min_new_tokens: int, max_new_tokens: int) -> dict:
        room = context - input_ids.shape[1]
        if room < 1:
            raise ContextFullError
        return prepare(generator_proxy, input_ids, min(min_new_tokens, room), min(max_new_tokens, room))

    generator._prepare_generation_args = within


def set_draft_length(generator: CandidateGenerator, length: int) -> None:
    """Let `generator` draft `length` tokens; raise `ValueError` if it takes no length."""
    if isinstance(generator, PromptLookupCandidateGenerator):
        generator.num_output_tokens = length
    elif isinstance(generator, AssistedCandidateGenerator):
        generator.num_assistant_tokens = length
        generator.assistant_generation_config.num_assistant_tokens_schedule = "constant"
    else:
        raise ValueError(
            f"`draft_length` cannot be set for {type(generator).__name__}. Leave it at None; "
            "the options of transformers decide."
        )
