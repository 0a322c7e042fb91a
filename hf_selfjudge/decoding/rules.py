"""The rules: what decides whether a candidate that differs from the target's choice is kept.

In: the [`Mismatches`] of a round, with what the verification says about them. Out: which of them are kept. A rule
has no state of a call, so that threads may share it. To add one, write a subclass of [`Rule`] with `keep`; to compare
it in the bench, add it to `FAMILIES` in `bench/methods.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..judge.features import SCALARS
from ..judge.judge import Judge
from ..judge.layers import LayerStates
from ..judge.lora import Replay
from ..judge.threshold import Threshold
from ..utils.names import public_name


logger = logging.get_logger(__name__)


class Mismatches:
    """
    The mismatches of a round, in their order, up to the first that no rule decides; or those of several rounds, one
    round after the other. Under sampling each candidate counts as a round, since the target's own token is not drawn
    yet.

    Attributes:
        tokens, choices (`torch.LongTensor` of shape `(n,)`): The candidates, and what the target chooses there.
        positions (`torch.LongTensor` of shape `(n,)`): Tokens of the answer before each of them.
        matches_after (`torch.LongTensor` of shape `(n,)`): How many candidates directly after it are the target's
            likeliest tokens.
        last (`torch.BoolTensor` of shape `(n,)`): Which are the last of their round.
        scalars (`torch.FloatTensor` of shape `(n, len(SCALARS))`): See [`candidate_scalars`].
        hidden (`torch.Tensor` of shape `(n, len(STATES), hidden_size)`): The target's hidden states around
            each; see [`round_states`].
        ranks (`torch.LongTensor` of shape `(n,)`): How many tokens are as likely as it under the target, or more.
        divergence (`torch.FloatTensor` of shape `(n,)`): KL(target ‖ draft) where it is chosen, nats; only for drafts
            with logits.
        surest (`torch.FloatTensor` of shape `(n,)`): Probability of the target's choice there.
        vocab_size (`int`): The target's.
    """

    tokens: torch.LongTensor
    choices: torch.LongTensor
    positions: torch.LongTensor
    matches_after: torch.LongTensor
    last: torch.BoolTensor
    scalars: torch.FloatTensor
    hidden: torch.Tensor
    ranks: torch.LongTensor
    divergence: torch.FloatTensor
    surest: torch.FloatTensor
    vocab_size: int

    @property
    def margin(self) -> torch.FloatTensor:
        """log P(choice) − log P(candidate), nats, of shape `(n,)`."""
        return self.scalars[:, SCALARS.index("margin")]

    @property
    def entropy(self) -> torch.FloatTensor:
        """Entropy of the target's distribution where each is chosen, nats, of shape `(n,)`."""
        return self.scalars[:, SCALARS.index("entropy")]


class Rule:
    """
    What decides acceptance. Immutable, apart from a threshold that its owner may change between calls.

    Attributes:
        special_tokens (`Sequence[int]`, *optional*): Tokens that are neither accepted against the target's choice nor
            overruled where the target chose them. `None` if the rule does not know them.
        needs_draft_logits (`bool`): Whether it works only with drafts that have logits. Prompt lookup has none, nor
            has a draft model with another tokenizer under greedy decoding.
    """

    special_tokens: Sequence[int] | None = None
    needs_draft_logits = False

    def check_target(self, target: PreTrainedModel) -> None:
        """Raise `ValueError` if the rule cannot work on `target`."""

    def check_draft(self, draft: PreTrainedModel) -> None:
        """Warn if the rule was not measured with `draft`."""

    def replay_on(self, target: PreTrainedModel) -> LayerStates | Replay | None:
        """What computes the hidden states that the rule reads; `None` for the target's own last ones."""
        return None

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        """Which of `n` mismatches to keep, of shape `(n,)`: each as if those before it in its round are kept. A round
        ends at the first that is not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lossless(Rule):
    """Accept nothing: the output is that of the target alone, unless `assistant_ensemble_weight` of `generate` asks
    for a mixture of target and draft (speculative decoding, https://huggingface.co/papers/2211.17192)."""

    special_tokens = ()  # nothing is accepted, so none has to be protected

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        return torch.zeros_like(mismatches.tokens, dtype=torch.bool)


@dataclass(frozen=True)
class TopK(Rule):
    """Accept a candidate among the target's `k` most likely tokens. Ties count as more likely."""

    k: int

    def __post_init__(self):
        _require(self.k >= 1, "k", self.k, "a number of tokens, 1 or more")

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        return mismatches.ranks <= self.k


@dataclass(frozen=True)
class Margin(Rule):
    """Accept a candidate that the target finds at most `nats` less likely than its choice:
    log P(choice) − log P(candidate) ≤ `nats`. log 2 ≈ 0.69 accepts what is at least half as likely."""

    nats: float

    def __post_init__(self):
        _require(self.nats >= 0, "nats", self.nats, "0 or more nats")

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        return mismatches.margin <= self.nats


@dataclass(frozen=True)
class KLGate(Rule):
    """
    Accept where target and draft have nearly the same distribution, KL(target ‖ draft) < `nats`, unless the target is
    sure of its choice (JuDi, https://huggingface.co/papers/2601.04766).

    Args:
        nats (`float`): Limit of the divergence.
        sure (`float`, defaults to 0.9): Probability of the target's choice above which nothing else is accepted.
    """

    nats: float
    sure: float = 0.9
    needs_draft_logits = True

    def __post_init__(self):
        _require(self.nats >= 0, "nats", self.nats, "0 or more nats")
        _require(0 <= self.sure <= 1, "sure", self.sure, "a probability")

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        return (mismatches.divergence < self.nats) & (mismatches.surest <= self.sure)


@dataclass(frozen=True)
class LookAhead(Rule):
    """
    Accept where the target is unsure and agrees with the draft on the `window` candidates after this one (FLy,
    https://huggingface.co/papers/2511.22972). Drafts must be longer than the window; transformers ends them where the
    draft is unsure, unless its `assistant_confidence_threshold` is 0.

    Args:
        window (`int`, defaults to 6): Candidates that have to match.
        unsure (`float`, defaults to 0.3): Least entropy of the target's distribution, as a share of log(vocab_size).
    """

    window: int = 6
    unsure: float = 0.3

    def __post_init__(self):
        _require(self.window >= 0, "window", self.window, "a number of tokens, 0 or more")
        _require(0 <= self.unsure <= 1, "unsure", self.unsure, "a share of the largest entropy, in [0, 1]")

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        unsure = mismatches.entropy >= self.unsure * math.log(mismatches.vocab_size)
        return (mismatches.matches_after >= self.window) & unsure


@dataclass(frozen=True)
class Coin(Rule):
    """
    Accept a random share, whatever the candidate is: the control that any other rule must beat. The decision on the
    same token at the same position is always the same, so that threads and batches agree.

    Args:
        share (`float`): Share of the candidates to accept, in [0, 1].
        seed (`int`, defaults to 0): Another seed gives other decisions.
    """

    share: float
    seed: int = 0

    def __post_init__(self):
        _require(0 <= self.share <= 1, "share", self.share, "a share, in [0, 1]")

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        places = zip(mismatches.positions.tolist(), mismatches.tokens.tolist(), strict=True)
        throws = [np.random.default_rng((self.seed, *place)).random() for place in places]
        return torch.tensor(throws, device=mismatches.tokens.device) < self.share


class JudgeRule(Rule):
    """
    Accept a candidate that the judge finds unlikely to change the meaning (SelfJudge,
    https://huggingface.co/papers/2510.02329).

    Args:
        judge ([`Judge`]): Made for the target.
        threshold (`float`, `str` or [`Threshold`], *optional*): Accept below this probability of changing the meaning:
            a number, `"0.03/token"` (for each token gained), or the name of one of the judge's operating points; see
            [`Threshold`]. Defaults to the judge's own.
        allow_other_weights (`bool`, defaults to `False`): Use the judge on other weights of the same shape.

    Raises:
        ValueError: If `threshold` is none of these.
    """

    def __init__(self, judge: Judge, threshold: float | str | Threshold | None = None, allow_other_weights=False):
        self.judge, self.allow_other_weights = judge, allow_other_weights
        self.threshold = threshold
        self._replays: WeakKeyDictionary[torch.nn.Module, Replay] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"JudgeRule(judge for {self.judge.info.target}, threshold={self.threshold})"

    @property
    def threshold(self) -> Threshold:
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | str | Threshold | None) -> None:
        info = self.judge.info
        self._threshold = Threshold.parse(info.threshold if value is None else value, info.thresholds)

    @property
    def special_tokens(self) -> list[int]:
        return self.judge.info.special_tokens

    def check_target(self, target: PreTrainedModel) -> None:
        self.judge.check_target(target, self.allow_other_weights)
        head = target.get_output_embeddings().weight
        # Weights that accelerate moves in and out of memory are nowhere ("meta") between forwards.
        places = (weight.device for weight in (head, *target.parameters()) if weight.device.type != "meta")
        self.judge.eval().to(next(places, torch.device("cpu")))
        self.replay_on(target)

    def replay_on(self, target: PreTrainedModel) -> LayerStates | Replay | None:
        if self.judge.info.layer is not None:
            return LayerStates(target, self.judge.info.layer)
        if self.judge.adapter is None:
            return None
        decoder = target.get_decoder()  # what copies of a target share
        if decoder not in self._replays:
            self._replays[decoder] = Replay(target, self.judge.adapter)
        return self._replays[decoder]

    def check_draft(self, draft: PreTrainedModel) -> None:
        name = public_name(draft.config.name_or_path)
        if name != self.judge.info.draft:
            logger.warning_once(
                f"The judge was trained on mismatches of {self.judge.info.draft}, the draft is {name}. It works with "
                "any draft; how well was measured with the first one only."
            )

    def log_odds(self, mismatches: Mismatches) -> torch.FloatTensor:
        """Log-odds that keeping each of `n` mismatches changes the meaning, of shape `(n,)`."""
        origin, device = mismatches.tokens.device, self.judge.head.weight.device
        return self.judge(mismatches.scalars.to(device), mismatches.hidden.to(device)).to(origin)

    def keep(self, mismatches: Mismatches) -> torch.BoolTensor:
        return self.threshold.keeps(self.log_odds(mismatches), mismatches.matches_after, mismatches.last)


def _require(valid: bool, name: str, value: float, expected: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {expected}, got {value}.")
