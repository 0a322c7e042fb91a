"""Where a text ends: after the first token that one of the stopping criteria ends it at.

In: what a round kept. Out: how much of it is text. Stock assisted generation asks its criteria once a round, about all
that the round kept, so that a text runs on behind the token that should have ended it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Cache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput


if TYPE_CHECKING:
    from .verification import Round


# What `generate` returns with an entry for each token.
PER_TOKEN_OUTPUTS = (
    *("scores", "logits", "attentions", "hidden_states"),
    *("decoder_attentions", "decoder_hidden_states", "cross_attentions"),
)


class HeldStreamer(BaseStreamer):
    """
    Holds back what a round kept until it is known how much of it is text.

    Args:
        streamer ([`~transformers.generation.BaseStreamer`]): The caller's.
    """

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.holding = streamer, False
        self.held: torch.Tensor | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.holding:
            self.held = value
        else:  # the prompt; or decoding without a draft
            self.streamer.put(value)

    def release(self, tokens: int) -> None:
        """Hand on the first `tokens` of what is held."""
        self.streamer.put(self.held[:, :tokens])

    def end(self) -> None:
        self.streamer.end()


class LateCrop:
    """
    Puts off the cropping of a cache to the end of a round: a cache with a sliding window can be cropped only once
    behind a forward.

    Args:
        cache ([`~transformers.Cache`]): Of the target.
    """

    def __init__(self, cache: Cache):
        self.cache = cache
        self.tokens: int | None = None  # to remove
        cache.crop = self._note

    def _note(self, tokens_to_remove: int) -> None:
        self.tokens = abs(tokens_to_remove)

    def crop(self, more: int = 0) -> None:
        """Remove what was asked for, and `more` tokens."""
        type(self.cache).crop(self.cache, -(self.tokens + more))
        self.tokens = None

    def undo(self) -> None:
        """From now on crop at once; also what was put off when a criterion raised."""
        vars(self.cache).pop("crop", None)
        if self.tokens is not None:
            self.crop()


class KeptTokens(StoppingCriteriaList):
    """
    Asks stopping criteria about each token that a round kept, in order, as plain decoding asks them, and ends the text
    behind the first one that they end it at.

    Args:
        criteria ([`~transformers.StoppingCriteriaList`]): Those of transformers and the caller's.
        round ([`Round`]): State of the call.
        streamer ([`HeldStreamer`], *optional*): Gets what is text.

    Attributes:
        cache ([`LateCrop`], *optional*): Set when decoding with a draft begins.
        dropped (`int`): Tokens that the last round kept behind the end of the text.
    """

    def __init__(self, criteria: StoppingCriteriaList, round: Round, streamer: HeldStreamer | None):
        super().__init__(criteria)
        self.round, self.streamer = round, streamer
        self.cache: LateCrop | None = None
        self.dropped = 0

    def begin(self, cache: Cache) -> None:
        """Decoding with a draft begins."""
        self.cache = LateCrop(cache)
        if self.streamer is not None:
            self.streamer.holding = True

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[torch.FloatTensor, ...] | None, **kwargs
    ) -> torch.BoolTensor:
        if self.cache is None:  # without a draft each token comes by itself
            return super().__call__(input_ids, scores, **kwargs)
        round, length = self.round, input_ids.shape[1]
        scores = round.own_scores(scores)
        for end in range(round.start + 1, length + 1):
            round.trial.keep(end - 1)  # first, since a criterion may ask a processor how far it is
            so_far = None if scores is None else scores[: end - round.prompt_length]
            done = super().__call__(input_ids[:, :end], so_far, **kwargs)
            if done.all():
                break
        self.dropped = length - end
        round.end(input_ids[0, round.start : end])
        self.cache.crop(self.dropped)
        if self.streamer is not None:
            self.streamer.release(end - round.start)
        return done


def without_last(output: torch.Tensor | ModelOutput, tokens: int) -> torch.Tensor | ModelOutput:
    """What `generate` returned, without its last `tokens` tokens."""
    if not tokens:
        return output
    if isinstance(output, torch.Tensor):
        return output[:, :-tokens]
    output.sequences = output.sequences[:, :-tokens]
    for name in PER_TOKEN_OUTPUTS:
        if output.get(name) is not None:
            output[name] = output[name][:-tokens]
    return output
