"""Several sequences in one forward, with their caches as one: side by side as a batch, or end to end as one sequence.

In: the arguments of each sequence's forward. Out: the arguments of a joint one; its outputs, split again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


Mask = torch.Tensor | dict[str, torch.Tensor] | None


def is_pairwise(mask: Mask) -> bool:
    """Whether a mask says for each pair of tokens who sees whom, instead of where padding is."""
    return isinstance(mask, dict) or (mask is not None and mask.dim() == 4)


class _Joined(Cache):
    """
    The caches of several sequences as one, for the time of a forward.

    Args:
        rows (`list[dict]`): For each sequence the arguments that its own forward would get.

    Attributes:
        news, lengths, keeps (`list[int]`): For each sequence how many tokens the forward adds, how many there are
            then, and for how many of the added ones logits are computed.
    """

    def __init__(self, rows: list[dict]):
        self.caches = [row["past_key_values"] for row in rows]
        super().__init__(layers=self.caches[0].layers)
        self.keeps = self.news = [row["input_ids"].shape[1] for row in rows]
        self.lengths = [cache.get_seq_length() + new for cache, new in zip(self.caches, self.news, strict=True)]

    def _join_masks(self, masks: list[Mask]) -> Mask:
        """Pairwise masks of all sequences as one; where they are dicts, one for each kind of attention."""
        if isinstance(masks[0], dict):
            return {kind: self._join_masks([mask[kind] for mask in masks]) for kind in masks[0]}
        return self._join_mask(masks)


class EndToEnd(_Joined):
    """One sequence, for attention that keeps its parts apart ([`end_to_end`]). The layers of the caches must keep
    every key."""

    def arguments(self, rows: list[dict]) -> dict:
        """Of the joint forward, apart from the cache."""
        ids, positions = (torch.cat([row[name] for row in rows], -1) for name in ("input_ids", "position_ids"))
        masks = self._join_masks([row["attention_mask"] for row in rows])
        return {"input_ids": ids, "position_ids": positions, "attention_mask": masks}

    def _join_mask(self, masks: list[torch.Tensor]) -> torch.Tensor:
        longest = max(self.lengths)
        return torch.cat([pad(mask, (0, longest - mask.shape[-1])) for mask in masks], 2)

    def split(self, states: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
        """Outputs of shape `(1, tokens, …)` for each sequence, which has `sizes[i]` of them."""
        return states.split(sizes, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = zip(self.caches, key_states.split(self.news, 2), value_states.split(self.news, 2), strict=True)
        states = [cache.update(keys, values, layer_idx, *args, **kwargs) for cache, keys, values in parts]
        keys, values = zip(*states, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


class SideBySide(_Joined):
    """A batch. What a forward adds goes into the sequences' own caches; attention sees them aligned on the right. So
    sequences of different lengths need no room for each other, and cropping one moves nothing."""

    def __init__(self, rows: list[dict]):
        super().__init__(rows)
        kinds = {type(layer) for cache in self.caches for layer in cache.layers}
        if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(
                f"A batch needs caches of keys and values alone, got {names}. Decode one prompt at a time."
            )
        self.keeps = [row["logits_to_keep"] or new for row, new in zip(rows, self.news, strict=True)]
        self.new, self.total = max(self.news), max(self.lengths)

    def arguments(self, rows: list[dict]) -> dict:
        """Of the joint forward, apart from the cache. Padding is on the left."""
        positions, masks = ([row[name] for row in rows] for name in ("position_ids", "attention_mask"))
        ids = [pad(row["input_ids"], (self.new - new, 0)) for row, new in zip(rows, self.news, strict=True)]
        batch = {"input_ids": torch.cat(ids)}
        if positions[0] is not None:
            batch["position_ids"] = torch.cat([pad(row, (self.new - row.shape[-1], 0)) for row in positions], -2)
        if is_pairwise(masks[0]):
            batch["attention_mask"] = self._join_masks(masks)
        else:
            batch["attention_mask"] = ids[0].new_zeros(len(rows), self.total)
            for row, mask, length in zip(batch["attention_mask"], masks, self.lengths, strict=True):
                row[-length:] = 1 if mask is None else mask[0]
        if all(row["logits_to_keep"] for row in rows):
            batch["logits_to_keep"] = max(self.keeps)
        return batch

    def _join_mask(self, masks: list[torch.Tensor]) -> torch.Tensor:
        hidden = torch.finfo(masks[0].dtype).min
        wide = [pad(mask, (self.total - mask.shape[-1], 0), value=hidden) for mask in masks]
        return torch.cat([pad(mask, (0, 0, self.new - mask.shape[-2], 0)) for mask in wide])

    def split(self, states: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
        """Outputs of shape `(batch, tokens, …)` for each sequence, which has the last `sizes[i]` of its row."""
        return [states[i : i + 1, -size:] for i, size in enumerate(sizes)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = [
            cache.update(key_states[i, None, :, -new:], value_states[i, None, :, -new:], layer_idx, *args, **kwargs)
            for i, (cache, new) in enumerate(zip(self.caches, self.news, strict=True))
        ]
        keys, values = zip(*states, strict=True)
        return _align(keys), _align(values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.total - self.new

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes = (cache.get_mask_sizes(new, layer_idx) for cache, new in zip(self.caches, self.news, strict=True))
        longest = max(length for length, _ in sizes)
        return longest, self.total - longest


def _align(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of shape `(1, heads, length, head_dim)` as one, each at the right end."""
    longest = max(state.shape[2] for state in states)
    if all(state.shape[2] == longest for state in states):
        return torch.cat(states)
    aligned = states[0].new_zeros(len(states), states[0].shape[1], longest, states[0].shape[3])
    for i, state in enumerate(states):
        aligned[i, :, longest - state.shape[2] :] = state[0]
    return aligned
