"""What judged generation did: counts, seconds and provenance, for one call or summed over many.

In: the rounds of a call, one after another. Out: [`Stats`]. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stats:
    """
    What calls of `generate` did. `matched + judged + target` is the number of tokens produced.

    Args:
        calls (`int`): Calls of `generate`.
        rounds (`int`): Drafts, each with one target forward.
        drafted (`int`): Candidates, tokens.
        matched (`int`): Candidates kept because the target chose them too, tokens.
        asked (`int`): Mismatches that the rule was asked about, tokens: those with a special token or a masked one are
            none of its business.
        judged (`int`): Mismatches kept because the rule accepted them, tokens.
        target (`int`): Tokens that the target itself added: the correction or the bonus of each round.
        bonus (`int`): How many of these followed a draft that was kept to its end, tokens.
        logprob_given_up (`float`): Log-probability that judged tokens have less than the target's choices, nats.
        draft_seconds (`float`): Wall time spent drafting.
        verify_seconds (`float`): Wall time of the target's forwards.
        rule_seconds (`float`): Wall time of the rule. On a device that computes asynchronously the three are times of
            the host, and the waiting falls to whoever needs a result first.
        offered_at, kept_at (`list[int]`): For each place in the draft, how many rounds drafted that far, and how many
            kept the candidate there.
        sources (`list[str]`): Of a single call: who decided each token, `target`, `matched` or `judged`. Sums leave it
            empty.
        rows (`list[Stats]`): Of a call for several prompts: of each row. Seconds of a row include those in which it
            waited for others, so the sum of them counts time several times.
    """

    calls: int = 0
    rounds: int = 0
    drafted: int = 0
    matched: int = 0
    asked: int = 0
    judged: int = 0
    target: int = 0
    bonus: int = 0
    logprob_given_up: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    rule_seconds: float = 0.0
    offered_at: list[int] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    rows: list[Stats] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens produced."""
        return self.matched + self.judged + self.target

    @property
    def tokens_per_round(self) -> float:
        """Tokens produced for each target forward, the bonus token included; 0 before the first round."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def judged_share(self) -> float:
        """Share of the tokens that the rule accepted against the target's choice."""
        return self.judged / self.tokens if self.tokens else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each place in the draft, the share of rounds that drafted that far and kept the candidate there."""
        return [kept / offered for kept, offered in zip(self.kept_at, self.offered_at, strict=True)]

    def count(self, drafted: int, asked: int, sources: list[str], given_up: float) -> None:
        """Count one round. `given_up` is its `logprob_given_up`, nats; the others are as in [`Stats`]."""
        kept = len(sources) - sources.count("target")
        self.rounds += 1
        self.drafted += drafted
        self.asked += asked
        self.matched += sources.count("matched")
        self.judged += sources.count("judged")
        self.target += sources.count("target")
        self.bonus += len(sources) > kept == drafted > 0
        self.logprob_given_up += given_up
        self._count_places(self.offered_at, [1] * drafted)
        self._count_places(self.kept_at, [1] * kept + [0] * (drafted - kept))
        self.sources += sources

    def add(self, other: Stats) -> None:
        """Add another call's counts and seconds to these, but not its `sources`."""
        for name, value in vars(other).items():
            if isinstance(value, (int, float)):
                setattr(self, name, getattr(self, name) + value)
        self._count_places(self.offered_at, other.offered_at)
        self._count_places(self.kept_at, other.kept_at)

    @staticmethod
    def _count_places(places: list[int], more: list[int]) -> None:
        places += [0] * (len(more) - len(places))
        for i, n in enumerate(more):
            places[i] += n
