"""An answer, and continuations that leave it at different places, side by side in one cache.

In: a model and the cache of an answer. Out: logits and hidden states of whatever is fed to each branch. Knows nothing
of substitutions and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from .lockstep import rope_types
from .tap import ForwardTap, LayerInput


# Keys and values of each layer, `(heads, length, head_dim)`.
Keys = list[tuple[torch.Tensor, torch.Tensor]]

TRUNK, DEAD = -1, -2  # owners of cache slots that belong to no branch


@dataclass(eq=False)
class Branch:
    """A continuation: it sees the first `start` tokens of the answer, then the `length` tokens that were fed to it.
    `number` marks its slots in the cache."""

    number: int
    start: int
    length: int = 0


class Branches:
    """
    Branches of one answer, packed into one sequence: true position ids, and a mask in which a branch sees the answer
    before its start, and itself. The answer is computed once. The results are those of the branch alone, to rounding.

    Args:
        model ([`~transformers.PreTrainedModel`]): Its forward is called with one sequence.
        trunk (`Keys`): The cache of the answer.
        layer_states ([`LayerStates`], *optional*): Reads the states that enter one of the layers, not the last ones.
    """

    def __init__(self, model: PreTrainedModel, trunk: Keys, layer_states: Callable | None = None):
        self.model, self.layer_states = model, layer_states
        self.windows = attention_windows(model.config.get_text_config())
        self.cache = _cache_of(trunk)
        length, device = trunk[0][0].shape[1], trunk[0][0].device
        self.owner = torch.full((length,), TRUNK, device=device)
        self.position = torch.arange(length, device=device)
        self.count = 0

    def branch(self, start: int) -> Branch:
        """A new one that sees `start` tokens of the answer."""
        self.count += 1
        return Branch(self.count - 1, start)

    def feed(
        self, branches: Sequence[Branch], tokens: Sequence[torch.LongTensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One forward that adds `tokens[i]` of shape `(n_i,)` to `branches[i]`. Returns for each its logits
        `(n_i, vocab_size)` and hidden states `(n_i, hidden_size)`."""
        device, counts = self.owner.device, [len(new) for new in tokens]
        marks = torch.tensor([(branch.number, branch.start) for branch in branches], device=device)
        owner, start = marks.repeat_interleave(torch.tensor(counts, device=device), 0).T
        places = []
        for branch, n in zip(branches, counts, strict=True):
            places.append(branch.start + branch.length + torch.arange(n, device=device))
            branch.length += n
        position = torch.cat(places)
        self.owner, self.position = torch.cat([self.owner, owner]), torch.cat([self.position, position])
        trunk = (self.owner == TRUNK) & (self.position < start[:, None])
        sees = (trunk | (self.owner == owner[:, None])) & (self.position <= position[:, None])
        dtype = self.cache.layers[0].keys.dtype
        masks = additive_masks(sees[None], position[None], self.position[None], self.windows, dtype)
        output = self._forward(torch.cat(list(tokens)), position, masks)
        return list(zip(*(rows.split(counts) for rows in output), strict=True))

    def _forward(
        self, tokens: torch.LongTensor, position: torch.LongTensor, mask: torch.Tensor | dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(n, vocab_size)` and hidden states `(n, hidden_size)` of `tokens` after the cache."""
        rows = []

        def note(hidden: torch.Tensor, logits: torch.Tensor, entered: LayerInput | None = None) -> None:
            hidden = hidden if entered is None else self.layer_states(entered, 0)
            rows.append((logits[0], hidden[0, -logits.shape[1] :]))

        text = {"input_ids": tokens[None], "position_ids": position[None], "attention_mask": mask}
        with ForwardTap(self.model, note, None if self.layer_states is None else self.layer_states.entering):
            self.model(**text, past_key_values=self.cache, use_cache=True, return_dict=True)
        return rows[0]

    def cut(self, branch: Branch, length: int) -> None:
        """Forget all but the first `length` tokens of a branch."""
        self.owner[(self.owner == branch.number) & (self.position >= branch.start + length)] = DEAD
        branch.length = length
        alive = self.owner != DEAD
        if alive.sum() < 0.8 * len(alive):  # copying once costs less than attending to what nobody sees
            kept = alive.nonzero()[:, 0]
            for layer in self.cache.layers:  # they may be on several devices
                index = kept.to(layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
            self.owner, self.position = self.owner[alive], self.position[alive]


class Alone(Branches):
    """The same for a model that cannot take such a mask: one branch, in a cache of its own."""

    def __init__(self, model: PreTrainedModel, trunk: Keys, layer_states: Callable | None = None):
        self.model, self.trunk, self.layer_states = model, trunk, layer_states

    def branch(self, start: int) -> Branch:
        self.cache = _cache_of([(keys[:, :start], values[:, :start]) for keys, values in self.trunk])
        return Branch(0, start)

    def feed(
        self, branches: Sequence[Branch], tokens: Sequence[torch.LongTensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        (branch,), (new,) = branches, tokens
        length = branch.start + branch.length
        branch.length += len(new)
        position = torch.arange(length, length + len(new), device=new.device)
        return [self._forward(new, position, new.new_ones(1, length + len(new)))]

    def cut(self, branch: Branch, length: int) -> None:
        if length < branch.length:
            self.cache.crop(length - branch.length)
        branch.length = length


def _cache_of(trunk: Keys) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(trunk):
        cache.update(keys[None], values[None], index)
    return cache


def attention_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """For each kind of attention that a model has, how many tokens it sees (`None`: all). Empty if that does not tell
    the mask: for attention with a window of its own (GPT-Neo's local attention), and for positions whose frequencies
    follow the longest sequence of a forward."""
    config = config.to_dict()
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ["sliding_attention" if window else "full_attention"])
    kinds |= set(config.get("attention_layers") or ()) - {"global"}
    if kinds - {"full_attention", "sliding_attention"} or rope_types(config) & {"dynamic", "longrope"}:
        return {}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def additive_masks(
    sees: torch.BoolTensor,
    position: torch.LongTensor,
    positions: torch.LongTensor,
    windows: dict[str, int | None],
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Masks in which new tokens see what they may.

    Args:
        sees (`torch.BoolTensor` of shape `(batch, new, length)`): Which of all tokens each new one sees.
        position (`torch.LongTensor` of shape `(batch, new)`): Of the new tokens.
        positions (`torch.LongTensor` of shape `(batch, length)`): Of all tokens.
        windows (`dict[str, int | None]`): See [`attention_windows`].

    Returns:
        `torch.Tensor` of shape `(batch, 1, new, length)`; one for each kind of attention if there are several.
    """
    masks = {}
    for kind, window in windows.items():
        near = sees if window is None else sees & (position[..., None] - positions[:, None] < window)
        masks[kind] = torch.zeros(near.shape, dtype=dtype, device=near.device)
        masks[kind] = masks[kind].masked_fill_(~near, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


_packs: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def packs(model: PreTrainedModel) -> bool:
    """
    Whether branches of this model can share a forward. Found by trying once for each model: two branches of a short
    text, the later one fed first, are compared with the same tokens without a cache. It fails for models that take
    positions from the order of their cache (ALiBi), keep states other than keys and values, or whose attention takes
    no mask.
    """
    decoder = model.get_decoder()  # what copies of a model share
    if decoder not in _packs:
        _packs[decoder] = _try_to_pack(model)
    return _packs[decoder]


@torch.no_grad()
def _try_to_pack(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    # FlashAttention takes no such mask, and would read behind the end of its input instead of saying so.
    if not attention_windows(config) or "flash" in str(config._attn_implementation):
        return False
    ids = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).to(model.device)
    starts, tails = (16, 8), ids[16:].split(4)
    plain = [_hidden(model, torch.cat([ids[:start], tail]))[-4:] for start, tail in zip(starts, tails, strict=True)]
    try:
        cache = DynamicCache()
        _hidden(model, ids[:16], cache)
        branches = Branches(model, [(layer.keys[0], layer.values[0]) for layer in cache.layers])
        packed = [hidden for _, hidden in branches.feed([branches.branch(start) for start in starts], tails)]
    except (TypeError, ValueError, RuntimeError, LookupError):  # raised for what a forward does not support
        return False
    difference = torch.stack(
        [(a - b).float().norm() / b.float().norm() for a, b in zip(packed, plain, strict=True)]
    ).max()
    return bool(difference < torch.finfo(plain[0].dtype).eps ** 0.5)


def _hidden(model: PreTrainedModel, ids: torch.LongTensor, cache: DynamicCache | None = None) -> torch.Tensor:
    rows = []
    with ForwardTap(model, lambda hidden, logits: rows.append(hidden[0])):
        model(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None)
    return rows[0]
