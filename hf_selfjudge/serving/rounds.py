"""The rounds of many requests at once: which candidates each request's rule keeps.

In: the candidates of all requests, and the rows of the target's one forward over them. Out: which are kept. Knows
nothing of vLLM. What decides here are the same rules that decide in `generate`, on the same features.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from ..decoding.rules import Lossless, Rule
from ..decoding.verification import Verified
from ..judge.features import round_states


ROWS = 512  # mismatches that a rule is asked about at a time: a row of logits may have a megabyte
FORCED = 1e8  # vLLM forces a token (the end of thinking) by a logit of 1e9


@dataclass(eq=False)
class Rounds:
    """
    The candidates of `R` requests, `n` in all, one request after the other. The forward has a row for each candidate
    and one more for each request: what comes after its last candidate.

    Args:
        counts (`list[int]`): Candidates of each request, 0 or more.
        tokens (`torch.LongTensor` of shape `(n,)`): The candidates. A negative one is padding, and so is a draft of
            several zeros: vLLM pads with them where a text gets too long for the draft.
        prompt_lengths (`Sequence[int]`): Tokens of each request's prompt.
        places (`torch.LongTensor` of shape `(n + R,)`): Which token of its text each row of the forward reads.
        scores (`torch.FloatTensor` of shape `(n, vocab_size)`): The target's logits for their places, after penalties
            and constraints, before temperature and filters.
        final_scores (`torch.FloatTensor` of shape `(n, vocab_size)`): The same after temperature and filters.
        logits (`torch.Tensor` of shape `(n + R, vocab_size)`): The target's raw logits, under a grammar masked by it.
        hidden (`torch.Tensor` of shape `(n + R, hidden_size)`): The hidden states that the rules read.
        special (`torch.BoolTensor` of shape `(vocab_size,)`): The protected tokens, which are neither accepted
            against the target's choice nor overruled.
        stops (`Sequence[Set[int]]`): For each request, further such tokens.
        sampled (`Sequence[bool]`): Which requests are sampled. Others are decoded greedily.
    """

    counts: list[int]
    tokens: torch.LongTensor
    prompt_lengths: Sequence[int]
    places: torch.LongTensor
    scores: torch.FloatTensor
    final_scores: torch.FloatTensor
    logits: torch.Tensor
    hidden: torch.Tensor
    special: torch.BoolTensor
    stops: Sequence[Set[int]]
    sampled: Sequence[bool]

    def decide(self, rules: Sequence[Rule]) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """
        Ask each request's rule about its mismatches, up to the first that no rule decides; for a sampled request,
        about each candidate by itself, since the target's own token is not drawn yet.

        Args:
            rules (`Sequence[Rule]`): Of each request. Requests with the same rule are decided together.

        Returns:
            Two `torch.BoolTensor` of shape `(n,)`: which candidates are kept whatever the target chooses, each as if
            those before it in its round are kept; and about which mismatches a rule was asked.
        """
        sampled, decides = self._each(self.sampled), self._each([not isinstance(rule, Lossless) for rule in rules])
        mismatch, fixed = self._choices != self.tokens, self._fixed()
        blocking = _sums(mismatch & fixed)
        blocked = blocking[1:] > blocking[self._starts]
        asked = decides & torch.where(sampled, ~fixed, mismatch & ~blocked)
        kept = torch.zeros_like(asked)
        (rows,) = asked.nonzero(as_tuple=True)
        by_rule: dict[Rule, list[list[int]]] = defaultdict(list)  # in slices
        for number, group in itertools.groupby(enumerate(self._request[rows].tolist()), lambda pair: pair[1]):
            places, slices = [place for place, _ in group], by_rule[rules[number]]
            if slices and len(slices[-1]) + len(places) <= ROWS:
                slices[-1] += places
            else:
                slices.append(places)
        for rule, slices in by_rule.items():
            for places in slices:
                own = rows[places]
                kept[own] = rule.keep(self._verified(own, mismatch, sampled))
        return kept, asked & mismatch

    @functools.cached_property
    def _request(self) -> torch.LongTensor:
        """The request of each candidate, of shape `(n,)`."""
        return self._each(range(len(self.counts)))

    @functools.cached_property
    def _starts(self) -> torch.LongTensor:
        """For each candidate, of shape `(n,)`, the first one of its request."""
        return self._each(np.cumsum([0, *self.counts[:-1]]))

    def _each(self, values: Iterable[int | bool]) -> torch.Tensor:
        """A value of each request, for each of its candidates: of shape `(n,)`."""
        return torch.from_numpy(np.repeat(np.array([*values]), self.counts)).to(self.tokens.device)

    @functools.cached_property
    def _tokens(self) -> torch.LongTensor:
        """The candidates, with 0 for padding, of shape `(n,)`."""
        return self.tokens.clamp(min=0)

    @functools.cached_property
    def _choices(self) -> torch.LongTensor:
        """The target's choices, of shape `(n,)`."""
        return self.scores.argmax(-1)

    def _fixed(self) -> torch.BoolTensor:
        """Where no rule decides, of shape `(n,)`: the candidate is padding, a constraint or a filter has masked it or
        forces another token, or it or the target's choice is a protected token."""
        chosen = self.final_scores.gather(-1, self._tokens[:, None]).squeeze(-1)
        masked = (chosen - self.final_scores.logsumexp(-1)).exp() == 0
        forced = self.scores.amax(-1) >= FORCED
        return self._padding | masked | forced | self._protected

    @functools.cached_property
    def _padding(self) -> torch.BoolTensor:
        """Which candidates are padding, of shape `(n,)`."""
        before, counts = _sums(self._tokens != 0), self._each(self.counts)
        return (self.tokens < 0) | ((counts > 1) & (before[self._starts + counts] == before[self._starts]))

    @functools.cached_property
    def _protected(self) -> torch.BoolTensor:
        """Where the candidate or the target's choice is a protected token, of shape `(n,)`."""
        protected = self.special[self._tokens] | self.special[self._choices]
        for number, stops in enumerate(self.stops):
            if stops:
                own, stops = self._request == number, self.tokens.new_tensor([*stops])
                protected |= own & (torch.isin(self._tokens, stops) | torch.isin(self._choices, stops))
        return protected

    @functools.cached_property
    def _counted(self) -> torch.LongTensor:
        """For each candidate, of shape `(n,)`, the end of its request's candidates that count for `hidden_ahead`:
        those before the first protected token and before padding."""
        count = len(self.tokens)
        places = torch.where(self._padding | self._protected, torch.arange(count, device=self.tokens.device), count)
        first = places.new_full((len(self.counts),), count).scatter_reduce(0, self._request, places, "amin")
        return torch.minimum(first[self._request], self._starts + self._each(self.counts))

    def _verified(
        self,
        rows: torch.LongTensor,
        mismatch: torch.BoolTensor,
        sampled: torch.BoolTensor,
    ) -> Verified:
        """What a rule gets to see of the candidates `rows`."""
        order, count = torch.arange(len(self.tokens), device=rows.device), len(self.tokens)
        # The next mismatch after each candidate, which may be in another request.
        following = torch.where(mismatch, order, count).flip(0).cummin(0).values.flip(0)
        following = torch.cat([following[1:], following.new_tensor([count])])
        ends = self._starts + self._each(self.counts)
        request = self._request[rows]
        in_forward = rows + request  # each request before has one more row
        last = torch.ones_like(rows, dtype=torch.bool)
        last[:-1] = sampled[rows[:-1]] | (request[:-1] != request[1:])
        return Verified(
            tokens=self._tokens[rows],
            positions=self.places[in_forward] + 1 - self._each(self.prompt_lengths)[rows],
            matches_after=(torch.minimum(following, ends) - order - 1)[rows],
            last=last,
            hidden=round_states(self.hidden, in_forward, (self._request + self._counted)[rows]),
            scores=self.scores[rows],
            final_scores=self.final_scores[rows],
            logits_after=self.logits[in_forward + 1],
            draft_logits=None,
        )


def _sums(counted: torch.BoolTensor) -> torch.LongTensor:
    """How many of `n` are counted before each, and of all: of shape `(n + 1,)`."""
    return torch.cat([counted.new_zeros(1, dtype=torch.long), counted.cumsum(0)])
