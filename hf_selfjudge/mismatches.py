"""Prompt -> target answer -> where the draft disagrees.

In: prompts, a target and a draft. Out: for each prompt an [`Answer`] (the target's greedy text, with the cache that
came with it) and its mismatches. Knows nothing of what a mismatch costs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .sources import Prompt, encode


@dataclass
class Answer:
    """
    The target's own greedy answer to a prompt, with the cache that generating it left behind.

    Args:
        prompt ([`Prompt`]): What was asked.
        ids (`torch.LongTensor` of shape `(prompt_length + answer_length,)`): Prompt and answer.
        prompt_length (`int`): Tokens of the prompt.
        finished (`bool`): Whether the target ended the answer by itself.
        cache (`list[tuple[torch.Tensor, torch.Tensor]]`, *optional*): Keys and values of each layer, of shape
            `(heads, prompt_length + answer_length - 1, head_dim)`; `None` where a layer is not plain full attention.
    """

    prompt: Prompt
    ids: torch.LongTensor
    prompt_length: int
    finished: bool
    cache: list[tuple[torch.Tensor, torch.Tensor]] | None

    @property
    def tokens(self) -> torch.LongTensor:
        """The answer alone, of shape `(answer_length,)`; ends with EOS if `finished`."""
        return self.ids[self.prompt_length :]


@dataclass
class Mismatches:
    """
    Where the draft's choice is not the answer's token.

    Args:
        answer ([`Answer`]): The answer they lie in.
        positions (`torch.LongTensor` of shape `(mismatches,)`): Index into `answer.tokens`.
        substitutes (`torch.LongTensor` of shape `(mismatches,)`): The draft's tokens.
        draft_logits (`torch.FloatTensor` of shape `(mismatches, vocab_size)`): The draft's, where it chose them.
        total (`int`): Mismatches in the answer before sampling.
    """

    answer: Answer
    positions: torch.LongTensor
    substitutes: torch.LongTensor
    draft_logits: torch.Tensor
    total: int

    def __len__(self) -> int:
        return len(self.positions)


def greedy(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, whatever penalties and sampling the model's own `generation_config` carries."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad_token(model),
    )


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


def left_pad(rows: list[torch.LongTensor], pad: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Stack rows of different lengths; returns ids and attention mask, both of shape `(rows, longest)`."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([(torch.arange(width, device=row.device) >= width - len(row)).long() for row in rows])
    return ids, mask


@torch.no_grad()
def target_answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
) -> list[Answer]:
    """
    The target's greedy answers to a batch of prompts.

    Raises:
        ValueError: If a prompt is empty or does not fit (see [`encode`]).
    """
    context = target.config.get_text_config().max_position_embeddings
    rows = [encode(tokenizer, p.text, context, max_new_tokens)[0].to(target.device) for p in prompts]
    ids, mask = left_pad(rows, pad_token(target))
    output = target.generate(ids, attention_mask=mask, generation_config=greedy(target, max_new_tokens))
    width, layers = ids.shape[1], output.past_key_values.layers
    plain = all(type(layer) is DynamicLayer for layer in layers)
    answers = []
    for j, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens, finished = until_eos(output.sequences[j, width:], eos_tokens(target))
        held = slice(width - len(row), width + len(tokens) - 1)  # the last token was never fed back
        cache = [(layer.keys[j, :, held], layer.values[j, :, held]) for layer in layers] if plain else None
        answers.append(Answer(prompt, torch.cat([row, tokens]), len(row), finished, cache))
    return answers


@torch.no_grad()
def find_mismatches(draft: PreTrainedModel, answer: Answer, never: list[int], limit: int, seed: int) -> Mismatches:
    """
    Run the draft once over the answer (teacher-forced) and sample from the positions where its first choice differs
    from the answer's token.

    Args:
        never (`list[int]`): Special tokens. They are never accepted against the target, nor overruled, so a mismatch
            with one on either side teaches nothing.
        limit (`int`): Mismatches to keep, sampled evenly without replacement.
        seed (`int`): Of the sample; together with the prompt's id, so that it does not depend on the order of prompts.
    """
    chosen, keep = answer.tokens, len(answer.tokens) + 1  # the row before each token, and the one after the last
    draft_logits = draft(answer.ids[None].to(draft.device), logits_to_keep=keep).logits[0, -keep:-1].to(chosen.device)
    proposed = draft_logits.argmax(-1)
    special = torch.tensor(never, dtype=chosen.dtype, device=chosen.device)
    differ = (proposed != chosen) & ~torch.isin(proposed, special) & ~torch.isin(chosen, special)
    positions = differ.nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(answer.prompt.id.encode()))
    sample = torch.randperm(len(positions), generator=generator)[:limit].sort().values.to(positions.device)
    picked = positions[sample]
    return Mismatches(answer, picked, proposed[picked], draft_logits[picked].float(), len(positions))


def batched(items: list, size: int) -> Iterator[list]:
    """Consecutive chunks of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))
