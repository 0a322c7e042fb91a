"""What a model and its tokenizer say of decoding: special tokens, end tokens, context, greedy decoding."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def context_of(model: PreTrainedModel) -> int | None:
    """Number of tokens that a model can attend to; `None` if there is no limit."""
    # Some configs have another name for it, others have no such limit.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def greedy(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """Options of plain greedy decoding. `generate` fills unset options from the model's own `generation_config`, so
    this has to replace that one ([`decoding_greedily`])."""
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    if pad is None:  # padding is masked, any token will do
        pad = next(iter(eos_tokens(model)), 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0, eos_token_id=eos, pad_token_id=pad
    )


def decoding_greedily(model: PreTrainedModel, max_new_tokens: int) -> PreTrainedModel:
    """A copy of a model, with the same weights, that decodes greedily whatever penalties, sampling and limits are in
    its own `generation_config`."""
    model = copy.copy(model)
    model.generation_config = greedy(model, max_new_tokens)
    return model


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end the model's text."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def until_eos(tokens: torch.LongTensor, eos: list[int]) -> tuple[torch.LongTensor, bool]:
    """The tokens up to the first end token and with it, and whether there is one."""
    ends = torch.isin(tokens, torch.tensor(eos, dtype=tokens.dtype, device=tokens.device)).nonzero()
    return (tokens[: int(ends[0]) + 1], True) if len(ends) else (tokens, False)


def common_prefix(tokens: list[int], others: list[int]) -> int:
    """How many tokens come before the first that differs from that of `others` in its place."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(tokens), len(others)))


def before_special(tokens: Sequence[int], special_tokens: Collection[int]) -> int:
    """How many tokens come before the first special one."""
    return next((i for i, token in enumerate(tokens) if token in special_tokens), len(tokens))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All special tokens of a tokenizer. Those that were added without a role (such as `<|im_start|>`), which
    `tokenizer.all_special_ids` lacks, are among them."""
    decoder = tokenizer.added_tokens_decoder  # none with mistral-common, whose `all_special_ids` is complete
    added = [token for token, content in decoder.items() if content.special] if isinstance(decoder, dict) else []
    return {*tokenizer.all_special_ids, *added}


def special_tokens(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that no rule may accept against the target, nor overrule: end tokens and all other special tokens."""
    return sorted(special_ids(tokenizer).union(eos_tokens(target)))
