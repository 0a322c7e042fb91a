"""Where a text ends: after the first token at which a stopping criterion ends it.

In: what a round kept. Out: how much of it is text. Stock assisted generation asks its criteria once a round, about all
that the round kept, so that the text runs on after the token that should have ended it.
"""

from __future__ import annotations

import torch
from transformers import Cache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .verification import Call


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

    def end(self) -> None:
        self.streamer.end()


class KeptTokens(StoppingCriteriaList):
    """
    Asks stopping criteria about each token that a round kept, in order, as plain decoding does, and ends the text
    after the first token at which they end it.

    The target's cache is cropped only then, since a cache with a sliding window can be cropped only once after a
    forward.

    Attributes:
        cache (`Cache`, *optional*): The target's; set when decoding with a draft begins.
        to_crop (`int`, *optional*): Tokens that stock decoding wants to remove from it.
        dropped (`int`): Tokens that the last round kept after the end of the text.
    """

    def __init__(self, criteria: StoppingCriteriaList, call: Call, streamer: HeldStreamer | None):
        super().__init__(criteria)
        self.call, self.streamer = call, streamer
        self.cache: Cache | None = None
        self.to_crop: int | None = None
        self.dropped = 0

    def begin(self, cache: Cache) -> None:
        """Decoding with a draft begins."""
        self.cache, cache.crop = cache, self._crop_later
        if self.streamer is not None:
            self.streamer.holding = True

    def _crop_later(self, tokens_to_remove: int) -> None:
        self.to_crop = abs(tokens_to_remove)

    def _crop(self, more: int = 0) -> None:
        type(self.cache).crop(self.cache, -(self.to_crop + more))
        self.to_crop = None

    def end(self) -> None:
        """Decoding with a draft has ended; crop what is left to crop because a criterion raised."""
        vars(self.cache).pop("crop", None)
        if self.to_crop is not None:
            self._crop()

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
        self._crop(self.dropped)
        if self.streamer is not None:
            self.streamer.streamer.put(self.streamer.held[:, : end - start])
        return done


def without_last(output: torch.Tensor | ModelOutput, tokens: int) -> torch.Tensor | ModelOutput:
    """The output of `generate` without its last `tokens` tokens."""
    if not tokens:
        return output
    if isinstance(output, torch.Tensor):
        return output[:, :-tokens]
    output.sequences = output.sequences[:, :-tokens]
    for name, value in output.items():
        if isinstance(value, tuple) and not name.startswith("encoder_"):  # an entry for each token
            output[name] = value[:-tokens]
    return output
