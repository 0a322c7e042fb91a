"""When to look candidates up in the text instead of drafting them: where the text repeats, that costs nothing.

In: the text and how many candidates were kept. Out: the candidates of a round, or none. Knows nothing of rules.
"""

from __future__ import annotations

from bisect import bisect

import numpy as np
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ..models.tokens import common_prefix


LONGEST = 32  # tokens of a repetition that are counted


class LookupBeside:
    """
    Prompt lookup beside a draft model, chosen in rounds where it is expected to keep as many candidates or more.

    The longer the repetition at the end of the text is already, the longer it will go on. So both means are counted
    for each range of this length: of candidates found, in every round, since the text shows later how many would have
    been kept; and of drafted ones, in the rounds that had them. Everything is forgotten with the call, so that its
    text does not depend on earlier ones.

    Args:
        generator ([`~transformers.generation.candidate_generator.PromptLookupCandidateGenerator`]): What looks up.
    """

    # Starting values are plausible, not measured.
    EDGES = (2, 3, 5, 9, 17)  # of the ranges of repeated tokens
    FOUND = (0.5, 1.0, 2.0, 3.5, 5.0, 7.0)  # expected to be kept in each, believed as much as `BELIEF` rounds
    DRAFTED = 3.0  # the same of drafted candidates, in any range
    BELIEF = 4.0
    MEMORY = 0.95  # weight of the past when a round is added

    def __init__(self, generator: PromptLookupCandidateGenerator):
        self.generator = generator
        # Weighted numbers of rounds and of candidates kept.
        self.found = np.array([(self.BELIEF, self.BELIEF * kept) for kept in self.FOUND])
        self.drafted = np.zeros((len(self.FOUND), 2))
        self.all_drafted = np.array([self.BELIEF, self.BELIEF * self.DRAFTED])
        self.range: int | None = None  # of this round's repetition
        self.open: list[tuple[int, int, list[int]]] = []  # range, place and candidates that the text has not passed

    def candidates(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """The text of shape `(1, length)` with candidates behind it, of shape `(1, length + n)`; `None` where they
        should be drafted."""
        text = input_ids[0].tolist()
        self._compare(text)
        ids, _ = self.generator.get_candidates(input_ids)
        tokens = ids[0, len(text) :].tolist()
        self.range = None
        if not tokens:
            return None
        self.range = bisect(self.EDGES, repeated(text, tokens))
        self.open.append((self.range, len(text), tokens))
        return ids if _mean(self.found[self.range]) >= self._expected() else None

    def observe(self, kept: int) -> None:
        """Learn from a round with drafted candidates, the first `kept` of which were kept."""
        self.all_drafted = self.MEMORY * self.all_drafted + (1, kept)
        if self.range is not None:
            self.drafted[self.range] = self.MEMORY * self.drafted[self.range] + (1, kept)

    def _compare(self, text: list[int]) -> None:
        """Learn how many of the candidates that were found earlier, used or not, are in the text by now."""
        still_open = []
        for range_, place, tokens in self.open:
            passed = text[place : place + len(tokens)]
            kept = common_prefix(passed, tokens)
            if kept == len(passed) < len(tokens):
                still_open.append((range_, place, tokens))
            else:
                self.found[range_] = self.MEMORY * self.found[range_] + (1, kept)
        self.open = still_open

    def _expected(self) -> float:
        """How many drafted candidates are expected to be kept here."""
        rounds, kept = self.drafted[self.range]
        return (kept + self.BELIEF * _mean(self.all_drafted)) / (rounds + self.BELIEF)


def repeated(text: list[int], found: list[int]) -> int:
    """How many tokens at the end of a text also stand before the place in it from which candidates are."""
    end = text[: -LONGEST - 1 : -1]
    places = (i for i in range(1, len(text)) if text[i - 1] == end[0] and text[i : i + len(found)] == found)
    return max((common_prefix(text[max(0, i - LONGEST) : i][::-1], end) for i in places), default=0)


def _mean(sums: np.ndarray) -> float:
    """Candidates kept in a round."""
    return sums[1] / sums[0]
