"""What decides whether a candidate that differs from the target's choice is kept.

In: [`Rows`], the verification of candidates. Out: an accept mask. The judge is one rule among several; the others need
no training and are what it is measured against, in the same engine. A rule holds no state of a call, so that threads
may share it, and knows nothing of generation: special tokens and constraints are kept away from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..judge.features import candidate_scalars, entropy
from ..judge.info import PER_TOKEN, limit_of
from ..judge.judge import Judge
from ..judge.replay import LayerStates, Replay
from ..utils.names import public_name


logger = logging.get_logger(__name__)


@dataclass
class Rows:
    """
    Candidates under verification, one row each.

    Args:
        candidates (`torch.LongTensor` of shape `(rows,)`): Their tokens.
        scores (`torch.FloatTensor` of shape `(rows, vocab_size)`): The target's logits where the candidate stands,
            with penalties and constraints applied, before temperature and filters.
        final_scores (`torch.FloatTensor` of shape `(rows, vocab_size)`): With temperature and filters too: what the
            target's token is taken from.
        logits_after (`torch.FloatTensor` of shape `(rows, vocab_size)`): The target's raw logits after the candidate.
        hidden (`torch.Tensor` of shape `(rows, 2, hidden_size)`): Its hidden states before and after it.
        positions (`torch.LongTensor` of shape `(rows,)`): Tokens of the answer before it.
        matches_after (`torch.LongTensor` of shape `(rows,)`): How many of the candidates that follow it directly are
            the most likely of the target's raw logits.
        draft_logits (`torch.FloatTensor` of shape `(rows, vocab_size)`, *optional*): What the draft's token was
            taken from, where the draft says so.
    """

    candidates: torch.LongTensor
    scores: torch.FloatTensor
    final_scores: torch.FloatTensor
    logits_after: torch.FloatTensor
    hidden: torch.Tensor
    positions: torch.LongTensor
    matches_after: torch.LongTensor
    draft_logits: torch.FloatTensor | None

    @property
    def margin(self) -> torch.FloatTensor:
        """log P(choice) − log P(candidate), nats, of shape `(rows,)`."""
        return self.scores.amax(-1) - self.scores.gather(-1, self.candidates[:, None]).squeeze(-1)


class Rule:
    """
    What decides acceptance. Immutable, apart from a threshold that its owner may move between calls.

    Attributes:
        special_tokens (`list[int]`): Tokens that it knows to be special: never accepted against the target, nor
            overruled.
        needs_draft_logits (`bool`): Whether it can only work with drafts that say how likely their tokens are: prompt
            lookup does not, nor do drafts with another tokenizer under greedy decoding.
    """

    special_tokens: Sequence[int] = ()
    needs_draft_logits = False

    def check_target(self, target: PreTrainedModel) -> None:
        """Raise `ValueError` if the rule cannot work on `target`."""

    def check_draft(self, draft: PreTrainedModel) -> None:
        """Warn if the rule may not do well with `draft`."""

    def replay_on(self, target: PreTrainedModel) -> LayerStates | Replay | None:
        """What makes the hidden states that the rule looks at, if it is not `target` alone."""
        return None

    def accept(self, rows: Rows) -> torch.BoolTensor:
        """Which candidates to keep; of shape `(rows,)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lossless(Rule):
    """Accept nothing: the output is that of the target alone, unless `assistant_ensemble_weight` of `generate` asks
    for a mixture of target and draft."""

    def accept(self, rows: Rows) -> torch.BoolTensor:
        return torch.zeros_like(rows.candidates, dtype=torch.bool)


@dataclass(frozen=True)
class TopK(Rule):
    """
    Accept what is among the target's `k` most likely tokens.

    Args:
        k (`int`): 1 accepts only the target's choice. Ties count as more likely.
    """

    k: int

    def __post_init__(self):
        _check("k", self.k, self.k >= 1, "a number of tokens, 1 or more")

    def accept(self, rows: Rows) -> torch.BoolTensor:
        chosen = rows.scores.gather(-1, rows.candidates[:, None])
        return (rows.scores >= chosen).sum(-1) <= self.k


@dataclass(frozen=True)
class Margin(Rule):
    """
    Accept what the target finds at most `nats` less likely than its choice:
    log P(choice) − log P(candidate) ≤ `nats`.

    Args:
        nats (`float`): log 2 ≈ 0.69 accepts what is at least half as likely.
    """

    nats: float

    def __post_init__(self):
        _check("nats", self.nats, self.nats >= 0, "0 or more nats")

    def accept(self, rows: Rows) -> torch.BoolTensor:
        return rows.margin <= self.nats


@dataclass(frozen=True)
class KLGate(Rule):
    """
    Accept where target and draft have nearly the same distribution: KL(target ‖ draft) < `nats`, unless the target is
    sure of its choice (JuDi, https://huggingface.co/papers/2601.04766).

    Args:
        nats (`float`): Limit of the divergence.
        sure (`float`, defaults to 0.9): Probability of the target's choice above which nothing else is accepted.
    """

    nats: float
    sure: float = 0.9
    needs_draft_logits = True

    def __post_init__(self):
        _check("nats", self.nats, self.nats >= 0, "0 or more nats")
        _check("sure", self.sure, 0 <= self.sure <= 1, "a probability")

    def accept(self, rows: Rows) -> torch.BoolTensor:
        target, draft = rows.final_scores.float().log_softmax(-1), rows.draft_logits.float().log_softmax(-1)
        probability = target.exp()
        # Where the target gives nothing the term is 0, whatever the draft gives.
        terms = torch.where(probability > 0, probability * (target - draft), 0.0)
        return (terms.sum(-1) < self.nats) & (probability.amax(-1) <= self.sure)


@dataclass(frozen=True)
class LookAhead(Rule):
    """
    Accept where the target is unsure and, the candidate once accepted, agrees with the draft on the next `window`
    candidates (FLy, https://huggingface.co/papers/2511.22972). A draft must be longer than the window, and go on where
    it is unsure: transformers ends it there unless its `assistant_confidence_threshold` is 0.

    Args:
        window (`int`, defaults to 6): Candidates that have to match.
        unsure (`float`, defaults to 0.3): Least entropy of the target's distribution, as a share of log(vocab_size).
    """

    window: int = 6
    unsure: float = 0.3

    def __post_init__(self):
        _check("window", self.window, self.window >= 0, "a number of tokens, 0 or more")
        _check("unsure", self.unsure, 0 <= self.unsure <= 1, "a share of the largest entropy, in [0, 1]")

    def accept(self, rows: Rows) -> torch.BoolTensor:
        share = entropy(rows.scores.float().log_softmax(-1)) / math.log(rows.scores.shape[-1])
        return (share >= self.unsure) & (rows.matches_after >= self.window)


@dataclass(frozen=True)
class Coin(Rule):
    """
    Accept a random share, whatever the candidate is: the control that a rule with knowledge must beat. The same
    token at the same position always falls the same way, so that threads and batches agree.

    Args:
        share (`float`): Of the candidates to accept, in [0, 1].
        seed (`int`, defaults to 0): Another seed is another coin.
    """

    share: float
    seed: int = 0

    def __post_init__(self):
        _check("share", self.share, 0 <= self.share <= 1, "a share, in [0, 1]")

    def accept(self, rows: Rows) -> torch.BoolTensor:
        throws = [
            np.random.default_rng((self.seed, position, token)).random()
            for position, token in zip(rows.positions.tolist(), rows.candidates.tolist(), strict=True)
        ]
        return torch.tensor(throws, device=rows.candidates.device) < self.share


@dataclass
class JudgeRule(Rule):
    """
    Accept what the judge finds unlikely to change the meaning.

    Args:
        judge ([`Judge`]): Made for the target.
        threshold (`float` or `str`, *optional*): Overrides the judge's own. A candidate is accepted if its probability
            of changing the meaning is below this; 0 never accepts (lossless), 1 always does. `"0.03/token"` accepts it
            if the probability is below 0.03 for each token that this gains in the round: the candidate, and those
            behind it that match. The same expected number of changes then buys more tokens, the more the longer the
            drafts are (transformers ends them where they are unsure, unless their `assistant_confidence_threshold` is
            0). A name is that of one of the judge's operating points.
        allow_other_weights (`bool`, defaults to `False`): Use the judge on other weights of the same shape.
    """

    judge: Judge
    threshold: float | str | None = None
    allow_other_weights: bool = False

    @property
    def special_tokens(self) -> list[int]:
        return self.judge.info.special_tokens

    def __setattr__(self, name: str, value: object) -> None:
        if name == "threshold":
            value = self.judge.info.threshold if value is None else value
            if isinstance(value, str) and not value.endswith(PER_TOKEN):
                points = self.judge.info.operating_points
                if value not in points:
                    raise ValueError(
                        f"`threshold` {value!r} is none of the judge's operating points "
                        f"({', '.join(points) or 'it has none'}). Give one of them, or a number in [0, 1]."
                    )
                value = points[value]["threshold"]
            limit_of(value)
        super().__setattr__(name, value)

    def __post_init__(self):
        # By what the copies of a target share. It is kept alive, so that no other can have its number.
        self._replays: dict[int, tuple[PreTrainedModel, Replay]] = {}

    def check_target(self, target: PreTrainedModel) -> None:
        self.judge.check_target(target, self.allow_other_weights)
        self.judge.eval().to(target.get_output_embeddings().weight.device)
        self.replay_on(target)

    def replay_on(self, target: PreTrainedModel) -> LayerStates | Replay | None:
        if self.judge.info.layer is not None:
            return LayerStates(target, self.judge.info.layer)
        if self.judge.adapter is None:
            return None
        decoder = target.get_decoder()
        if id(decoder) not in self._replays:
            self._replays[id(decoder)] = decoder, Replay(target, self.judge.adapter)
        return self._replays[id(decoder)][1]

    def check_draft(self, draft: PreTrainedModel) -> None:
        name = public_name(draft.config.name_or_path)
        if name != self.judge.info.draft:
            logger.warning_once(
                f"The judge was trained on mismatches of {self.judge.info.draft}, the draft is {name}. It works with "
                "any draft; how well was measured with the former only."
            )

    def odds(self, rows: Rows) -> torch.Tensor:
        """Log-odds that each candidate changes the meaning; of shape `(rows,)`."""
        scalars = candidate_scalars(rows.scores, rows.candidates, rows.logits_after, rows.positions)
        device = self.judge.head.weight.device
        return self.judge(scalars.to(device), rows.hidden.to(device)).to(rows.candidates.device)

    def accept(self, rows: Rows) -> torch.BoolTensor:
        limit, per_token = limit_of(self.threshold)
        gained = 1 + per_token * rows.matches_after
        return self.odds(rows) < torch.logit((limit * gained).clamp(max=1))


def _check(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"`{name}` must be {expected}, got {value}.")
