"""Several calls of `generate` side by side in one thread: forwards that wait at the same time are computed as one.

In: models and calls. Out: what the calls return. Knows nothing of drafts and rules.

`generate` calls `model.forward` deep inside, and neither a generator nor `async` could pause it there. A greenlet can:
it is a coroutine with a call stack of its own, which can be left in any function and resumed later. Each call runs in
one, with a stand-in for each model. The stand-in's `forward` does not compute, but switches to [`run_in_lockstep`]
with a [`Request`]. When all calls wait, the forwards of one model are computed together, and each call is resumed with
its own rows. So a call behaves as if it were alone, and nothing in it is written for batches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..models.attention import end_to_end, takes_end_to_end
from .caches import EndToEnd, SideBySide, is_pairwise
from .tap import ForwardTap, without_taps


T = TypeVar("T")

# Arguments of a forward that can be joined with those of other rows.
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
        _Call(functools.partial(call, *(_stand_in(model, i, hub) for i, model in enumerate(models))), seed)
        for call, seed in zip(calls, seeds or [None] * len(calls), strict=True)
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
                topic = meeting[0].request.topic
                meeting = [row for row in meeting if row.request.topic == topic]
                values = [row.request.value for row in meeting]
                for row in meeting:
                    row.resume(values)
                continue
            first = min(row.request.model for row in waiting)
            for_first = [row for row in waiting if row.request.model == first]
            parts = _group(models[first], for_first)
            outputs = [_forward(models[first], [row.request for row in part]) for part in parts]
            if tally is not None and first == len(models) - 1:
                tally.forwards += len(parts)
                tally.tokens += sum(row.request.tokens for row in for_first)
            for row, output in zip(itertools.chain(*parts), itertools.chain(*outputs), strict=True):
                row.resume(output)
    finally:
        for row in rows:
            row.throw(GreenletExit)  # does nothing to those that have returned


@dataclass
class Tally:
    """What was computed: forwards, and tokens fed to them (padding not counted)."""

    forwards: int = 0
    tokens: int = 0


@dataclass
class Request:
    """A forward that a call waits for: the model's number, its arguments, and the layers whose input is read."""

    model: int
    arguments: dict
    layers: list[torch.nn.Module]

    @property
    def tokens(self) -> int:
        return self.arguments["input_ids"].shape[1]

    @property
    def pairwise(self) -> bool:
        return is_pairwise(self.arguments.get("attention_mask"))


@dataclass
class Meeting:
    """A value of a call that waits for the values of the others on the same topic."""

    topic: str
    value: object


def exchange(value: T, topic: str) -> list[T]:
    """The values on a topic of all calls side by side; of a call that runs alone `[value]`."""
    return [value] if runs_alone() else getcurrent().parent.switch(Meeting(topic, value))


def runs_alone() -> bool:
    """Whether the caller runs by itself, not side by side with other calls."""
    return not isinstance(getcurrent(), _Call)


class _Call(greenlet):
    """One call: the request that it waits for, or its result. With a seed it has random numbers of its own."""

    def __init__(self, call: Callable, seed: int | None):
        super().__init__(call)
        self.gr_context = without_taps()
        self.seed = seed
        self.request: Request | Meeting | None = None
        self.result = None
        self.random: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def resume(self, *output) -> None:
        """Run on to the next forward or to the end."""
        if self.seed is None:
            value = self.switch(*output)
        else:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                if self.random is None:
                    torch.manual_seed(self.seed)
                else:
                    torch.set_rng_state(self.random[0])
                    torch.cuda.set_rng_state_all(self.random[1])
                value = self.switch(*output)
                self.random = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self.request, self.result = (None, value) if self.dead else (value, None)


def rope_types(config: dict) -> set[str]:
    """Kinds of rotary positions that a model has."""
    rope = config.get("rope_parameters") or {}
    return {kind["rope_type"] for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind}


def _group(model: PreTrainedModel, rows: list[_Call]) -> list[list[_Call]]:
    """Parts to compute one after another: one, unless long prompts would be padded to much more than they are. Prompts
    fill the processor by themselves, so padding costs as much as text; a few tokens cost little beside reading the
    weights."""
    # The frequencies of these positions follow the longest sequence of a batch.
    alone = bool(rope_types(model.config.get_text_config().to_dict()) & {"dynamic", "longrope"})
    parts: list[list[_Call]] = [[]]
    for row in sorted(rows, key=lambda row: (row.request.pairwise, row.request.tokens)):
        request, part = row.request, [*parts[-1], row]
        cached = all(row.request.arguments.get("past_key_values") is not None for row in part)
        unlike = request.pairwise != part[0].request.pairwise
        tokens = sum(row.request.tokens for row in part)
        padding = request.tokens * len(part) - tokens
        wasteful = padding > max(32, 0.25 * tokens) and not (request.pairwise and takes_end_to_end(model))
        if parts[-1] and (alone or not cached or unlike or wasteful):
            parts.append([row])
        else:
            parts[-1] = part
    return parts


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
        taps = ForwardTap.entered_on(model)
        request = Request(index, arguments, [tap.layer for tap in taps if tap.layer is not None])
        output, hidden, entering = hub.switch(request)
        for tap in taps:  # they see this forward when its output is returned
            tap.hidden, tap.states = hidden, entering.get(tap.layer)
        return output

    stand_in.forward = forward
    return stand_in


def _forward(
    model: PreTrainedModel, requests: list[Request]
) -> list[tuple[ModelOutput, torch.Tensor, dict[torch.nn.Module, torch.Tensor]]]:
    """One forward for all `requests`; for each its output, what entered the `lm_head`, and what entered the layers
    whose input is read."""
    layers = list(dict.fromkeys(layer for request in requests for layer in request.layers))
    seen: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(ForwardTap(model, lambda hidden, logits: seen.append(hidden)))
        for layer in layers:
            stack.enter_context(ForwardTap(model, lambda hidden, logits, entered: seen.append(entered.states), layer))
        if len(requests) == 1:
            output = model(**requests[0].arguments)
            return [(output, seen[0], dict(zip(layers, seen[1:], strict=True)))]
        rows = [_arguments(request.arguments) for request in requests]
        if requests[0].pairwise and takes_end_to_end(model):
            cache = EndToEnd(rows)
            stack.enter_context(end_to_end(cache.news, cache.lengths))
        else:
            cache = SideBySide(rows)
        output = model(**cache.arguments(rows), past_key_values=cache, use_cache=True, return_dict=True)
    parts = [cache.split(output.logits, cache.keeps), *(cache.split(states, cache.news) for states in seen)]
    return [
        (type(output)(logits=logits, past_key_values=own), hidden, dict(zip(layers, entering, strict=True)))
        for own, logits, hidden, *entering in zip(cache.caches, *parts, strict=True)
    ]


def _arguments(arguments: dict) -> dict:
    """All of `ARGUMENTS`; raise if there are others, which cannot be joined."""
    unknown = {name for name, value in arguments.items() if not (value is None or value is False or value == {})}
    unknown -= {*ARGUMENTS, "use_cache", "return_dict", "cache_position"}
    if unknown:
        raise ValueError(
            f"A batch cannot decode with {', '.join(sorted(unknown))}. Decode one prompt at a time, or leave it out."
        )
    return dict.fromkeys(ARGUMENTS) | arguments
