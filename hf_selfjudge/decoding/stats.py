"""In: the rounds of a call of `generate`, one after another. Out: [`Stats`]. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stats:
    """
    What one call of `generate` did, or many. `matched + judged + target` is the number of tokens produced.

    On a GPU, which computes asynchronously, the target's forward is waited for in each round. Steps of the draft are
    waited for where they end it (an end token, confidence); else some of their time counts as the target's.
    """

    calls: int = 0
    rounds: int = 0  # drafts, each with one target forward
    drafted: int = 0  # candidates
    matched: int = 0  # candidates kept because the target chose them too
    asked: int = 0  # mismatches that the rule decided (it is not asked about special and masked tokens)
    judged: int = 0  # mismatches kept because the rule accepted them
    target: int = 0  # tokens that the target itself added: the correction or the bonus of each round
    bonus: int = 0  # of these, the ones after a draft that was kept as a whole
    logprob_given_up: float = 0.0  # how much less likely judged tokens are than the target's choices, nats
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # the target's forwards
    rule_seconds: float = 0.0
    # For each place in the draft: how many rounds drafted that far, and how many kept the candidate there.
    offered_at: list[int] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)
    # Who decided each token of a single call: "target", "matched" or "judged". Sums leave it empty.
    sources: list[str] = field(default_factory=list)
    # Of each row of a call for several prompts. The seconds of a row include those in which it waited for others.
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
        matched, judged, target = (sources.count(name) for name in ("matched", "judged", "target"))
        kept = matched + judged
        round = Stats(rounds=1, drafted=drafted, matched=matched, asked=asked, judged=judged, target=target)
        round.bonus, round.logprob_given_up = int(target and kept == drafted > 0), given_up
        round.offered_at, round.kept_at = [1] * drafted, [1] * kept + [0] * (drafted - kept)
        self.add(round)
        self.sources += sources

    def add(self, other: Stats) -> None:
        """Add another call's counts and seconds to these, but not its `sources`."""
        for name, value in vars(other).items():
            if isinstance(value, (int, float)):
                setattr(self, name, getattr(self, name) + value)
        for places, more in ((self.offered_at, other.offered_at), (self.kept_at, other.kept_at)):
            places += [0] * (len(more) - len(places))
            for i, n in enumerate(more):
                places[i] += n
