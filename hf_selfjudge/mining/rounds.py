"""In: an [`Answer`], and a draft model or prompt lookup. Out: [`Round`]s of lossless decoding in it, with what the
draft proposes beyond the first mismatch, and what the target chooses there. Where a rule keeps that mismatch, decoding
meets the later ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ..forward.branches import Alone, Branches
from ..judge.features import entropy
from ..judge.layers import LayerStates
from ..models.tokens import before_special, common_prefix, context_of, eos_tokens
from .answers import Answer
from .substitutions import Substitution


@dataclass(eq=False)
class Round:
    """
    One round of decoding that begins in an answer.

    Args:
        start (`int`): Tokens of the answer before it.
        tokens (`list[int]`): Candidates, up to a mismatch that no rule decides.
        matched (`int`): How many of them come before the first that differs from the answer.
        logits (`list[torch.Tensor]`, *optional*): The draft's, of shape `(vocab_size,)`, for each candidate.
        choices (`list[int]`): What the target chooses in the place of each candidate, with those before it kept.
        best, entropies (`list[float]`): Log-probability of each choice, and entropy of the target's distribution,
            nats.
        states (`torch.Tensor` of shape `(n, hidden_size)`, *optional*): The target's hidden states after the
            candidates from the first mismatch on, if there is one.
    """

    start: int
    tokens: list[int]
    matched: int
    logits: list[torch.Tensor] | None
    choices: list[int]
    best: list[float]
    entropies: list[float]
    states: torch.Tensor | None = None

    def ahead(self, place: int) -> torch.Tensor | None:
        """The mean of the hidden states after the candidates that follow that at `place`, of shape `(hidden_size,)`;
        `None` if none follows. See [`round_states`](../judge/features.py)."""
        states = self.states[place + 1 - self.matched : len(self.tokens) - self.matched]
        return states.float().mean(0) if len(states) else None

    def mismatches(self) -> list[Substitution]:
        """A substitution, to be rewritten, for each candidate that is not the target's choice."""
        return [
            Substitution(
                position=self.start + place,
                choice=choice,
                token=token,
                kind="mismatch",
                draft_rank=0,
                draft_logits=None if self.logits is None else self.logits[place],
                to_rewrite=True,
                drafted=self.tokens[self.matched : place],
            )
            for place, (token, choice) in enumerate(zip(self.tokens, self.choices, strict=True))
            if token != choice
        ]

    def cut(self, end: int) -> None:
        """Keep only the first `end` candidates."""
        for column in (self.tokens, self.choices, self.best, self.entropies):
            del column[end:]

    def row(self, answer: Answer, number: int) -> dict:
        """A row of [`ANSWER_FEATURES`]: the answer up to the round, and then the candidates."""
        known = answer.row(number)
        return known | {
            "answer_ids": [*known["answer_ids"][: self.start], *self.tokens],
            "drafted": len(self.tokens),
            "own": False,
            "finished": False,
            "choice_logprobs": [*known["choice_logprobs"][: self.start], *self.best],
            "entropies": [*known["entropies"][: self.start], *self.entropies],
        }


@torch.no_grad()
def find_rounds(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    answer: Answer,
    special_tokens: list[int],
    length: int,
    choose: Callable[[list[int]], Iterable[int]],
    packed: bool = True,
    layer_states: LayerStates | None = None,
) -> list[Round]:
    """
    Rounds of lossless decoding of the target's own answer. They end at a mismatch with a special token, which no rule
    decides, and where the text ends.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        draft ([`~transformers.PreTrainedModel`], *optional*): By default drafts are looked up in the text.
        length (`int`): Candidates of a round.
        choose (`Callable`): Gets where the answer's rounds start, and returns those to draft.
        packed (`bool`): Whether rounds share a forward of the target ([`packs`]).
        layer_states ([`LayerStates`], *optional*): Reads the [`Round`]'s states inside the target. By default the last
            ones are read.
    """
    drafter = _Lookup(answer, length) if draft is None else _Draft(draft, answer, length)
    text, starts, start = answer.tokens.tolist(), [], 0
    while start < len(text):
        starts.append(start)
        start += common_prefix(drafter.begin(start), text[start:]) + 1
    special, rounds = {*special_tokens}, []
    for start in sorted(choose(starts), reverse=True):  # a draft's cache is cut to one after another
        tokens, logits = drafter.finish(start)
        if (context := context_of(model)) is not None:
            tokens = tokens[: context - answer.prompt_length - start]
        matched = min(common_prefix(tokens, text[start:]), len(text) - start)
        if start + matched == len(text) or special & {text[start + matched], *tokens[matched : matched + 1]}:
            tokens = tokens[:matched]
        known = slice(start, start + min(matched + 1, len(tokens)))
        seen = answer.choices[known, 0].tolist(), answer.best[known].tolist(), answer.entropies[known].tolist()
        rounds.append(Round(start, tokens, matched, logits, *seen))
    _verify(model, answer, [each for each in rounds if len(each.tokens) > each.matched], special, packed, layer_states)
    return rounds[::-1]


def _verify(
    model: PreTrainedModel,
    answer: Answer,
    rounds: list[Round],
    special: set[int],
    packed: bool,
    layer_states: LayerStates | None,
) -> None:
    """Add what the target computes beyond the first mismatch, and cut the rounds where no rule decides any more."""
    end_tokens = eos_tokens(model)
    shared = Branches(model, answer.cache, layer_states) if packed else None
    for part in [rounds] if packed else [[each] for each in rounds]:
        if not part:
            continue
        branches = shared or Alone(model, answer.cache, layer_states)
        starts = [branches.branch(answer.prompt_length + each.start + each.matched) for each in part]
        outputs = branches.feed(starts, [answer.ids.new_tensor(each.tokens[each.matched :]) for each in part])
        for each, (logits, states) in zip(part, outputs, strict=True):
            each.states = states[: max(0, before_special(each.tokens, special) - each.matched)]
            logprobs = logits[:-1].float().log_softmax(-1)  # nothing is chosen after the last candidate
            each.choices += logprobs.argmax(-1).tolist()
            each.best += logprobs.amax(-1).tolist()
            each.entropies += entropy(logprobs).tolist()
            for place, (token, choice) in enumerate(zip(each.tokens, each.choices, strict=True)):
                if token != choice and special & {token, choice}:
                    each.cut(place)
                    break
                if token == choice and token in end_tokens:
                    each.cut(place + 1)
                    break


class _Draft:
    """Drafts with a model, which has read the answer."""

    def __init__(self, draft: PreTrainedModel, answer: Answer, length: int):
        self.draft, self.answer, self.length, self.cache = draft, answer, length, DynamicCache()
        read = answer.ids[:-1][: context_of(draft)]  # nothing follows the last token
        keep = len(read) - answer.prompt_length + 1  # the row before each token
        self.logits = list(self._read(read, keep)) if keep > 0 else []
        self.proposed = [int(row.argmax()) for row in self.logits]

    def _read(self, tokens: torch.LongTensor, keep: int) -> torch.Tensor:
        tokens = tokens[None].to(self.draft.device)
        return self.draft(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits[0, -keep:]

    def begin(self, start: int) -> list[int]:
        """The candidates of a round, as far as they match the answer, and the next one."""
        return self.proposed[start : start + self.length]

    def finish(self, start: int) -> tuple[list[int], list[torch.Tensor]]:
        """All candidates of a round, and the draft's logits for each. Call it for the last round first."""
        end = start + common_prefix(self.begin(start), self.answer.tokens[start:].tolist()) + 1
        tokens = self.begin(start)[: end - start]
        if not tokens:  # the draft's context ends before
            return [], []
        logits = [row.clone() for row in self.logits[start:end][: self.length]]  # frees the rest
        place = self.answer.prompt_length + start + len(tokens) - 1  # of the last of them
        self.cache.crop(place - self.cache.get_seq_length())
        while tokens and len(tokens) < self.length and place < (context_of(self.draft) or math.inf):
            logits.append(self._read(self.answer.ids.new_tensor(tokens[-1:]), 1)[0])
            tokens.append(int(logits[-1].argmax()))
            place += 1
        return tokens, logits


class _Lookup:
    """Drafts by prompt lookup."""

    def __init__(self, answer: Answer, length: int):
        self.answer = answer
        limits = {"num_output_tokens": length, "max_length": len(answer.ids) + length}
        self.generator = PromptLookupCandidateGenerator(**limits)

    def begin(self, start: int) -> list[int]:
        """The candidates of a round."""
        known = self.answer.ids[None, : self.answer.prompt_length + start]
        return self.generator.get_candidates(known)[0][0, known.shape[1] :].tolist()

    def finish(self, start: int) -> tuple[list[int], None]:
        """The candidates of a round; they have no logits."""
        return self.begin(start), None
