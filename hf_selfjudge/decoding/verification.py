"""A round: candidates are drafted, the target's forward over them is read, and the rule decides what is kept.

In: what `generate` hands to its candidate generator and its logits processors. Out: scores in which an accepted
candidate is the only choice, and statistics.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig
from transformers.generation import AssistedCandidateGenerator, CandidateGenerator

from ..forward.tap import LayerInput
from ..judge.features import candidate_scalars, round_states
from ..judge.layers import LayerStates
from ..judge.lora import ReplaySession
from .auto_length import AutoLength
from .drafting import ContextFullError, set_draft_length
from .lookup import LookupBeside
from .rules import Mismatches, Rule
from .stats import Stats
from .trial import Trial


@dataclass(frozen=True, eq=False)
class Verified(Mismatches):
    """
    Mismatches with the rows of the verification that show them.

    Args:
        scores (`torch.FloatTensor` of shape `(n, vocab_size)`): The target's logits for the places of the candidates,
            after penalties and constraints, before temperature and filters.
        final_scores (`torch.FloatTensor` of shape `(n, vocab_size)`): The same after temperature and filters: the
            target's own token is taken from it.
        logits_after (`torch.Tensor` of shape `(n, vocab_size)`): The target's raw logits after the candidates.
        draft_logits (`torch.FloatTensor` of shape `(n, vocab_size)`, *optional*): What the draft took them from.
    """

    tokens: torch.LongTensor
    positions: torch.LongTensor
    matches_after: torch.LongTensor
    last: torch.BoolTensor
    hidden: torch.Tensor
    scores: torch.FloatTensor
    final_scores: torch.FloatTensor
    logits_after: torch.Tensor
    draft_logits: torch.FloatTensor | None

    @property
    def vocab_size(self) -> int:
        return self.scores.shape[-1]

    @property
    def choices(self) -> torch.LongTensor:
        return self.final_scores.argmax(-1)

    @functools.cached_property
    def scalars(self) -> torch.FloatTensor:
        return candidate_scalars(self.scores, self.tokens, self.logits_after, self.positions)

    @property
    def ranks(self) -> torch.LongTensor:
        return (self.scores >= self.scores.gather(-1, self.tokens[:, None])).sum(-1)

    @property
    def divergence(self) -> torch.FloatTensor:
        target, draft = (rows.float().log_softmax(-1) for rows in (self.final_scores, self.draft_logits))
        probability = target.exp()
        # Where the target's probability is 0 the term is 0, whatever the draft's is.
        return torch.where(probability > 0, probability * (target - draft), 0.0).sum(-1)

    @property
    def surest(self) -> torch.FloatTensor:
        return self.final_scores.float().softmax(-1).amax(-1)


@dataclass(eq=False)
class Verification:
    """One round: `k` candidates, and the `k + 1` rows of the target's forward over them. Row `i` chooses candidate
    `i`, the last row what comes after them."""

    start: int  # tokens of the text before the first candidate
    prompt_length: int
    candidates: torch.LongTensor  # (k,)
    draft_logits: torch.FloatTensor | None = None  # (k, vocab_size), if the draft has logits
    hidden: torch.Tensor | None = None  # (k + 1, hidden_size)
    logits: torch.Tensor | None = None  # (k + 1, vocab_size)
    scores: torch.FloatTensor | None = None  # (vocab_size,), of the row that is being processed; see `Verified`
    plan: dict[int, bool] = field(default_factory=dict)  # by row, whether the rule keeps the mismatch there
    asked: list[int] = field(default_factory=list)  # mismatches that the rule was asked about
    # Those accepted, and the log-probability given up, nats.
    judged: dict[int, torch.Tensor] = field(default_factory=dict)
    rejected: bool = False  # a candidate was rejected, and nothing after it can be kept
    seconds: float = 0.0  # of the target's forward
    began: float = field(default_factory=time.perf_counter)

    @functools.cached_property
    def tokens(self) -> list[int]:
        """The candidates."""
        return self.candidates.tolist()

    @functools.cached_property
    def choices(self) -> list[int]:
        """The target's likeliest tokens in the places of the candidates, by its raw logits; in fp32, as stock compares
        them: ties are frequent in bf16."""
        return self.logits[:-1].float().argmax(-1).tolist()

    def mismatches_after(self, row: int, special_tokens: set[int]) -> list[int]:
        """Rows after `row` with mismatches, by the raw logits, up to the first with a special token."""
        pairs = [*enumerate(zip(self.tokens, self.choices, strict=True))][row + 1 :]
        decided = itertools.takewhile(lambda pair: pair[1][0] == pair[1][1] or not special_tokens & {*pair[1]}, pairs)
        return [place for place, (token, choice) in decided if token != choice]

    def decided(self, special_tokens: set[int]) -> int:
        """How many candidates come before the first where the draft or, by its raw logits, the target has a special
        token: no rule decides there, and the text may end."""
        pairs = enumerate(zip(self.tokens, self.choices, strict=True))
        return next((place for place, pair in pairs if special_tokens & {*pair}), len(self.tokens))

    def verified(self, rows: list[int], final_scores: torch.FloatTensor, special_tokens: set[int]) -> Verified:
        """What a rule gets to see of candidates. The first of them has the scores `self.scores` and `final_scores`;
        those of later ones are not known yet, and the raw logits stand for them."""
        device = self.candidates.device
        in_forward = torch.tensor(rows, device=self.hidden.device)
        later = self.logits[rows[1:]].float().to(device)
        matches = [token == choice for token, choice in zip(self.tokens, self.choices, strict=True)]
        after = [sum(itertools.takewhile(bool, matches[row + 1 :])) for row in rows]
        return Verified(
            tokens=self.candidates[rows],
            positions=torch.tensor(rows, device=device) + (self.start - self.prompt_length),
            matches_after=torch.tensor(after, device=device),
            last=torch.tensor([False] * (len(rows) - 1) + [True], device=device),
            hidden=round_states(self.hidden, in_forward, torch.full_like(in_forward, self.decided(special_tokens))),
            scores=torch.cat([self.scores[None], later]),
            final_scores=torch.cat([final_scores[None], later]),
            logits_after=self.logits[[row + 1 for row in rows]].to(device),
            draft_logits=None if self.draft_logits is None else self.draft_logits[rows].to(device),
        )

    def sources(self, kept: list[int]) -> list[str]:
        """Who decided each of the tokens that the round kept."""
        decided = ["judged" if row in self.judged else "matched" for row in range(len(kept))]
        is_candidate = [self.tokens[row : row + 1] == [token] for row, token in enumerate(kept)]
        return [source if own else "target" for source, own in zip(decided, is_candidate, strict=True)]


class Call:
    """
    What one call of `generate` decodes with, and what it has done so far.

    Args:
        special_tokens (`set[int]`): Neither accepted nor overruled, in addition to those of the generation config.
        replay ([`LayerStates`] or [`ReplaySession`], *optional*): Computes the hidden states that the rule reads.

    Attributes:
        replaced (`dict[int, torch.FloatTensor]`): By position in the answer, scores that became one-hot.
        trial ([`Trial`]): The processors that remember something.
        round ([`Verification`], *optional*): Under way or just ended. `None` while a draft is made: its forwards and
            scores do not belong to a verification.
    """

    def __init__(self, rule: Rule, special_tokens: set[int], replay: LayerStates | ReplaySession | None = None):
        self.rule, self.special_tokens, self.replay = rule, special_tokens, replay
        self.stats = Stats(calls=1)
        self.prompt_length: int | None = None
        self.replaced: dict[int, torch.FloatTensor] = {}
        self.trial = Trial([])
        self.round: Verification | None = None

    def prepare(self, config: GenerationConfig, processed: bool) -> None:
        """Read what the call decodes with from its final `config`, and whether logits are `processed` at all."""
        self.do_sample = config.do_sample
        # Then the raw logits decide, and are read once a round: a GPU is waited for at each look at a number.
        self.by_logits = not (processed or config.do_sample)
        self.keeps_scores = config.output_scores and config.return_dict_in_generate
        # Whether a candidate may be kept that neither the target nor the rule chose.
        self.others_keep = config.do_sample or config.assistant_ensemble_weight is not None
        for token in (config.eos_token_id, config.bos_token_id, config.pad_token_id, config.decoder_start_token_id):
            if token is not None:
                self.special_tokens = self.special_tokens.union([token] if isinstance(token, int) else token)

    def begin_draft(self) -> None:
        self.round = None
        self.trial.begin()

    def begin_round(self, start: int, candidates: torch.LongTensor, draft_logits: torch.FloatTensor | None) -> None:
        """Candidates are about to be verified; see [`Verification`]."""
        if self.prompt_length is None:
            self.prompt_length = start
        # Scores after a token that was then rejected were discarded.
        self.replaced = {place: row for place, row in self.replaced.items() if place < start - self.prompt_length}
        self.trial.begin()
        self.round = Verification(start, self.prompt_length, candidates, draft_logits)

    def observe(self, hidden: torch.Tensor, logits: torch.Tensor, entered: LayerInput | None = None) -> None:
        """Read the verification: the target's first forward after the draft. (A processor may run the target too.)"""
        round = self.round
        if round is None or round.logits is not None:
            return
        if logits.device.type != "cpu":
            torch.accelerator.synchronize(logits.device)  # else only the time of starting it would be known
        round.seconds = time.perf_counter() - round.began
        self.stats.verify_seconds += round.seconds
        rows = len(round.candidates) + 1
        if self.replay is not None:
            since = time.perf_counter()
            hidden = self.replay(entered, round.start + rows - 1 - entered.states.shape[1])
            self.stats.rule_seconds += time.perf_counter() - since
        round.hidden, round.logits = hidden[0, -rows:], logits[0, -rows:]

    def accepts(self, row: int, final_scores: torch.FloatTensor) -> bool:
        """Whether the rule accepts candidate `row`; for `final_scores` see [`Verified`]. Under greedy decoding it is
        asked about mismatches only; under sampling about every candidate, since the target's own token is not drawn
        yet."""
        round = self.round
        if round.rejected:
            return False
        token = round.tokens[row]
        # Under sampling the likeliest token counts as the choice.
        scores = round.scores if self.do_sample else final_scores
        choice = round.choices[row] if self.by_logits else int(scores.argmax())
        mismatch = choice != token
        if not (mismatch or self.do_sample):
            return False
        round.rejected = not self.others_keep
        # A masked token is never accepted, however it was masked (`remove_invalid_values` turns -inf into a number).
        if self.special_tokens & {choice, token} or not final_scores.softmax(-1)[token]:
            return False
        if mismatch:
            round.asked.append(row)
        if not self._keeps(row, final_scores):
            return False
        round.rejected = False
        if mismatch:
            round.judged[row] = round.scores.max() - round.scores[token]
        return True

    def _keeps(self, row: int, final_scores: torch.FloatTensor) -> bool:
        """What the rule says about candidate `row`. Under greedy decoding it decides about all mismatches of the round
        at once, and again only where processors made the scores others than it was told."""
        round = self.round
        if self.do_sample:
            return bool(self.rule.keep(round.verified([row], final_scores, self.special_tokens)))
        known = row in round.plan
        if not known or not (self.by_logits or torch.equal(round.scores, round.logits[row].to(round.scores))):
            rows = [row, *round.mismatches_after(row, self.special_tokens)]
            kept = self.rule.keep(round.verified(rows, final_scores, self.special_tokens))
            round.plan = dict(zip(rows, kept.tolist(), strict=True))
        return round.plan[row]

    def end_round(self, kept: list[int]) -> None:
        """Count what the round kept: these tokens were added to the text."""
        round = self.round
        sources = round.sources(kept)
        given_up = float(sum(round.judged[row] for row, source in enumerate(sources) if source == "judged"))
        # Questions after the end of the text do not count.
        asked = sum(row < len(kept) for row in round.asked)
        self.stats.count(len(round.candidates), asked, sources, given_up)

    def keep_constrained(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """A logits processor that keeps what a rule sees of a row: the scores after penalties and constraints, before
        temperature and filters. transformers puts the caller's processors there."""
        if self.round is not None:
            self.round.scores = scores[0]
        return scores

    def choose(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        A logits processor that makes the row of an accepted candidate one-hot. It comes last, so that nothing that
        temperature, filters or a watermark mask is accepted, and nothing changes the row again.

        transformers calls the processors once for each row of a verification, with the candidates before it as input.
        Elsewhere (plain decoding, drafting, the row after the last candidate) this one changes nothing.
        """
        round = self.round
        row = None if round is None else input_ids.shape[1] - round.start
        if row is None or round.logits is None or row >= len(round.candidates):
            return scores
        since = time.perf_counter()
        if self.accepts(row, scores[0]):
            if self.keeps_scores:
                self.replaced[input_ids.shape[1] - self.prompt_length] = scores.clone()  # stock writes into them
            scores = torch.full_like(scores, -torch.inf)
            scores[0, round.tokens[row]] = 0.0
        self.stats.rule_seconds += time.perf_counter() - since
        return scores

    def own_scores(self, scores: tuple[torch.FloatTensor, ...] | None) -> tuple[torch.FloatTensor, ...] | None:
        """The target's own scores of each token, in place of those that became one-hot."""
        if scores is None or not self.replaced:
            return scores
        return tuple(self.replaced.get(place, row) for place, row in enumerate(scores))


class JudgeCandidateGenerator(CandidateGenerator):
    """
    Wraps the candidate generator that transformers built, and begins a round with what it drafted.

    Args:
        length ([`AutoLength`], *optional*): Learns from the rounds.
        context (`int`, *optional*): Tokens that the target can attend to; candidates beyond are left out.
        lookup ([`LookupBeside`], *optional*): Takes the place of `inner` in some rounds.

    Attributes:
        waits (`bool`): Whether the first round has no candidates, so that the target reads the prompt first.
    """

    waits = False

    def __init__(
        self,
        inner: CandidateGenerator,
        call: Call,
        length: AutoLength | None,
        context: int | None,
        lookup: LookupBeside | None = None,
    ):
        self.inner, self.call, self.length, self.context, self.lookup = inner, call, length, context, lookup
        self.requires_model_outputs = inner.requires_model_outputs
        self.read = 0  # tokens of the text that the draft has read

    @property
    def model_kwargs_overrides(self) -> dict:
        return self.inner.model_kwargs_overrides

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        self.call.begin_draft()
        start = input_ids.shape[1]
        self.unread = start - self.read
        drafts = self.length is None or self.length.drafts(self.unread)
        since = time.perf_counter()
        self.found = None if self.lookup is None else self.lookup.candidates(input_ids)
        drafts = drafts and self.found is None
        if drafts and self.length is not None and not self.length.ends_drafts:
            set_draft_length(self.inner, self.length.blind())
        ids, logits = input_ids if self.found is None else self.found, None  # or the target goes on alone
        if drafts:
            self.read = start
            with contextlib.suppress(ContextFullError):
                ids, logits = self.inner.get_candidates(input_ids, **kwargs)
        elif isinstance(self.inner, AssistedCandidateGenerator):
            # Now, as later the text is longer, and it could not be told which candidates were rejected.
            self.inner._update_past_and_masks(input_ids.to(self.inner.assistant_model.device))
        if self.waits:  # drafted all the same: the draft has read the prompt
            ids, logits, self.waits = input_ids, None, False
        self.draft_seconds = time.perf_counter() - since
        self.call.stats.draft_seconds += self.draft_seconds
        if self.context is not None:
            room = max(0, self.context - start)
            ids, logits = ids[:, : start + room], None if logits is None else logits[:, :room]
        self.call.begin_round(start, ids[0, start:].to(input_ids.device), None if logits is None else logits[0])
        return ids, logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        if self.found is not None:
            return  # it tells nothing about the draft
        round = self.call.round
        if self.lookup is not None and len(round.candidates):
            self.lookup.observe(num_matches)
        if self.length is not None:
            self.length.observe(len(round.candidates), num_matches, self.draft_seconds, round.seconds, self.unread)
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)
