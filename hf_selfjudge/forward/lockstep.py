"""Several calls of `generate` side by side in one thread: forwards that wait at the same time are computed as one.

In: models and calls. Out: what the calls return. Knows nothing of drafts and rules.

`generate` is ordinary code that calls `model.forward` deep inside, and cannot be paused there by a generator or by
`async`. A greenlet can: it is a coroutine with a call stack of its own, which may be left in any function and resumed
later. Each call runs in one, and gets a stand-in for each model, whose `forward` does not compute but switches back to
[`run_in_lockstep`] with a [`Request`]. When all calls wait, the forwards of one model are computed as a batch, and
each call is resumed with its own rows. So a call behaves as if it were alone, and nothing in it is written for
batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.attention import end_to_end, takes_end_to_end
from .caches import EndToEnd, SideBySide, align_masks, stack_masks
from .tap import ForwardTap, without_taps


T = TypeVar("T")

# What a forward may be given; the arguments of one row are put together with those of the others.
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")


@torch.no_grad()
def run_in_lockstep(
    models: Sequence[PreTrainedModel],
    calls: Sequence[Callable[..., T]],
    seeds: Sequence[int] | None = None,
    at_once: int | None = None,
    tally: Tally | None = None,
) -> list[T]:
    """
    Run calls side by side.

    Args:
        models (`Sequence[PreTrainedModel]`): The models whose forwards are computed together. Where several wait, the
            one listed first is run first: list a draft before its target.
        calls (`Sequence[Callable]`): Each is called once, with a stand-in for each of `models`, and passes it one
            sequence at a time, with a cache.
        seeds (`Sequence[int]`, *optional*): For each call the seed of its random numbers (CPU and CUDA): it draws the
            same as if run alone after `torch.manual_seed(seed)`.
        at_once (`int`, *optional*): How many run at a time; the next one starts when one has ended.
        tally ([`Tally`], *optional*): Counts the forwards of the last of `models`.

    Returns:
        What the calls return, in their order. If one raises, the others are ended too, and it is raised here.
    """
    hub = getcurrent()
    rows = [
        _Call(Coroutine(functools.partial(call, *(_stand_in(model, i, hub) for i, model in enumerate(models)))), seed)
        for call, seed in zip(calls, [None] * len(calls) if seeds is None else seeds, strict=True)
    ]
    later, waiting = deque(rows), []
    try:
        while True:
            waiting = [row for row in waiting if row.request is not None]
            while later and len(waiting) < (at_once or len(rows)):
                row = later.popleft()
                row.resume()
                if row.request is not None:
                    waiting.append(row)
            if not waiting:
                return [row.result for row in rows]
            if meeting := [row for row in waiting if isinstance(row.request, Meeting)]:
                values = [row.request.value for row in meeting]
                for row in meeting:
                    row.resume(values)
                continue
            first = min(row.request.model for row in waiting)
            parts = _group(models[first], [row for row in waiting if row.request.model == first])
            outputs = [_forward(models[first], [row.request for row in part]) for part in parts]
            if tally is not None and first == len(models) - 1:
                tally.forwards += len(parts)
                tally.tokens += sum(row.request.tokens for row in itertools.chain(*parts))
            for row, output in zip(itertools.chain(*parts), itertools.chain(*outputs), strict=True):
                row.resume(output)
    finally:
        for row in rows:
            row.coroutine.throw(GreenletExit)  # does nothing to those that have returned


@dataclass
class Tally:
    """What was computed: forwards, and tokens fed to them (padding not counted)."""

    forwards: int = 0
    tokens: int = 0


@dataclass
class Request:
    """A forward that a call waits for: of which model, with which arguments, and which layers are looked at."""

    model: int
    arguments: dict
    layers: list[torch.nn.Module] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.arguments["input_ids"].shape[1]

    @property
    def masked(self) -> bool:
        """Whether it says for each pair of tokens who sees whom, instead of where padding is."""
        mask = self.arguments.get("attention_mask")
        return isinstance(mask, dict) or (mask is not None and mask.dim() == 4)


@dataclass
class Meeting:
    """What a call tells the others, waiting for what they tell."""

    value: object


def exchange(value: T) -> list[T]:
    """What the calls side by side say at this point of their decoding, `value` among it; alone, just `[value]`."""
    current = getcurrent()
    return current.parent.switch(Meeting(value)) if isinstance(current, Coroutine) else [value]


class Coroutine(greenlet):
    """One of the calls; others than ours may run in greenlets of their own."""


class _Call:
    """One call in its coroutine: the request that it waits for, or its result. With a seed it has random numbers of
    its own."""

    def __init__(self, coroutine: Coroutine, seed: int | None):
        self.coroutine, self.seed = coroutine, seed
        self.coroutine.gr_context = without_taps()
        self.request: Request | Meeting | None = None
        self.result = None
        self.random: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def resume(self, *output) -> None:
        """Run on to the next forward or to the end."""
        if self.seed is None:
            value = self.coroutine.switch(*output)
        else:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                if self.random is None:
                    torch.manual_seed(self.seed)
                else:
                    torch.set_rng_state(self.random[0])
                    torch.cuda.set_rng_state_all(self.random[1])
                value = self.coroutine.switch(*output)
                self.random = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self.request, self.result = (None, value) if self.coroutine.dead else (value, None)


def rope_types(config: dict) -> set[str]:
    """Kinds of rotary positions that a model has."""
    rope = config.get("rope_parameters") or {}
    return {kind["rope_type"] for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind}


def _group(model: PreTrainedModel, rows: list[_Call]) -> list[list[_Call]]:
    """Parts to compute one after another: one, unless long prompts would be padded to much more than they are. Prompts
    fill the processor by themselves, so padding costs as much as text; a few tokens cost little beside reading the
    weights."""
    kinds = rope_types(model.config.get_text_config().to_dict())
    parts: list[list[_Call]] = [[]]
    for row in sorted(rows, key=lambda row: (row.request.masked, row.request.tokens)):
        longest, part = row.request.tokens, [*parts[-1], row]
        # The frequencies of these follow the longest sequence of a batch; without a cache it is no step of decoding.
        cached = all(row.request.arguments.get("past_key_values") is not None for row in part)
        single = kinds & {"dynamic", "longrope"} or not cached
        padding = longest * len(part) - sum(row.request.tokens for row in part)
        wasteful = padding > max(32, 0.25 * (longest * len(part) - padding))
        padded = wasteful and not _takes_end_to_end(model, row.request)
        unlike = row.request.masked != part[0].request.masked
        if parts[-1] and (single or padded or unlike):
            parts.append([row])
        else:
            parts[-1] = part
    return parts


def _takes_end_to_end(model: PreTrainedModel, request: Request) -> bool:
    """Whether a forward can be put one behind the other with those like it, instead of side by side."""
    return request.masked and takes_end_to_end(model)


def _stand_in(model: PreTrainedModel, index: int, hub: greenlet) -> PreTrainedModel:
    """A shallow copy whose forward waits in `hub` for the others. Its generation config is its own."""
    stand_in = copy.copy(model)
    stand_in.generation_config = copy.deepcopy(model.generation_config)
    # Hooks of the model run in the shared forward, not once more for each row.
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(stand_in, kind, OrderedDict())
        setattr(stand_in, f"{kind}_with_kwargs", OrderedDict())

    @functools.wraps(model.forward)  # `generate` looks at the signature
    def forward(**arguments) -> ModelOutput:
        output, hidden, entering = hub.switch(Request(index, arguments, ForwardTap.layers(model)))
        ForwardTap.hand_over(model, hidden, entering)
        return output

    stand_in.forward = forward
    return stand_in


def _forward(
    model: PreTrainedModel, requests: list[Request]
) -> list[tuple[ModelOutput, torch.Tensor, dict[torch.nn.Module, torch.Tensor]]]:
    """One forward for all `requests`; for each its output, what entered the `lm_head`, and what entered the layers
    that are looked at."""
    layers = list(dict.fromkeys(layer for request in requests for layer in request.layers))
    seen: list[torch.Tensor] = []
    with contextlib.ExitStack() as taps:
        taps.enter_context(ForwardTap(model, lambda hidden, logits: seen.append(hidden)))
        for layer in layers:
            taps.enter_context(ForwardTap(model, lambda hidden, logits, entered: seen.append(entered.states), layer))
        if len(requests) == 1:
            output = model(**requests[0].arguments)
            return [(output, *_tapped(layers, seen))]
        rows = [_arguments(request.arguments) for request in requests]
        news = [request.tokens for request in requests]
        if _takes_end_to_end(model, requests[0]):
            output = _end_to_end(model, rows, news)
            parts = output.logits.split(news, 1), zip(*(states.split(news, 1) for states in seen), strict=True)
            return [
                (type(output)(logits=logits, past_key_values=row["past_key_values"]), *_tapped(layers, states))
                for row, logits, states in zip(rows, *parts, strict=True)
            ]
        cache = SideBySide([row["past_key_values"] for row in rows], news)
        device = rows[0]["input_ids"].device
        ids = torch.zeros(len(rows), max(news), dtype=torch.long, device=device)
        leading = () if rows[0]["position_ids"] is None else rows[0]["position_ids"].shape[:-2]  # axes of an image
        positions = ids.new_zeros(*leading, *ids.shape)
        for i, (row, new) in enumerate(zip(rows, news, strict=True)):
            ids[i, -new:] = row["input_ids"]
            if row["position_ids"] is not None:
                positions[..., i, -new:] = row["position_ids"][..., 0, :]
        masks = [row["attention_mask"] for row in rows]
        if requests[0].masked:
            mask = _for_each_kind(lambda kind: align_masks(kind, cache), masks)
        else:
            mask = torch.zeros(len(rows), cache.total, dtype=torch.long, device=device)
            for i, length in enumerate(cache.lengths):
                mask[i, -length:] = 1 if masks[i] is None else masks[i]
        batch = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if rows[0]["position_ids"] is not None:
            batch["position_ids"] = positions
        keeps = [row["logits_to_keep"] or new for row, new in zip(rows, news, strict=True)]
        if all(row["logits_to_keep"] for row in rows):
            batch["logits_to_keep"] = max(keeps)
        output = model(**batch, return_dict=True)
    return [
        (
            type(output)(logits=output.logits[i : i + 1, -keep:], past_key_values=row["past_key_values"]),
            *_tapped(layers, [states[i : i + 1, -new:] for states in seen]),
        )
        for i, (row, keep, new) in enumerate(zip(rows, keeps, news, strict=True))
    ]


def _tapped(
    layers: list[torch.nn.Module], states: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[torch.nn.Module, torch.Tensor]]:
    """What entered the `lm_head`, and what entered each of `layers`."""
    return states[0], dict(zip(layers, states[1:], strict=True))


def _end_to_end(model: PreTrainedModel, rows: list[dict], news: list[int]) -> ModelOutput:
    """One forward for rows that say for each pair of tokens who sees whom: no token of it is padding."""
    cache = EndToEnd([row["past_key_values"] for row in rows], news)
    ids = torch.cat([row["input_ids"] for row in rows], 1)
    positions = torch.cat([row["position_ids"] for row in rows], -1)
    mask = _for_each_kind(stack_masks, [row["attention_mask"] for row in rows])
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "past_key_values": cache}
    with end_to_end(news, cache.lengths):
        return model(**batch, use_cache=True, return_dict=True)


def _for_each_kind(join: Callable, masks: list) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks of several rows as one; where they are dicts, one for each kind of attention."""
    if isinstance(masks[0], dict):
        return {kind: join([mask[kind] for mask in masks]) for kind in masks[0]}
    return join(masks)


def _arguments(arguments: dict) -> dict:
    """All of `ARGUMENTS`; raise if the forward is given something that cannot be put together with others."""
    unknown = {name for name, value in arguments.items() if not (value is None or value is False or value == {})}
    unknown -= {*ARGUMENTS, "use_cache", "return_dict", "cache_position"}
    if unknown:
        raise ValueError(
            f"A batch cannot decode with {', '.join(sorted(unknown))}. Ask for one prompt at a time, or leave it out."
        )
    return dict.fromkeys(ARGUMENTS) | arguments
