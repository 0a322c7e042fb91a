"""What follows a substitution: what the target thinks of its own next tokens, and how it finishes by itself.

In: an answer and its substitutions. Out: for each one a [`Continuation`]. Substitutions of one answer are branches of
it; each forward takes some tokens of many of them. A rewrite is decoded speculatively with the original answer as its
draft, since it mostly comes back to it, or else with the other rewrites of it, which leave it in like ways. Knows
nothing of what the results mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..forward.branches import Alone, Branches
from ..models.tokens import context_of
from .substitutions import Answer, Substitution


LONGEST_DRAFT = 16  # tokens
NGRAMS = (3, 2)  # tokens that place a rewrite in the original; one alone misleads more often than it helps


@dataclass(eq=False)
class Continuation:
    """
    A substitution and what came of it.

    Args:
        logits (`torch.Tensor` of shape `(2, vocab_size)`): The target's, where the token is chosen and after it.
        hidden (`torch.Tensor` of shape `(2, hidden_size)`): Its last hidden states *before* and *after* the token.
        logprobs (`torch.FloatTensor` of shape `(n,)`): Of the next `n` tokens of the answer behind the token, nats.
        best (`torch.FloatTensor` of shape `(n,)`): Of the target's choices there, nats.
        rewrite (`list[int]`, *optional*): How the target goes on after the token, if it was asked to.
        finished (`bool`): Whether the rewrite ended by itself.
    """

    answer: Answer
    substitution: Substitution
    logits: torch.Tensor
    hidden: torch.Tensor
    logprobs: torch.Tensor
    best: torch.Tensor
    rewrite: list[int] | None = None
    finished: bool = False


def follow(
    model: PreTrainedModel,
    answer: Answer,
    substitutions: Sequence[Substitution],
    rewritten: Sequence[bool],
    eos: list[int],
    window: int,
    room: int,
    packed: bool = True,
) -> Iterator[Continuation]:
    """
    Put each token in its place, look at it as a verification would, and let the target finish by itself.

    Args:
        rewritten (`Sequence[bool]`): Which of `substitutions` to finish.
        window (`int`): Tokens of the answer to score behind the token.
        room (`int`): Tokens of a forward, over all branches. Rewrites under way come first, new branches fill up.
        packed (`bool`): Whether branches share a forward ([`packs`]); else they come one after another.

    Yields:
        [`Continuation`], each when it is done.
    """
    rewrites: list[list[int]] = []  # of this answer, those under way among them
    if not packed:
        for substitution, rewrite in zip(substitutions, rewritten, strict=True):
            path = _Path(Alone(model, answer.cache), answer, substitution, rewrite, eos, window, rewrites)
            while not path.done:
                path.take(path.branches.feed([path.branch], [path.tokens(room)])[0])
            yield path.followed
        return
    branches = Branches(model, answer.cache)
    # Those to finish first: they take many small steps, which the others fill up.
    waiting = deque(sorted(zip(substitutions, rewritten, strict=True), key=lambda pair: not pair[1]))
    paths: list[_Path] = []
    while waiting or paths:
        left, fed = room, []
        rewriting = sum(path.rewriting for path in paths)
        for path in paths:
            if left:
                share = max(1, room // rewriting) if path.rewriting else left
                fed.append((path, path.tokens(min(share, left))))
                left -= len(fed[-1][1])
        while left and waiting:
            paths.append(_Path(branches, answer, *waiting.popleft(), eos, window, rewrites))
            fed.append((paths[-1], paths[-1].tokens(left)))
            left -= len(fed[-1][1])
        rows = branches.feed([path.branch for path, _ in fed], [tokens for _, tokens in fed])
        for (path, _), new in zip(fed, rows, strict=True):
            path.take(new)
            if path.done:
                yield path.followed
        paths = sorted((path for path in paths if not path.done), key=lambda path: not path.rewriting)


@dataclass(eq=False)
class _Path:
    """The way of one substitution: first the token and the answer behind it, then the target's own words."""

    branches: Branches
    answer: Answer
    substitution: Substitution
    rewrite: bool
    eos: list[int]
    window: int
    rewrites: list[list[int]]
    done: bool = False
    rewriting: bool = False
    followed: Continuation | None = None
    rows: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def __post_init__(self):
        place = self.answer.prompt_length + self.substitution.position
        self.rest = self.answer.ids[place + 1 :]
        # The state before the token is that of the token before it: it is fed again.
        self.branch = self.branches.branch(place - 1)
        before, token = self.answer.ids[place - 1, None], self.rest.new_tensor([self.substitution.token])
        self.fed = torch.cat([before, token, self.rest[: self.window]])
        # A rewrite may take a quarter longer than what it replaces, if the context allows.
        context, longer = context_of(self.branches.model), len(self.rest) * 5 // 4 + 16
        self.limit = longer if context is None else min(longer, context - place - 1)
        self.original, self.place, self.reach = self.rest.tolist(), 0, 2
        self.new: list[int] = []

    def tokens(self, most: int) -> torch.LongTensor:
        """What to feed next, at most `most` tokens."""
        if not self.rewriting:
            return self.fed[self.branch.length :][:most]
        self.draft = self._guess()[: min(most - 1, self.limit - len(self.new) - 1)]
        return self.rest.new_tensor([self.new[-1], *self.draft])

    def take(self, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """What came of it: logits `(n, vocab_size)` and hidden states `(n, hidden_size)`."""
        logits, hidden = rows
        choices = logits.argmax(-1).tolist()
        if self.rewriting:
            kept = _same(self.draft, choices)
            self.branches.cut(self.branch, self.branch.length - len(self.draft) + kept)
            self.place += kept + 1
            self.reach = min(2 * self.reach, LONGEST_DRAFT) if self.draft and kept == len(self.draft) else 2
            self._append(choices[: kept + 1])
            return
        first = self.branch.length - len(choices)
        keep = max(0, 2 - first)  # whole rows of the first two only
        scores = logits.float()
        total, behind = scores.logsumexp(-1), self.fed[first + 1 :][: len(choices)]
        told = scores[: len(behind)].gather(-1, behind[:, None]).squeeze(-1) - total[: len(behind)]
        self.rows.append((scores[:keep].clone(), hidden[:keep], told, scores.amax(-1) - total, torch.tensor(choices)))
        if self.branch.length < len(self.fed):
            return
        logits, hidden, told, best, choices = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        self.followed = Continuation(self.answer, self.substitution, logits, hidden, told[1:], best[1:-1])
        self.rows.clear()
        if not self.rewrite:
            self.branches.cut(self.branch, 0)
            self.done = True
            return
        self.rewriting = True
        self.rewrites.append(self.new)
        kept = _same(self.fed[2:].tolist(), choices[1:].tolist())
        self.branches.cut(self.branch, 2 + kept)
        self.place = kept + 1
        self._append(choices[1 : kept + 2].tolist())

    def _append(self, tokens: list[int]) -> None:
        self.new += tokens[: self.limit - len(self.new)]
        end = next((i for i, token in enumerate(self.new) if token in self.eos), None)
        if end is not None:
            del self.new[end + 1 :]
        if end is not None or len(self.new) == self.limit:
            self.followed.rewrite, self.followed.finished, self.done = self.new, end is not None, True
            self.branches.cut(self.branch, 0)

    def _guess(self) -> list[int]:
        """How the rewrite goes on if it says what was said before: behind the place in the original that ends like it,
        of several the nearest to where it was, or else behind the last such place in another rewrite."""
        for size in NGRAMS:
            tail = self.new[-size:]
            if ends := _ends(self.original, tail):
                self.place = min(ends, key=lambda end: abs(end - self.place))
                return self.original[self.place : self.place + self.reach]
            for other in self.rewrites:
                if other is not self.new and (ends := _ends(other[:-1], tail)):
                    return other[ends[-1] : ends[-1] + self.reach]
        return []


def _ends(text: list[int], tail: list[int]) -> list[int]:
    """Behind which places of a text `tail` stands."""
    size = len(tail)
    return [i + size for i in range(len(text) - size + 1) if text[i : i + size] == tail]


def _same(draft: list[int], choices: list[int]) -> int:
    """How many tokens of a draft are what the target chose."""
    return next((i for i, (a, b) in enumerate(zip(draft, choices, strict=False)) if a != b), len(draft))
