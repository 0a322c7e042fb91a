"""The caches of several sequences as one, for the time of one forward: side by side as a batch, or end to end as one
sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def stack_masks(masks: list[torch.Tensor]) -> torch.Tensor:
    """Additive masks of shape `(1, 1, new, length)` one below the other, each at the left."""
    longest = max(mask.shape[-1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (0, longest - mask.shape[-1])) for mask in masks], 2)


class _Joined(Cache):
    """
    The caches of several sequences as one, for the time of a forward.

    Args:
        caches (`list[Cache]`): One for each sequence.
        news (`list[int]`): How many tokens the forward adds to each.
    """

    def __init__(self, caches: list[Cache], news: list[int]):
        super().__init__(layers=caches[0].layers)
        self.caches, self.news = caches, news
        self.lengths = [cache.get_seq_length() + new for cache, new in zip(caches, news, strict=True)]


class EndToEnd(_Joined):
    """One cache of a single sequence: attention sees the keys of one behind those of the other. The layers of `caches`
    must keep every key."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = zip(self.caches, key_states.split(self.news, 2), value_states.split(self.news, 2), strict=True)
        states = [cache.update(keys, values, layer_idx, *args, **kwargs) for cache, keys, values in parts]
        keys, values = zip(*states, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


class SideBySide(_Joined):
    """One cache of a batch. What a forward adds goes into the sequences' own caches; attention sees them aligned on
    the right. So sequences of different lengths need no room for each other, and cropping one moves nothing."""

    def __init__(self, caches: list[Cache], news: list[int]):
        kinds = {type(layer) for cache in caches for layer in cache.layers}
        if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(
                f"A batch needs caches of keys and values alone, got {names}. Ask for one prompt at a time."
            )
        super().__init__(caches, news)
        self.total = max(self.lengths)

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
        return self.total - max(self.news)

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes = (cache.get_mask_sizes(new, layer_idx) for cache, new in zip(self.caches, self.news, strict=True))
        longest = max(length for length, _ in sizes)
        return longest, self.total - longest


def align_masks(masks: list[torch.Tensor], cache: SideBySide) -> torch.Tensor:
    """Additive masks of shape `(1, 1, new, length)` as one, each at the lower right; queries that are padding see
    everything."""
    hidden = torch.finfo(masks[0].dtype).min
    aligned = masks[0].new_zeros(len(masks), 1, max(cache.news), cache.total)
    for i, (mask, new, length) in enumerate(zip(masks, cache.news, cache.lengths, strict=True)):
        aligned[i, :, -new:] = hidden
        aligned[i, :, -new:, -length:] = mask[0]
    return aligned


def _align(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of shape `(1, heads, length, head_dim)` as one, each at the right end."""
    longest = max(state.shape[2] for state in states)
    if all(state.shape[2] == longest for state in states):
        return torch.cat(states)
    aligned = states[0].new_zeros(len(states), states[0].shape[1], longest, states[0].shape[3])
    for i, state in enumerate(states):
        aligned[i, :, longest - state.shape[2] :] = state[0]
    return aligned
