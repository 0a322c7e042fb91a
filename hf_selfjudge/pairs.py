"""A known pair, or two names -> target, draft and tokenizer, set up so that runs can be compared; and a writer of
answers that are decoded with a judge.

In: names of models. Out: models, and who writes answers in place of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .drafting import fit_vocabulary, same_tokens
from .generation import JudgedModel
from .mining import Writer
from .mismatches import decoding_greedily, eos_tokens, until_eos
from .sources import load_model, parse_pair


def load_draft(
    reference: str,
    length: int | str,
    like: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> PreTrainedModel:
    """
    A draft that proposes `length` tokens a round (5 where that is `auto`), whatever its confidence: so that runs can
    be compared.

    Args:
        like (`tuple`): The target and its tokenizer. Embeddings of a family may be padded to different sizes; the
            draft gets as many as the target.

    Raises:
        ValueError: If the draft has another tokenizer.
    """
    target, tokenizer = like
    draft, own = load_model(reference, dtype, int8)
    if not same_tokens(tokenizer, own):
        raise ValueError(
            f"`pair`: {reference} has another tokenizer than {target.config.name_or_path}, and tokens are compared "
            "one by one here. Choose a draft of the target's family."
        )
    draft = fit_vocabulary(draft, target.config.get_text_config().vocab_size)
    draft.generation_config.num_assistant_tokens = 5 if length == "auto" else length
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def load_pair(
    pair: str, draft_length: int | str, dtype: torch.dtype | None, with_draft: bool = True
) -> tuple[PreTrainedModel, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """
    Target, draft (if it is wanted) and their tokenizer.

    Raises:
        ValueError: If the draft has another tokenizer.
    """
    target_id, draft_id = parse_pair(pair, with_draft)
    target, tokenizer = load_model(target_id, dtype)
    return target, load_draft(draft_id, draft_length, (target, tokenizer), dtype) if with_draft else None, tokenizer


def judged_writer(judged: JudgedModel, draft: PreTrainedModel | None, lookup: int) -> Writer:
    """Answers that are decoded with a judge, greedily; without a draft, `lookup` tokens are looked up in a round."""
    drafts = {} if draft is None else {"assistant_model": draft}

    def write(prompts: Sequence[torch.LongTensor], max_new_tokens: int) -> list[torch.LongTensor]:
        width, target = max(row.shape[1] for row in prompts), decoding_greedily(judged.target, max_new_tokens)
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in prompts])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in prompts])
        target.generation_config.prompt_lookup_num_tokens = lookup or None
        rows = judged.on(target).generate(ids, attention_mask=mask, **drafts)
        return [until_eos(row[width:], eos_tokens(judged.target))[0] for row in rows]

    return write
