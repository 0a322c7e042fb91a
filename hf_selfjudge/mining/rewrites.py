"""In: an answer and its substitutions. Out: a [`Continuation`] of each. Substitutions of one answer are branches of it
in one cache; each forward takes some tokens of many branches. A rewrite is decoded speculatively: its draft is the
original answer, to which it mostly returns, or else another rewrite of the same answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..forward.branches import Alone, Branches
from ..judge.layers import LayerStates
from ..models.tokens import common_prefix, context_of, eos_tokens
from .answers import Answer
from .substitutions import Substitution


SHORTEST_DRAFT, LONGEST_DRAFT = 2, 16  # tokens
NGRAMS = (3, 2)  # how many last tokens of a rewrite to look up; one token misleads more often than it helps


@dataclass(eq=False)
class Continuation:
    """
    A substitution and what follows it.

    Args:
        logits (`torch.Tensor` of shape `(2, vocab_size)`): The target's, before and after the substitute.
        hidden (`torch.Tensor` of shape `(2, hidden_size)`): The target's hidden states before and after it.
        logprobs, best (`torch.FloatTensor` of shape `(n,)`): Log-probabilities after the substitute, nats: of the
            answer's next `n` tokens, and of the target's choices there.
        rewrite (`list[int]`, *optional*): How the target continues after the substitute, if that was asked for.
        finished (`bool`): Whether the rewrite ended with an EOS token.
    """

    answer: Answer
    substitution: Substitution
    logits: torch.Tensor
    hidden: torch.Tensor
    logprobs: torch.Tensor
    best: torch.Tensor
    rewrite: list[int] | None = None
    finished: bool = False

    @property
    def text(self) -> list[int]:
        """The tokens of the rewritten answer."""
        return [*self.substitution.before(self.answer), self.substitution.token, *self.rewrite]


def continue_substitutions(
    model: PreTrainedModel,
    answer: Answer,
    substitutions: Sequence[Substitution],
    window: int,
    forward_tokens: int,
    packed: bool = True,
    layer_states: LayerStates | None = None,
) -> Iterator[Continuation]:
    """
    Put each substitute in its place, read what a verification would read there, and let the target finish the answer
    where the substitution is `to_rewrite`.

    Args:
        window (`int`): How many tokens of the answer after the substitute to score.
        forward_tokens (`int`): Limit of tokens in a forward, over all branches.
        packed (`bool`): Whether branches share a forward ([`packs`]); else they come one after another.
        layer_states ([`LayerStates`], *optional*): Reads hidden states inside the target. By default the last ones are
            read.

    Yields:
        [`Continuation`], each as soon as it is done.
    """
    rewrites: list[list[int]] = []  # of this answer, finished or not
    shared = Branches(model, answer.cache, layer_states) if packed else None
    # Those to rewrite come first: they take many small steps, and the others fill the forwards.
    waiting = deque(sorted(substitutions, key=lambda substitution: not substitution.to_rewrite))
    paths: deque[_Path] = deque()
    while waiting or paths:
        left, fed = forward_tokens, []
        rewriting = sum(path.rewriting for path in paths)
        while left and (paths or (waiting and (packed or not fed))):
            if not paths:
                branches = shared or Alone(model, answer.cache, layer_states)
                paths.append(_Path(branches, answer, waiting.popleft(), window, rewrites))
            path = paths.popleft()
            share = max(1, forward_tokens // rewriting) if path.rewriting else left
            fed.append((path, path.next_tokens(min(share, left))))
            left -= len(fed[-1][1])
        outputs = fed[0][0].branches.feed([path.branch for path, _ in fed], [tokens for _, tokens in fed])
        for (path, _), output in zip(fed, outputs, strict=True):
            path.take(*output)
            if path.done:
                path.branches.cut(path.branch, 0)
                yield path.continuation
        unfinished = [path for path, _ in fed if not path.done]
        paths = deque(sorted([*unfinished, *paths], key=lambda path: not path.rewriting))


class _Path:
    """One substitution under way: first the substitute and the answer after it are fed and scored, then the rewrite is
    decoded."""

    def __init__(
        self, branches: Branches, answer: Answer, substitution: Substitution, window: int, rewrites: list[list[int]]
    ):
        self.branches, self.answer, self.substitution = branches, answer, substitution
        self.rewrites, self.rewriting, self.done = rewrites, False, False
        self.scored: list[tuple[torch.Tensor, ...]] = []
        place, drafted = answer.prompt_length + substitution.position, substitution.drafted
        suffix = answer.ids[place + 1 :]
        # The state before the substitute is that of the token before it, which is fed again.
        self.first = len(drafted)  # row of the state before the substitute
        self.branch = branches.branch(place - self.first - 1)
        before = answer.ids[place - self.first - 1, None]
        own = suffix.new_tensor([*drafted, substitution.token])
        self.to_score = torch.cat([before, own, suffix[: 0 if drafted else window]])
        # A rewrite may be a quarter longer than what it replaces, if the context allows.
        context, longer = context_of(branches.model), len(suffix) * 5 // 4 + 16
        self.limit = longer if context is None else min(longer, context - place - 1)
        self.end_tokens = eos_tokens(branches.model)
        # Where the rewrite is in the original suffix, and how many tokens of that to draft.
        self.original, self.place, self.draft_length = suffix.tolist(), 0, SHORTEST_DRAFT
        self.rewrite: list[int] = []

    def next_tokens(self, limit: int) -> torch.LongTensor:
        """What to feed next, at most `limit` tokens."""
        if not self.rewriting:
            return self.to_score[self.branch.length :][:limit]
        self.draft = self._draft()[: min(limit - 1, self.limit - len(self.rewrite) - 1)]
        return self.to_score.new_tensor([self.rewrite[-1], *self.draft])

    def take(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Continue with the forward's output for these tokens: logits of shape `(n, vocab_size)` and hidden states of
        shape `(n, hidden_size)`."""
        choices = logits.argmax(-1).tolist()
        if self.rewriting:
            accepted = common_prefix(self.draft, choices)
            self.branches.cut(self.branch, self.branch.length - len(self.draft) + accepted)
            self.place += accepted + 1
            whole = self.draft and accepted == len(self.draft)
            self.draft_length = min(2 * self.draft_length, LONGEST_DRAFT) if whole else SHORTEST_DRAFT
            self._append(choices[: accepted + 1])
            return
        first = self.branch.length - len(choices)
        rows = slice(max(0, self.first - first), max(0, self.first + 2 - first))  # before and after the substitute
        logits, next_tokens = logits.float(), self.to_score[first + 1 :][: len(choices)]
        total = logits.logsumexp(-1)
        logprobs = logits[: len(next_tokens)].gather(-1, next_tokens[:, None]).squeeze(-1) - total[: len(next_tokens)]
        best = logits.amax(-1) - total
        self.scored.append((logits[rows].clone(), hidden[rows], logprobs, best, torch.tensor(choices)))
        if self.branch.length < len(self.to_score):
            return
        logits, hidden, logprobs, best, choices = (torch.cat(parts) for parts in zip(*self.scored, strict=True))
        after = slice(self.first + 1, -1)
        self.continuation = Continuation(
            self.answer, self.substitution, logits, hidden, logprobs[self.first + 1 :], best[after]
        )
        self.scored.clear()
        self.rewriting, self.done = self.substitution.to_rewrite, not self.substitution.to_rewrite
        if self.rewriting:  # the tokens that were scored are the rewrite's first draft
            self.rewrites.append(self.rewrite)
            choices = choices[self.first + 1 :].tolist()
            accepted = common_prefix(self.to_score[self.first + 2 :].tolist(), choices)
            self.branches.cut(self.branch, self.first + 2 + accepted)
            self.place = accepted + 1
            self._append(choices[: accepted + 1])

    def _append(self, tokens: list[int]) -> None:
        self.rewrite += tokens[: self.limit - len(self.rewrite)]
        end = next((i for i, token in enumerate(self.rewrite) if token in self.end_tokens), None)
        if end is not None:
            del self.rewrite[end + 1 :]
        if end is not None or len(self.rewrite) == self.limit:
            self.continuation.rewrite, self.continuation.finished = self.rewrite, end is not None
            self.done = True

    def _draft(self) -> list[int]:
        """What follows the rewrite's last tokens in the original (the occurrence nearest to the rewrite's place), or
        else in another rewrite (the last occurrence)."""
        for size in NGRAMS:
            tail = self.rewrite[-size:]
            if ends := _occurrences(self.original, tail):
                self.place = min(ends, key=lambda end: abs(end - self.place))
                return self.original[self.place : self.place + self.draft_length]
            for other in self.rewrites:
                if other is not self.rewrite and (ends := _occurrences(other[:-1], tail)):
                    return other[ends[-1] : ends[-1] + self.draft_length]
        return []


def _occurrences(text: list[int], tail: list[int]) -> list[int]:
    """Where each occurrence of `tail` in a text ends."""
    size = len(tail)
    return [i + size for i in range(len(text) - size + 1) if text[i : i + size] == tail]
