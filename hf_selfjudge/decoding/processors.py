"""Where a rule reads and changes the target's scores, and how a processor with a memory is asked.

In: the rows of a verification, one call for each. Out: rows in which an accepted candidate is the only choice.
transformers asks every processor about every row, also about those behind a candidate that is then rejected.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from types import CellType, FunctionType, ModuleType
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


if TYPE_CHECKING:
    from .verification import Round


class ConstrainedScores(LogitsProcessor):
    """Keeps a row as it is behind the penalties and constraints and before temperature and filters: that is where
    transformers puts the caller's processors. It is what a rule sees."""

    def __init__(self, round: Round):
        self.round = round

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.round.verifying:
            self.round.scores = scores[0]
        return scores


class JudgeLogitsProcessor(LogitsProcessor):
    """
    Makes the row of an accepted candidate one-hot on it. Last of all processors, so that nothing which temperature,
    filters or a watermark mask is accepted, and nothing changes the row again.

    transformers calls the processors once for each row of a verification, with the candidates before it as input.
    Outside a verification (plain decoding, drafting, the bonus row) this one changes nothing.
    """

    def __init__(self, round: Round):
        self.round = round

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        round = self.round
        if not round.verifying or round.logits is None:
            return scores
        row = input_ids.shape[1] - round.start
        if row >= len(round.candidates):
            return scores
        since = time.perf_counter()
        if round.accepts(row, scores[0]):
            if round.keeps_scores:
                round.replaced[input_ids.shape[1] - round.prompt_length] = scores.clone()  # stock writes into them
            scores = torch.full_like(scores, -torch.inf)
            scores[0, round.candidates[row]] = 0.0
        round.stats.rule_seconds += time.perf_counter() - since
        return scores


class Trial:
    """
    Asks copies of processors about tokens that may still be rejected, and the processors themselves about those that
    were kept. So a processor that remembers what it was asked (a grammar, a counter) sees each token of the text once,
    in order, as in plain decoding.

    What a processor remembers must be its own: attributes, or variables that a function closes over; not those of a
    class, of a Python module or of a model.

    Args:
        processors (`list[LogitsProcessor]`): Those that decoding goes through. Of the ones that may remember something
            an entry is replaced with a [`TrialProcessor`].

    Raises:
        ValueError: If one cannot be copied, or not be used with a draft.
    """

    def __init__(self, processors: list[LogitsProcessor]):
        if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
            raise ValueError(
                "`guidance_scale` cannot be used with a draft: guidance needs a second forward of the target for "
                "every candidate, so that a draft would save nothing. Leave out one of the two."
            )
        # Those of transformers look at the text alone, but for this one (and guidance).
        places = [
            place
            for place, processor in enumerate(processors)
            if isinstance(processor, SynthIDTextWatermarkLogitsProcessor)
            or not type(processor).__module__.startswith(("transformers.", __name__))
        ]
        self.processors = [processors[place] for place in places]
        for number, place in enumerate(places):
            processors[place] = TrialProcessor(self, number)
        copied(self.processors)  # refuse now what would fail later
        self.begin()

    def begin(self) -> None:
        """A draft or a verification begins behind the kept text."""
        self.copies: list[LogitsProcessor] | None = None
        # For each processor: by the length of the text, what it was asked.
        self.asked: list[dict[int, tuple[torch.LongTensor, torch.FloatTensor]]] = [{} for _ in self.processors]

    def ask(self, number: int, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """What the copy of a processor makes of a row."""
        if self.copies is None:
            self.copies = copied(self.processors)
        self.asked[number][input_ids.shape[1]] = input_ids, scores.clone()  # it may write into them
        return self.copies[number](input_ids, scores)

    def keep(self, place: int) -> None:
        """The token in this place of the text was kept."""
        for processor, asked in zip(self.processors, self.asked, strict=True):
            processor(*asked[place])


class TrialProcessor(LogitsProcessor):
    """Stands for one of the processors of a [`Trial`]."""

    def __init__(self, trial: Trial, number: int):
        self.trial, self.number = trial, number

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self.trial.ask(self.number, input_ids, scores)


def copied(processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """
    Copies with a memory of their own; what several remember together, their copies do too. Models and tokenizers are
    shared with the originals.

    Raises:
        ValueError: If there can be none.
    """
    memo: dict[int, object] = {}
    return [_copied(processor, memo) for processor in processors]


def _copied(processor: LogitsProcessor, memo: dict[int, object]) -> LogitsProcessor:
    try:
        for value in getattr(processor, "__dict__", {}).values():
            if isinstance(value, torch.nn.Module | PreTrainedTokenizerBase):
                memo[id(value)] = value
            elif isinstance(value, FunctionType):
                memo[id(value)] = _copied_function(value, memo)
        if isinstance(processor, FunctionType):
            return _copied_function(processor, memo)
        other = copy.deepcopy(processor, memo)
        if other is processor:
            raise TypeError("its copy is the same object")
    except Exception as error:  # whatever an object says that does not want to be copied
        raise ValueError(
            f"`logits_processor`: {type(processor).__name__} cannot be copied ({error}). With a draft, a processor is "
            "also asked about tokens that are then rejected, which only a copy of it may remember. Give it a "
            "`__deepcopy__` that returns a copy, or decode without a draft."
        ) from error
    return other


def _copied_function(function: FunctionType, memo: dict[int, object]) -> FunctionType:
    """A copy that closes over copies. `copy` itself takes functions as they are."""
    if function.__closure__ is None:
        return function
    cells = []
    for cell in function.__closure__:
        if id(cell) not in memo:
            value = cell.cell_contents
            shared = isinstance(value, torch.nn.Module | PreTrainedTokenizerBase | ModuleType)
            memo[id(cell)] = CellType(value if shared else copy.deepcopy(value, memo))
            memo[-id(cell)] = cell  # kept, so that no other can have its number
        cells.append(memo[id(cell)])
    other = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other
