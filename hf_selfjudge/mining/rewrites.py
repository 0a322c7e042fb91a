"""Substitution -> what follows it: the target's scores of the answer's next tokens, and how it finishes by itself.

In: an answer and its substitutions. Out: a [`Continuation`] of each. Substitutions of one answer are branches of it in
one cache; each forward takes some tokens of many branches. A rewrite is decoded speculatively. Its draft is the
original answer, to which it mostly comes back, or else another rewrite of the same answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..forward.branches import Alone, Branches
from ..judge.layers import LayerStates
from ..models.tokens import context_of, eos_tokens
from .answers import Answer
from .substitutions import Substitution


SHORTEST_DRAFT, LONGEST_DRAFT = 2, 16  # tokens
NGRAMS = (3, 2)  # last tokens of a rewrite to look up in the original; a single one misleads more often than it helps


@dataclass(eq=False)
class Continuation:
    """
    A substitution and what follows it.

    Args:
        logits (`torch.Tensor` of shape `(2, vocab_size)`): The target's, before and after the substitute.
        hidden (`torch.Tensor` of shape `(2, hidden_size)`): The target's hidden states before and after it.
        logprobs (`torch.FloatTensor` of shape `(n,)`): Log-probability of each of the answer's next `n` tokens behind
            the substitute, nats.
        best (`torch.FloatTensor` of shape `(n,)`): Log-probability of the target's choices there, nats.
        rewrite (`list[int]`, *optional*): How the target goes on behind the substitute; `None` if that was not asked
            for.
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
    def rewritten(self) -> list[int]:
        """The whole rewritten answer."""
        before = self.answer.tokens[: self.substitution.position].tolist()
        return [*before, self.substitution.token, *self.rewrite]


def continue_substitutions(
    model: PreTrainedModel,
    answer: Answer,
    substitutions: Sequence[Substitution],
    to_rewrite: Sequence[bool],
    window: int,
    forward_tokens: int,
    packed: bool = True,
    layer_states: LayerStates | None = None,
) -> Iterator[Continuation]:
    """
    Put each substitute in its place, read what a verification would read there, and let the target finish by itself.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        to_rewrite (`Sequence[bool]`): Which of `substitutions` the target shall finish.
        window (`int`): How many tokens of the answer behind the substitute to score.
        forward_tokens (`int`): Tokens of a forward, over all branches. Rewrites under way come first, new branches
            fill up.
        packed (`bool`): Whether branches share a forward ([`packs`]); else they come one after another.
        layer_states ([`LayerStates`], *optional*): Reads hidden states inside the target. By default the last ones are
            read.

    Yields:
        [`Continuation`], each as soon as it is done.
    """
    rewrites: list[list[int]] = []  # of this answer, those under way among them
    pairs = list(zip(substitutions, to_rewrite, strict=True))
    if not packed:
        for pair in pairs:
            path = _Path(Alone(model, answer.cache, layer_states), answer, *pair, window, rewrites)
            while not path.done:
                path.take(*path.branches.feed([path.branch], [path.next_tokens(forward_tokens)])[0])
            yield path.continuation
        return
    branches = Branches(model, answer.cache, layer_states)
    # Those to rewrite first: they take many small steps, which the others fill up.
    waiting = deque(sorted(pairs, key=lambda pair: not pair[1]))
    paths: list[_Path] = []
    while waiting or paths:
        left, fed = forward_tokens, []
        rewriting = sum(path.rewriting for path in paths)
        for path in paths:
            if left:
                share = max(1, forward_tokens // rewriting) if path.rewriting else left
                fed.append((path, path.next_tokens(min(share, left))))
                left -= len(fed[-1][1])
        while left and waiting:
            paths.append(_Path(branches, answer, *waiting.popleft(), window, rewrites))
            fed.append((paths[-1], paths[-1].next_tokens(left)))
            left -= len(fed[-1][1])
        outputs = branches.feed([path.branch for path, _ in fed], [tokens for _, tokens in fed])
        for (path, _), output in zip(fed, outputs, strict=True):
            path.take(*output)
            if path.done:
                yield path.continuation
        paths = sorted((path for path in paths if not path.done), key=lambda path: not path.rewriting)


@dataclass(eq=False)
class _Path:
    """One substitution under way: first the substitute and the answer behind it are fed and scored, then the rewrite
    is decoded."""

    branches: Branches
    answer: Answer
    substitution: Substitution
    to_rewrite: bool
    window: int
    rewrites: list[list[int]]
    done: bool = False
    rewriting: bool = False
    continuation: Continuation | None = None
    scored: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def __post_init__(self):
        place = self.answer.prompt_length + self.substitution.position
        suffix = self.answer.ids[place + 1 :]
        # The state before the substitute is that of the token before it: it is fed again.
        self.branch = self.branches.branch(place - 1)
        before, substitute = self.answer.ids[place - 1, None], suffix.new_tensor([self.substitution.token])
        self.to_score = torch.cat([before, substitute, suffix[: self.window]])
        # A rewrite may take a quarter longer than what it replaces, if the context allows.
        context, longer = context_of(self.branches.model), len(suffix) * 5 // 4 + 16
        self.limit = longer if context is None else min(longer, context - place - 1)
        self.end_tokens = eos_tokens(self.branches.model)
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
        """Go on with the forward's output for these tokens: logits of shape `(n, vocab_size)` and hidden states of
        shape `(n, hidden_size)`."""
        choices = logits.argmax(-1).tolist()
        if self.rewriting:
            accepted = _common_prefix(self.draft, choices)
            self.branches.cut(self.branch, self.branch.length - len(self.draft) + accepted)
            self.place += accepted + 1
            whole = self.draft and accepted == len(self.draft)
            self.draft_length = min(2 * self.draft_length, LONGEST_DRAFT) if whole else SHORTEST_DRAFT
            self._append(choices[: accepted + 1])
            return
        first = self.branch.length - len(choices)
        keep = max(0, 2 - first)  # whole rows of the first two only
        logits, next_tokens = logits.float(), self.to_score[first + 1 :][: len(choices)]
        total = logits.logsumexp(-1)
        logprobs = logits[: len(next_tokens)].gather(-1, next_tokens[:, None]).squeeze(-1) - total[: len(next_tokens)]
        best = logits.amax(-1) - total
        self.scored.append((logits[:keep].clone(), hidden[:keep], logprobs, best, torch.tensor(choices)))
        if self.branch.length == len(self.to_score):
            self._end_of_scoring()

    def _end_of_scoring(self) -> None:
        logits, hidden, logprobs, best, choices = (torch.cat(parts) for parts in zip(*self.scored, strict=True))
        self.continuation = Continuation(self.answer, self.substitution, logits, hidden, logprobs[1:], best[1:-1])
        self.scored.clear()
        if not self.to_rewrite:
            self._end()
            return
        # The tokens that were scored were the rewrite's first draft.
        self.rewriting = True
        self.rewrites.append(self.rewrite)
        accepted = _common_prefix(self.to_score[2:].tolist(), choices[1:].tolist())
        self.branches.cut(self.branch, 2 + accepted)
        self.place = accepted + 1
        self._append(choices[1 : accepted + 2].tolist())

    def _append(self, tokens: list[int]) -> None:
        self.rewrite += tokens[: self.limit - len(self.rewrite)]
        end = next((i for i, token in enumerate(self.rewrite) if token in self.end_tokens), None)
        if end is not None:
            del self.rewrite[end + 1 :]
        if end is not None or len(self.rewrite) == self.limit:
            self.continuation.rewrite, self.continuation.finished = self.rewrite, end is not None
            self._end()

    def _end(self) -> None:
        self.branches.cut(self.branch, 0)
        self.done = True

    def _draft(self) -> list[int]:
        """What follows the rewrite's last tokens in the original (the occurrence nearest to where the rewrite was), or
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


def _common_prefix(draft: list[int], choices: list[int]) -> int:
    """How many tokens of a draft are the target's choices."""
    return next((i for i, (a, b) in enumerate(zip(draft, choices, strict=False)) if a != b), len(draft))
