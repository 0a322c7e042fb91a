"""Logits processors that remember what they were asked, such as a grammar or a counter.

In: the processors of a call. Out: the same, asked once about each token of the text, in order, as in plain decoding.
Assisted generation asks every processor about every row, also about rows after a candidate that is then rejected.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import CellType, FunctionType, ModuleType

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class Trial:
    """
    Asks copies of processors about tokens that may still be rejected, and the processors themselves about kept tokens.

    What a processor remembers must be its own: attributes, or variables that a function closes over; not those of a
    class, of a Python module or of a model.

    Args:
        processors (`list[LogitsProcessor]`): All of the call. Those that may remember something are replaced in this
            list with [`Trial.ask`].
        own (`list[Callable]`): Those of them that belong to the call itself, and are left as they are.

    Raises:
        ValueError: If one cannot be copied, or cannot be used with a draft.
    """

    def __init__(self, processors: list[LogitsProcessor], own: Sequence[Callable] = ()):
        if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
            raise ValueError(
                "`guidance_scale` cannot be used with a draft: guidance needs a second forward of the target for "
                "every candidate, so that a draft would save nothing. Leave out one of the two."
            )
        self.processors = []
        for place, processor in enumerate(processors):
            # Those of transformers look at the text alone, but for this watermark (and guidance).
            stateless = type(processor).__module__.startswith("transformers.") or processor in own
            if isinstance(processor, SynthIDTextWatermarkLogitsProcessor) or not stateless:
                processors[place] = functools.partial(self.ask, len(self.processors))
                self.processors.append(processor)
        copied(self.processors)  # refuse now what would fail later
        self.begin()

    def begin(self) -> None:
        """A draft or a verification begins after the kept text."""
        self.copies: list[LogitsProcessor] | None = None
        # For each processor: by the length of the text, what it was asked.
        self.asked: list[dict[int, tuple[torch.LongTensor, torch.FloatTensor]]] = [{} for _ in self.processors]

    def ask(self, number: int, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores from the copy of processor `number`."""
        if self.copies is None:
            self.copies = copied(self.processors)
        self.asked[number][input_ids.shape[1]] = input_ids, scores.clone()  # the copy may write into them
        return self.copies[number](input_ids, scores)

    def keep(self, length: int) -> None:
        """The token after the first `length` tokens of the text was kept."""
        for processor, asked in zip(self.processors, self.asked, strict=True):
            processor(*asked[length])


def copied(processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """Copies with a memory of their own; what several processors share, their copies share too. Models and tokenizers
    are not copied. Raises `ValueError` if one cannot be copied."""
    memo: dict[int, object] = {}
    return [_copied(processor, memo) for processor in processors]


def _copied(processor: LogitsProcessor, memo: dict[int, object]) -> LogitsProcessor:
    try:
        if isinstance(processor, FunctionType):
            return _copied_function(processor, memo)
        for value in getattr(processor, "__dict__", {}).values():
            if isinstance(value, torch.nn.Module | PreTrainedTokenizerBase):
                memo[id(value)] = value
            elif isinstance(value, FunctionType):
                memo[id(value)] = _copied_function(value, memo)
        duplicate = copy.deepcopy(processor, memo)
        if duplicate is processor:
            raise TypeError("its copy is the same object")
    except Exception as error:  # any object may fail to be copied in a way of its own
        raise ValueError(
            f"`logits_processor`: {type(processor).__name__} cannot be copied ({error}). With a draft, a processor is "
            "also asked about tokens that are then rejected, which only a copy of it may remember. Give it a "
            "`__deepcopy__` that returns a copy, or decode without a draft."
        ) from error
    return duplicate


def _copied_function(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """A copy that closes over copies. `copy.deepcopy` returns functions themselves."""
    if function.__closure__ is None:
        return function
    cells = []
    for cell in function.__closure__:
        if id(cell) not in memo:
            value = cell.cell_contents
            shared = isinstance(value, torch.nn.Module | PreTrainedTokenizerBase | ModuleType)
            memo[id(cell)] = CellType(value if shared else copy.deepcopy(value, memo))
            memo[-id(cell)] = cell  # kept alive, so that no other cell can have its id
        cells.append(memo[id(cell)])
    duplicate = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    duplicate.__kwdefaults__ = function.__kwdefaults__
    return duplicate
