"""A round under verification: what was drafted, what the target and the rule make of it, and what is kept.

In: candidates, and the target's forward over them. Out: which of them the rule accepts, and counts. Knows nothing of
how `generate` is called.
"""

from __future__ import annotations

import contextlib
import time

import torch
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator

from ..forward.tap import LayerInput
from ..judge.replay import LayerStates, ReplaySession
from .drafting import AutoLength, ContextFullError, set_draft_length
from .processors import Trial
from .rules import Rows, Rule
from .stats import Stats


class Round:
    """The state of one call: the candidates under verification, the verification forward, and the statistics."""

    def __init__(self, rule: Rule, special_tokens: set[int], replaying: LayerStates | ReplaySession | None = None):
        self.rule, self.special_tokens, self.replaying = rule, special_tokens, replaying
        self.stats = Stats(calls=1)
        self.prompt_length: int | None = None
        self.replaced: dict[int, torch.Tensor] = {}  # by place in the answer: scores that became one-hot
        self.trial = Trial([])
        self.verifying = False  # between a draft and what is kept of it; other forwards and scores are not ours

    def prepare(self, config: GenerationConfig, device: torch.device) -> None:
        """Take what the call decodes with from its final `config`."""
        self.do_sample = config.do_sample
        self.keeps_scores = config.output_scores and config.return_dict_in_generate
        # Whether a candidate may be kept that neither the target nor the rule chose.
        self.others_keep = config.do_sample or config.assistant_ensemble_weight is not None
        named = (config.eos_token_id, config.bos_token_id, config.pad_token_id, config.decoder_start_token_id)
        special = [torch.tensor(token, dtype=torch.long).flatten() for token in named if token is not None]
        special.append(torch.tensor(sorted(self.special_tokens), dtype=torch.long))
        self.special = torch.cat(special).to(device)

    def draft(self) -> None:
        """A draft begins: the forwards and scores until [`begin`] are not of a verification."""
        self.verifying = False
        self.trial.begin()

    def begin(self, start: int, candidates: torch.LongTensor, draft_logits: torch.Tensor | None) -> None:
        """`candidates` of shape `(k,)`, with `draft_logits` of shape `(k, vocab_size)` if the draft has any, are about
        to be verified behind `start` tokens."""
        if self.prompt_length is None:
            self.prompt_length = start
        self.start, self.candidates, self.draft_logits = start, candidates, draft_logits
        # What was accepted behind a token that was then rejected did not come to pass.
        self.replaced = {place: row for place, row in self.replaced.items() if place < start - self.prompt_length}
        self.scores = self.hidden = self.logits = self.matches = None
        self.asked: list[int] = []
        self.judged: dict[int, float] = {}
        self.trial.begin()
        self.verifying, self.rejected = True, False
        self.since, self.verify_seconds = time.perf_counter(), 0.0

    def observe(self, hidden: torch.Tensor, logits: torch.Tensor, entered: LayerInput | None = None) -> None:
        """Keep the last `k + 1` rows of the verification forward: row `i` chooses candidate `i`. A processor may run
        the target again (classifier-free guidance); the verification is the first forward behind the draft."""
        if self.verifying and self.logits is None:
            self.verify_seconds = time.perf_counter() - self.since
            self.stats.verify_seconds += self.verify_seconds
            rows = len(self.candidates) + 1
            if self.replaying is not None:
                since = time.perf_counter()
                hidden = self.replaying(entered, self.start + rows - 1 - entered.states.shape[1])
                self.stats.rule_seconds += time.perf_counter() - since
            self.hidden, self.logits = hidden[0, -rows:], logits[0, -rows:]

    def accepts(self, row: int, final_scores: torch.Tensor) -> bool:
        """Whether the rule accepts candidate `row`, given the scores of shape `(vocab_size,)` that the target's token
        would be taken from. Under greedy decoding only a mismatch is put to it; under sampling every candidate is,
        since what the target would draw is not known yet."""
        candidate = self.candidates[row]
        # Under sampling there is no choice yet, and the likeliest token stands for it.
        choice = (self.scores if self.do_sample else final_scores).argmax()
        mismatch = bool(choice != candidate)
        if self.rejected or not (mismatch or self.do_sample):
            return False
        self.rejected = not self.others_keep  # then nothing behind it counts
        # A special token is neither accepted nor overruled; a masked one is never accepted, however it was masked
        # (`remove_invalid_values` turns -inf into a number).
        if torch.isin(torch.stack([choice, candidate]), self.special).any() or not final_scores.softmax(-1)[candidate]:
            return False
        if mismatch:
            self.asked.append(row)
        rows = self._rows(row, final_scores)
        if not self.rule.accept(rows):
            return False
        self.rejected = False
        if mismatch:
            self.judged[row] = rows.margin.item()
        return True

    def _rows(self, row: int, final_scores: torch.Tensor) -> Rows:
        device = self.candidates.device
        if self.matches is None:
            self.matches = self.logits[:-1].argmax(-1).to(device) == self.candidates
        return Rows(
            candidates=self.candidates[row, None],
            scores=self.scores[None],
            final_scores=final_scores[None],
            logits_after=self.logits[None, row + 1].to(device),
            hidden=self.hidden[None, row : row + 2],
            positions=torch.tensor([self.start + row - self.prompt_length], device=device),
            matches_after=self.matches[row + 1 :].cumprod(-1).sum(-1, keepdim=True),
            draft_logits=None if self.draft_logits is None else self.draft_logits[row, None].to(device),
        )

    def end(self, kept: torch.LongTensor) -> None:
        """Count what the round kept: `kept` of shape `(n,)` are the tokens it added."""
        drafted = len(self.candidates)
        agreed = (kept[:drafted] == self.candidates[: len(kept)]).tolist()
        sources = [
            "target" if not same else "judged" if i in self.judged else "matched" for i, same in enumerate(agreed)
        ]
        sources += ["target"] * (len(kept) - len(sources))
        given_up = sum(self.judged[i] for i, source in enumerate(sources) if source == "judged")
        # What was asked behind an end of text did not come to pass.
        self.stats.count(drafted, sum(row < len(kept) for row in self.asked), sources, given_up)

    def own_scores(self, scores: tuple[torch.FloatTensor, ...] | None) -> tuple[torch.FloatTensor, ...] | None:
        """The target's own scores of each token, in place of those that became one-hot."""
        if scores is None or not self.replaced:
            return scores
        return tuple(self.replaced.get(place, row) for place, row in enumerate(scores))


class JudgeCandidateGenerator(CandidateGenerator):
    """
    Wraps the candidate generator that transformers built, whichever it is, and tells the round what was drafted
    (`get_candidates`).

    Args:
        inner ([`~transformers.generation.CandidateGenerator`]): The one to wrap.
        round ([`Round`]): State of the call.
        length ([`AutoLength`], *optional*): Learns from the rounds.
        blind (`bool`, defaults to `False`): Set the length that it chooses before each draft, since `inner` does not
            ask it on the way.
        context (`int`, *optional*): Tokens that the target can attend to: candidates beyond are left out.

    Attributes:
        waits (`bool`): Whether the first round has no candidates: the target's first forward reads embeddings.
    """

    def __init__(
        self,
        inner: CandidateGenerator,
        round: Round,
        length: AutoLength | None = None,
        blind: bool = False,
        context: int | None = None,
    ):
        self.inner, self.round, self.length, self.blind, self.context = inner, round, length, blind, context
        self.waits = False

    @property
    def requires_model_outputs(self) -> bool:
        return self.inner.requires_model_outputs

    @property
    def model_kwargs_overrides(self) -> dict:
        return self.inner.model_kwargs_overrides

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        self.round.draft()
        if self.blind:
            set_draft_length(self.inner, self.length.blind())
        since = time.perf_counter()
        candidate_ids, logits = input_ids, None  # where the target goes alone
        with contextlib.suppress(ContextFullError):
            candidate_ids, logits = self.inner.get_candidates(input_ids, **kwargs)
        if self.waits:  # drafted all the same: the draft has read the prompt
            candidate_ids, logits, self.waits = input_ids, None, False
        self.draft_seconds = time.perf_counter() - since
        self.round.stats.draft_seconds += self.draft_seconds
        start = input_ids.shape[1]
        if self.context is not None and candidate_ids.shape[1] > max(start, self.context):
            candidate_ids = candidate_ids[:, : max(start, self.context)]
            logits = None if logits is None else logits[:, : candidate_ids.shape[1] - start]
        candidates = candidate_ids[0, start:].to(input_ids.device)
        self.round.begin(start, candidates, None if logits is None else logits[0])
        return candidate_ids, logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        if self.length is not None:
            drafted = len(self.round.candidates)
            self.length.observe(drafted, num_matches, self.draft_seconds, self.round.verify_seconds)
        self.inner.update_candidate_strategy(input_ids, scores, num_matches)
