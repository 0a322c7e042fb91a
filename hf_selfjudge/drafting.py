"""How candidates are drafted: what transformers does, at less cost and with a draft length that finds itself.

In: what `_get_candidate_generator` of transformers is given. Out: candidates. Knows nothing of rules.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


class FastDraft:
    """
    Drafts the same candidates as [`~transformers.generation.AssistedCandidateGenerator`] without a call of `generate`
    in each round.

    transformers prepares a generation config, processors, criteria and masks anew for every few tokens. Here
    `generate` prepares them once, in the first round, and hands them over instead of decoding. Rounds that must not
    end yet (`min_length`) and encoder-decoder drafts go the stock way.

    Args:
        generator ([`~transformers.generation.AssistedCandidateGenerator`]): Its `_generate_candidates` is replaced;
            lengths, masks and thresholds remain its own.
    """

    def __init__(self, generator: AssistedCandidateGenerator):
        self.generator, self.stock = generator, generator._generate_candidates
        self.prepared: tuple | None = None
        generator._generate_candidates = self

    def __call__(self, generation_args: dict) -> tuple[torch.LongTensor, torch.Tensor]:
        draft, kwargs = self.generator.assistant_model, self.generator.assistant_kwargs
        if generation_args["min_new_tokens"] or draft.config.is_encoder_decoder or "encoder_outputs" in kwargs:
            return self.stock(generation_args)
        if self.prepared is None:
            self.prepared = draft.generate(**generation_args, **kwargs, custom_generate=_prepared)
            kwargs["past_key_values"] = self.prepared[2]["past_key_values"]
        return self._decode(generation_args["input_ids"], generation_args["max_new_tokens"])

    @torch.no_grad()
    def _decode(self, ids: torch.LongTensor, count: int) -> tuple[torch.LongTensor, torch.Tensor]:
        """Up to `count` tokens behind `ids` of shape `(1, length)`; the draft's cache holds all but the last of
        them."""
        generator, (processors, config, prepared) = self.generator, self.prepared
        draft, threshold = generator.assistant_model, generator.generation_config.assistant_confidence_threshold
        # Masks and positions grow with the text; the generator keeps them up to date.
        kwargs = prepared | {key: value for key, value in generator.assistant_kwargs.items() if key in prepared}
        cache, ends, scores = kwargs["past_key_values"], config._eos_token_tensor, []
        for _ in range(count):
            inputs = draft.prepare_inputs_for_generation(
                ids, next_sequence_length=ids.shape[1] - cache.get_seq_length(), is_first_iteration=False, **kwargs
            )
            outputs = draft(**inputs, return_dict=True)
            kwargs = draft._update_model_kwargs_for_generation(outputs, kwargs)
            row = processors(ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device))
            if config.do_sample:
                token = torch.multinomial(row.softmax(dim=-1), num_samples=1)
            else:
                token = row.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, token], dim=-1)
            scores.append(row)
            if threshold:
                probability = row.softmax(dim=-1)[0, token[0, 0]].item()
                generator.probs.append(probability)  # it adapts the threshold to these
                if probability < threshold:
                    break
            if ends is not None and torch.isin(token, ends).any():
                break
        return ids, torch.stack(scores, dim=1)


def _prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs) -> tuple:
    """A decoding method for `custom_generate` that decodes nothing: it returns what `generate` prepared."""
    return logits_processor, generation_config, model_kwargs


class AutoLength:
    """
    Picks the draft length with the most expected tokens a second.

    With a share `a` of candidates kept, a draft of `k` tokens gives (1 − a^(k+1)) / (1 − a) tokens a round
    (https://huggingface.co/papers/2211.17192, equation 1), for `k` draft forwards and one verification of `k + 1`
    tokens. `a`, the seconds of a draft token and those of a verification of each length are running averages over the
    rounds of the call; lengths not tried yet count as much as the nearest that was.

    Args:
        first (`int`, defaults to 5): Length until there is something to go by, tokens.
        longest (`int`, defaults to 16): Tokens.
        memory (`float`, defaults to 0.9): Weight of the past when a round is added.
    """

    def __init__(self, first: int = 5, longest: int = 16, memory: float = 0.9):
        self.length, self.longest, self.memory = first, longest, memory
        self.kept, self.tested = 3.0, 4.0  # as if one round had kept 3 of 4
        self.draft_seconds: float | None = None
        self.verify_seconds: dict[int, float] = {}
        self.warm = False

    def observe(self, drafted: int, kept: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from a round; the first one, which also reads the prompt, says nothing of time."""
        self.kept = self.memory * self.kept + kept
        self.tested = self.memory * self.tested + min(kept + 1, drafted)
        if self.warm and drafted:
            self.draft_seconds = self._average(self.draft_seconds, draft_seconds / drafted)
            self.verify_seconds[drafted] = self._average(self.verify_seconds.get(drafted), verify_seconds)
            self.length = self._best()
        self.warm = True

    def _average(self, before: float | None, now: float) -> float:
        return now if before is None else self.memory * before + (1 - self.memory) * now

    def _best(self) -> int:
        lengths = np.arange(1, self.longest + 1)
        share = min(self.kept / self.tested, 0.999)
        tokens = (1 - share ** (lengths + 1)) / (1 - share)
        tried = sorted(self.verify_seconds)
        verify = np.interp(lengths, tried, [self.verify_seconds[k] for k in tried])
        return int(lengths[np.argmax(tokens / (lengths * self.draft_seconds + verify))])


def set_draft_length(generator: CandidateGenerator, length: int) -> None:
    """
    Raises:
        ValueError: If the length of this generator's drafts is not ours to choose.
    """
    if isinstance(generator, PromptLookupCandidateGenerator):
        generator.num_output_tokens = length
    elif isinstance(generator, AssistedCandidateGenerator):
        generator.num_assistant_tokens = length
    else:
        raise ValueError(
            f"`draft_length` cannot be set for {type(generator).__name__}. Leave it at None; what transformers itself "
            "is told about the length of drafts holds."
        )
