"""TODO."""

from __future__ import annotations

import copy

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model can attend to; `None` if its positions have no end."""
    # Some kinds of config know it by another name, others not at all.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def greedy(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding. `generate` fills in what it leaves open from the model's own `generation_config`, so that
    it has to stand in the place of that one ([`decoding_greedily`])."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad_token(model),
    )


def decoding_greedily(model: PreTrainedModel, max_new_tokens: int) -> PreTrainedModel:
    """A copy of a model, with the same weights, that decodes greedily whatever penalties, sampling and limits its own
    `generation_config` carries."""
    model = copy.copy(model)
    model.generation_config = greedy(model, max_new_tokens)
    return model


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end the model's text."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def pad_token(model: PreTrainedModel) -> int:
    """The padding token; any token serves behind an attention mask."""
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else next(iter(eos_tokens(model)), 0)


def until_eos(tokens: torch.LongTensor, eos: list[int]) -> tuple[torch.LongTensor, bool]:
    """Cut after the first EOS; returns the tokens and whether one was found."""
    ends = torch.isin(tokens, torch.tensor(eos, dtype=tokens.dtype, device=tokens.device)).nonzero()
    return (tokens[: int(ends[0]) + 1], True) if len(ends) else (tokens, False)


def special_tokens(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that no rule may accept against the target, nor overrule: EOS and every other special token, those too
    that were added without a role (`<|im_start|>` and its like), which `tokenizer.all_special_ids` leaves out."""
    decoder = tokenizer.added_tokens_decoder  # mistral-common has none, but names all
    added = [token for token, content in decoder.items() if content.special] if isinstance(decoder, dict) else []
    return sorted({*tokenizer.all_special_ids, *added, *eos_tokens(target)})
