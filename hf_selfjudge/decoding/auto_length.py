"""How many candidates to draft, for the most tokens a second.

In: the seconds and kept tokens of each round. Out: whether to draft, and after each candidate whether to go on. Knows
nothing of models and rules.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable

import numpy as np

from ..forward.lockstep import exchange


class AutoLength:
    """
    Ends a draft where one more candidate would cost more than it is worth, and drafts nothing while the target alone
    is faster.

    One more candidate earns a token if it and all before it are kept; it costs a forward of the draft and its part of
    the verification. By renewal-reward theory tokens a second are highest if drafting goes on while that probability
    exceeds cost times tokens a second. All of it is measured: seconds, tokens, and how often candidates are kept, by
    the draft's confidence in them where it is known (the idea of SpecDec++, https://huggingface.co/papers/2405.19715,
    with counts instead of a trained head).

    Rounds without candidates are measured now and then, too. While they give more tokens a second, a draft is only
    tried again when what all such trials have lost, and the next one is expected to lose, is at most 3 % of the time.
    A trial includes that the draft reads what it missed. Where this is slow, the next trial comes in another call.

    Calls side by side share their forwards, so they draft equally many: probabilities and tokens a second are then
    those of all. Measurements are kept from one call to the next ([`begin_call`]).

    Args:
        clock (`Callable[[], float]`, *optional*): Returns the time, seconds.
    """

    longest = 32  # tokens
    FIRST = 3  # candidates of a draft before anything is measured
    ENOUGH = 2.8  # rounds, the past fading, before rounds with and without candidates are compared
    CHECK = 32  # rounds until plain decoding is measured again; doubles
    LOSS = 0.03  # share of the time that trials may cost
    MEMORY, SHORT_MEMORY = 0.95, 0.8  # weights of the past when a round is added: with candidates, and without
    EDGES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)  # of the ranges of confidence
    PRIOR = (0.2, 0.4, 0.6, 0.75, 0.88, 0.95, 0.985)  # share kept in each, believed as much as 4 candidates

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.tested = np.full(len(self.PRIOR), 4.0)
        self.kept = self.tested * self.PRIOR
        self.all_tested, self.all_kept = 4.0, 3.0
        # Sums over rounds with candidates, the past fading: 1, drafted, drafted², seconds of verification, drafted ·
        # these seconds, seconds of the draft, tokens gained
        self.sums = np.zeros(7)
        # Sums, the past fading, of how many and their seconds: rounds without candidates; steps of the draft; tokens
        # that the draft read without drafting
        self.plain, self.steps, self.read = np.zeros(2), np.zeros(2), np.zeros(2)
        self.check, self.unchecked = self.CHECK, 0  # rounds with candidates since the last one without
        self.lost = self.spent = 0.0  # seconds since a draft was last found to pay
        self.trial = False  # whether one is under way
        self.begin_call()
        self.begin()

    def begin_call(self, ends_drafts: bool = False, pauses: bool = False) -> None:
        """
        A new call of `generate`, in whose first round the target reads the prompt.

        Args:
            ends_drafts (`bool`): Whether it is asked while drafting. If not, a length is set before each draft.
            pauses (`bool`): Whether a round may go without a draft.
        """
        self.reads_prompt, self.ends_drafts, self.pauses = True, ends_drafts, pauses

    def drafts(self, unread: int) -> bool:
        """Whether to draft in the next round, where the draft has not read the last `unread` tokens of the text. Calls
        side by side do what most of them want."""
        if not self.pauses:
            return True
        votes = exchange(self._drafts(unread), "drafts")
        return 2 * sum(votes) > len(votes)

    def _drafts(self, unread: int) -> bool:
        if not self.plain[0]:
            return self.reads_prompt  # else measure it
        if self.sums[0] < self.ENOUGH:
            return True
        plain, drafted = self._plain_speed(), self._speed()
        if drafted >= plain:
            self.lost = self.spent = 0.0
            return self.unchecked < self.check
        if not self.trial:
            # It is two rounds: in the first one the draft reads what it missed, the second one is measured.
            rounds = 2 * (self.sums[3] + self.sums[5] - self.sums[6] / plain) / self.sums[0]
            self.trial = self.lost + rounds + unread * _mean(self.read) <= self.LOSS * self.spent
        return self.trial

    def _speed(self) -> float:
        """Tokens a second of rounds with candidates; 0 if they were not measured."""
        return self.sums[6] / (self.sums[3] + self.sums[5]) if self.sums[0] else 0.0

    def _plain_speed(self) -> float:
        """Tokens a second of rounds without candidates; 0 if they were not measured."""
        return self.plain[0] / self.plain[1] if self.plain[0] else 0.0

    def begin(self) -> None:
        """A new draft."""
        self.confidences: list[float | None] = []
        self.reach = 1.0  # probability that all candidates so far are kept
        self.times = [self.clock()]

    def goes_on(self, confidence: float | None) -> bool:
        """Whether to draft on after a candidate in which the draft had this confidence, in [0, 1] (`None`:
        unknown)."""
        self.confidences.append(confidence)
        self.times.append(self.clock())
        if len(self.confidences) >= self.longest:
            return False
        speed = max(self._speed(), self._plain_speed())
        if not speed:
            return len(self.confidences) < self.FIRST
        share = self.all_kept / self.all_tested
        self.reach *= share if confidence is None else self._share_kept(confidence)
        gains, seconds, speeds = np.transpose(exchange((self.reach * share, self._cost(), speed), "goes on"))
        return gains.sum() > seconds.mean() * speeds.sum()

    def _cost(self) -> float:
        """Seconds of one more candidate: a step of the draft and a row of the verification."""
        row = 0.0  # rounds of one length do not show it; longer ones will
        if self.sums[0]:
            rounds, x, xx, verify, xv, _, _ = self.sums
            spread = xx / rounds - (x / rounds) ** 2
            row = max(0.0, (xv / rounds - x * verify / rounds**2) / spread) if spread > 0.05 else 0.0
        return _mean(self.steps) + row

    def blind(self) -> int:
        """The length of a draft that has to be chosen beforehand, tokens."""
        self.begin()
        while self.goes_on(None):
            pass
        self.times.clear()
        return len(self.confidences)

    def observe(self, drafted: int, kept: int, draft_seconds: float, verify_seconds: float, unread: int) -> None:
        """
        Learn from a round.

        Args:
            drafted, kept (`int`): Candidates, of which the first `kept` were kept.
            draft_seconds, verify_seconds (`float`): Of the draft and of the target's forward.
            unread (`int`): See [`drafts`].
        """
        for place, confidence in enumerate(self.confidences[: min(kept + 1, drafted)]):
            if confidence is not None:
                at = bisect(self.EDGES, confidence)
                self.tested[at] += 1
                self.kept[at] += place < kept
        reads_prompt, self.reads_prompt = self.reads_prompt, False
        if not drafted:
            if not reads_prompt:
                self.plain = self.SHORT_MEMORY * self.plain + (1, draft_seconds + verify_seconds)
                self.spent += draft_seconds + verify_seconds
            if self.unchecked >= self.check:
                self.check = min(2 * self.check, 16 * self.CHECK)
            self.unchecked, self.trial = 0, False
            return
        self.all_kept = self.MEMORY * self.all_kept + kept
        self.all_tested = self.MEMORY * self.all_tested + min(kept + 1, drafted)
        steps = np.diff(self.times)[1:] if self.times else np.full(drafted, draft_seconds / drafted)
        for seconds in steps:  # the first one also reads
            self.steps = self.MEMORY * self.steps + (1, seconds)
        missed = unread > self.longest
        if missed:
            self.read = self.MEMORY * self.read
            self.read += unread, max(0.0, draft_seconds - drafted * _mean(self.steps))
        if reads_prompt:
            return
        if not missed:
            # By the draft's confidence rather than by this round's luck, which decides much after two rounds.
            known = self.confidences and None not in self.confidences
            tokens = 1 + (np.cumprod([*map(self._share_kept, self.confidences)]).sum() if known else kept)
            seen = (1, drafted, drafted**2, verify_seconds, drafted * verify_seconds, draft_seconds, tokens)
            self.sums = self.MEMORY * self.sums + seen
            self.unchecked, self.trial = self.unchecked + 1, False
        self.spent += draft_seconds + verify_seconds
        if self.plain[0]:
            self.lost += draft_seconds + verify_seconds - (kept + 1) / self._plain_speed()

    def _share_kept(self, confidence: float) -> float:
        """How often candidates are kept in which the draft has this confidence."""
        at = bisect(self.EDGES, confidence)
        return self.kept[at] / self.tested[at]


def _mean(sums: np.ndarray) -> float:
    """Seconds of one, of how many and their seconds; 0 before the first."""
    return sums[1] / sums[0] if sums[0] else 0.0
