"""Where a text ends: after the first token at which a stopping criterion ends it.

In: what a round kept. Out: how much of it is text. Stock assisted generation asks its criteria once a round, about all
that the round kept, so that the text runs on behind the token that should have ended it.
"""

from __future__ import annotations

import torch
from transformers import Cache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .verification import Call


# Outputs of `generate` with an entry for each token.
PER_TOKEN_OUTPUTS = (
    *("scores", "logits", "attentions", "hidden_states"),
    *("decoder_attentions", "decoder_hidden_states", "cross_attentions"),
)


class HeldStreamer(BaseStreamer):
    """Holds back from the caller's `streamer` what a round kept until it is known how much of it is text."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.holding = streamer, False
        self.held: torch.Tensor | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.holding:
            self.held = value
        else:  # the prompt; or decoding without a draft
            self.streamer.put(value)

    def release(self, tokens: int) -> None:
        """Hand on the first `tokens` of the held ones."""
        self.streamer.put(self.held[:, :tokens])

    def end(self) -> None:
        self.streamer.end()


class LateCrop:
    """Puts off the cropping of the target's cache to the end of a round: a cache with a sliding window can be cropped
    only once behind a forward."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.tokens: int | None = None  # to remove
        cache.crop = self._postpone

    def _postpone(self, tokens_to_remove: int) -> None:
        self.tokens = abs(tokens_to_remove)

    def crop(self, more: int = 0) -> None:
        """Remove what was to be removed, and `more` tokens."""
        type(self.cache).crop(self.cache, -(self.tokens + more))
        self.tokens = None

    def undo(self) -> None:
        """From now on crop at once; also what is still put off because a criterion raised."""
        vars(self.cache).pop("crop", None)
        if self.tokens is not None:
            self.crop()


class KeptTokens(StoppingCriteriaList):
    """
    Asks stopping criteria about each token that a round kept, in order, as plain decoding does, and ends the text
    behind the first token at which they end it.

    Attributes:
        cache ([`LateCrop`], *optional*): Set when decoding with a draft begins.
        dropped (`int`): Tokens that the last round kept behind the end of the text.
    """

    def __init__(self, criteria: StoppingCriteriaList, call: Call, streamer: HeldStreamer | None):
        super().__init__(criteria)
        self.call, self.streamer = call, streamer
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
        call, start, length = self.call, self.call.round.start, input_ids.shape[1]
        scores = call.own_scores(scores)
        for end in range(start + 1, length + 1):
            call.trial.keep(end - 1)  # first, since a criterion may ask a processor how far it is
            scores_so_far = None if scores is None else scores[: end - call.prompt_length]
            done = super().__call__(input_ids[:, :end], scores_so_far, **kwargs)
            if done.all():
                break
        self.dropped = length - end
        call.end_round(input_ids[0, start:end].tolist())
        self.cache.crop(self.dropped)
        if self.streamer is not None:
            self.streamer.release(end - start)
        return done


def without_last(output: torch.Tensor | ModelOutput, tokens: int) -> torch.Tensor | ModelOutput:
    """The output of `generate` without its last `tokens` tokens."""
    if not tokens:
        return output
    if isinstance(output, torch.Tensor):
        return output[:, :-tokens]
    output.sequences = output.sequences[:, :-tokens]
    for name in PER_TOKEN_OUTPUTS:
        if output.get(name) is not None:
            output[name] = output[name][:-tokens]
    return output
