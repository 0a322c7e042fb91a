"""Where a rule reads and changes the target's scores, and how a processor with a memory is asked.

In: the rows of a verification, one call for each. Out: rows in which an accepted candidate is the only choice.
transformers asks every processor about every row, also about those behind a candidate that is then rejected.
"""

from __future__ import annotations

import copy
import time
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


class TrialProcessor(LogitsProcessor):
    """
    Asks a copy of a processor about tokens that may still be rejected, and the processor itself about those that were
    kept. So a processor that remembers what it was asked (a grammar, a counter) sees each token of the text once, in
    order, as in plain decoding.

    Args:
        processor ([`~transformers.LogitsProcessor`]): Models and tokenizers among its attributes are shared with the
            copies.

    Raises:
        ValueError: If it cannot be copied.
    """

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor
        self.begin()
        copied(processor)  # refuse now what would fail later

    def begin(self) -> None:
        """A draft or a verification begins behind the kept text."""
        self.trial: LogitsProcessor | None = None
        self.asked: dict[int, tuple[torch.LongTensor, torch.FloatTensor]] = {}  # by the length of the text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.trial is None:
            self.trial = copied(self.processor)
        self.asked[input_ids.shape[1]] = input_ids, scores.clone()  # it may write into them
        return self.trial(input_ids, scores)

    def keep(self, start: int, end: int) -> None:
        """The tokens from place `start` up to `end` of the text were kept."""
        for place in range(start, end):
            self.processor(*self.asked[place])


def copied(processor: LogitsProcessor) -> LogitsProcessor:
    """
    A copy with a memory of its own.

    Raises:
        ValueError: If there can be none.
    """
    attributes = getattr(processor, "__dict__", {}).values()
    shared = {id(value): value for value in attributes if isinstance(value, torch.nn.Module | PreTrainedTokenizerBase)}
    try:
        return copy.deepcopy(processor, shared)
    except Exception as error:  # whatever an object says that does not want to be copied
        raise ValueError(
            f"`logits_processor`: {type(processor).__name__} cannot be copied ({error}). With a draft, a processor is "
            "also asked about tokens that are then rejected, which only a copy of it may remember. Give it "
            "`__deepcopy__`, or decode without a draft."
        ) from error


def on_trial(processors: list[LogitsProcessor]) -> list[LogitsProcessor]:
    """
    The same processors; those that may remember what they were asked as [`TrialProcessor`]. Those of transformers do
    not, but for two.

    Raises:
        ValueError: If one cannot be used with a draft.
    """
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        raise ValueError(
            "`guidance_scale` cannot be used with a draft: guidance needs a second forward of the target for every "
            "candidate, so that a draft would save nothing. Leave out one of the two."
        )
    return [
        TrialProcessor(processor)
        if isinstance(processor, SynthIDTextWatermarkLogitsProcessor)
        or not type(processor).__module__.startswith(("transformers.", __name__))
        else processor
        for processor in processors
    ]
