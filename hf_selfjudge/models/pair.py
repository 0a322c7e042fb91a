"""In: the name of a known pair, or the names of two models. Out: a [`Pair`], set up so that runs can be compared."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .cpu import takes_packed
from .load import load_model
from .tokens import context_of, eos_tokens, special_tokens


PAIRS = {"qwen2.5-coder": ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")}
LOOKUP = "prompt lookup"  # instead of a draft's name
# What a generation config says about the lengths of drafts.
LENGTHS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
DRAFT_MODEL = "a draft model"  # the alternative to it


@dataclass(frozen=True, eq=False)
class Pair:
    """
    A target and what drafts for it.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model whose text is wanted.
        draft ([`~transformers.PreTrainedModel`], *optional*): Proposes candidates; `None` for prompt lookup. It must
            have as many embeddings as the target ([`fit_vocabulary`]); if not, there is a `ValueError`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of both.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self):
        sizes = [model.config.get_text_config().vocab_size for model in self.models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`draft` has a vocabulary of {sizes[0]} tokens, the target one of {sizes[1]}. Candidates are "
                "compared token by token: use a draft with the target's tokenizer; `fit_vocabulary` gives it as many "
                "embeddings."
            )

    @property
    def models(self) -> list[PreTrainedModel]:
        """The draft, if there is one, and the target."""
        return [self.target] if self.draft is None else [self.draft, self.target]

    @functools.cached_property
    def special_tokens(self) -> list[int]:
        """Tokens that no rule may accept against the target, nor overrule; see [`special_tokens`]."""
        return special_tokens(self.target, self.tokenizer)

    @property
    def end_tokens(self) -> list[int]:
        """Tokens that end the target's text."""
        return eos_tokens(self.target)

    @property
    def context(self) -> int | None:
        """Number of tokens that the target can attend to; `None` if there is no limit."""
        return context_of(self.target)


def parse_pair(pair: str, with_draft: bool = True) -> tuple[str, str | None]:
    """Read `--pair`: a name of [`PAIRS`] or `TARGET,DRAFT`, each a Hub id or a folder; without a draft model, `TARGET`
    alone is enough. A `ValueError` for anything else."""
    if pair in PAIRS:
        return PAIRS[pair]
    parts = [part.strip() for part in pair.split(",")]
    if not with_draft and len(parts) == 1 and all(parts):
        return parts[0], None
    if len(parts) != 2 or not all(parts):
        raise ValueError(
            f"`pair` must be one of {sorted(PAIRS)} or 'TARGET,DRAFT' (Hub ids or folders), got {pair!r}."
        )
    return parts[0], parts[1]


def load_pair(
    pair: str,
    draft_length: int | str | None = 5,
    dtype: torch.dtype | None = None,
    with_draft: bool = True,
    device_map: str | dict[str, str | int] | None = None,
    low_bit_draft: bool = False,
    compile_draft: bool = False,
) -> Pair:
    """
    Load a target, its draft and their tokenizer.

    Args:
        pair (`str`): See [`parse_pair`].
        draft_length (`int` or `"auto"`, *optional*): See [`load_draft`].
        dtype (`torch.dtype`, *optional*): See [`load_model`].
        with_draft (`bool`): Whether to load the draft model; if not, drafts come from prompt lookup.
        device_map (`str` or `dict`, *optional*): Where the target is; see [`load_model`]. The draft is in memory.
        low_bit_draft, compile_draft (`bool`): Whether the draft has low-bit weights, or is compiled; see
            [`load_model`].

    Raises:
        ValueError: If the draft has another tokenizer.
        SourceError: If no source has one of the models.
    """
    target_name, draft_name = parse_pair(pair, with_draft)
    target, tokenizer = load_model(target_name, dtype, device_map=device_map)
    draft = (
        load_draft(draft_name, target, tokenizer, draft_length, dtype, low_bit_draft, compile_draft)
        if with_draft
        else None
    )
    return Pair(target, draft, tokenizer)


def load_draft(
    reference: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft_length: int | str | None = 5,
    dtype: torch.dtype | None = None,
    low_bit: bool = False,
    compile: bool = False,
) -> PreTrainedModel:
    """
    Load a draft. See [`load_model`] for `reference`, `dtype`, `low_bit` and `compile`.

    Args:
        target, tokenizer: What it drafts for. The draft gets as many embeddings as the target ([`fit_vocabulary`]).
        draft_length (`int` or `"auto"`, *optional*): Candidates that it proposes in each round, whatever its
            confidence, so that runs can be compared; 5 for `"auto"`, which a [`JudgedModel`] then adapts. `None`
            leaves the lengths to transformers.

    Raises:
        ValueError: If the draft has another tokenizer.
    """
    draft, own = load_model(reference, dtype, low_bit, compile=compile)
    if not same_tokens(tokenizer, own):
        raise ValueError(
            f"`pair`: {reference} has another tokenizer than {target.config.name_or_path}, and tokens are compared "
            "one by one here. Choose a draft of the target's family."
        )
    draft = fit_vocabulary(draft, target.config.get_text_config().vocab_size)
    if draft_length is not None:
        draft.generation_config = with_lengths(draft.generation_config, draft_length)
    return draft


def with_lengths(config: GenerationConfig, draft_length: int | str) -> GenerationConfig:
    """A copy of a draft's generation config with which each draft has this many tokens, whatever its confidence: 5 for
    `"auto"`, and for `"default"` what transformers chooses."""
    lengths = (5 if draft_length == "auto" else draft_length, "constant", 0.0)
    config = copy.deepcopy(config)
    for name, value in zip(LENGTHS, (None,) * 3 if draft_length == "default" else lengths, strict=True):
        setattr(config, name, value)
    return config


def with_fast_draft(pair: Pair, reference: str) -> Pair:
    """The pair with the fastest draft that this machine has: on a CPU with the kernels for it (x86), the draft
    `reference` with low-bit weights. Its lengths are left to transformers."""
    if pair.draft.device.type != "cpu" or not takes_packed():
        return pair
    return replace(pair, draft=load_draft(reference, pair.target, pair.tokenizer, None, low_bit=True))


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether each id means the same token in both tokenizers. One of them may have more tokens."""
    return first is second or _same_vocabulary(first, second, len(first), len(second))


@functools.lru_cache(maxsize=8)  # large vocabularies take a second
def _same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, *sizes: int) -> bool:
    names = {number: token for token, number in first.get_vocab().items()}
    return all(names.get(number, token) == token for token, number in second.get_vocab().items())


def fit_vocabulary(draft: PreTrainedModel, size: int) -> PreTrainedModel:
    """
    A draft as if its embeddings had `size` rows. Models that share a tokenizer may still differ in that number: it is
    rounded up for the hardware (Qwen2.5: 151,936 rows in the 0.5B model and 152,064 in the 7B one).
    Returns `draft` itself if it has that many; else a copy that shares its weights. Tokens beyond its own rows get the
    lowest logit, and as an input the last of its own rows.
    """
    own = draft.config.get_text_config().vocab_size
    if own == size:
        return draft
    fitted, forward = copy.copy(draft), draft.forward
    fitted.config = copy.deepcopy(draft.config)
    fitted.config.get_text_config().vocab_size = size

    @functools.wraps(forward)  # `generate` looks at the signature
    def resized(input_ids: torch.LongTensor, *args, **kwargs) -> ModelOutput:
        output = forward(input_ids.clamp(max=own - 1), *args, **kwargs)
        lowest = output.logits.amin(-1, keepdim=True).expand(*output.logits.shape[:-1], max(0, size - own))
        output.logits = torch.cat([output.logits[..., :size], lowest], dim=-1)
        return output

    fitted.forward = resized
    return fitted
