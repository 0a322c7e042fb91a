"""How sure a judge must be that a candidate keeps the meaning.

In: a number, text, or the name of one of the judge's operating points. Out: a [`Threshold`]. Text is parsed here and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


PER_TOKEN = "/token"


@dataclass(frozen=True)
class Threshold:
    """
    A candidate is accepted if its probability of changing the meaning is below this.

    Args:
        limit (`float`): A probability. 0 never accepts (lossless decoding), 1 always does.
        per_token (`bool`, defaults to `False`): Multiply the limit by the tokens that accepting gains in the round:
            the candidate, those after it that match, and what can be gained from the next mismatch on ([`keeps`]).
            This gains more tokens for the same expected number of changes in meaning.
        name (`str`, *optional*): Name of the operating point, if it is one. It is ignored when thresholds are
            compared.

    Raises:
        ValueError: If `limit` is not in [0, 1].
    """

    limit: float
    per_token: bool = False
    name: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or not 0 <= self.limit <= 1:
            raise ValueError(
                "`threshold` must be in [0, 1] (0 is lossless, 1 accepts every candidate), or as text such a number "
                f"for each token gained ('0.03{PER_TOKEN}'), got {self.limit!r}."
            )

    @classmethod
    def parse(cls, value: float | str | Threshold, named: Mapping[str, Threshold] | None = None) -> Threshold:
        """
        Read a threshold: a number (`0.335`), as text too; one for each token gained (`"0.03/token"`); or the name of
        an operating point (`"changes_5"`).

        Args:
            named (`Mapping[str, Threshold]`, *optional*): The judge's operating points.

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(value, Threshold):
            return value
        if not isinstance(value, str):
            return cls(value)
        named = named or {}
        if value in named:
            return cls(named[value].limit, named[value].per_token, value)
        number = value.removesuffix(PER_TOKEN)
        try:
            limit = float(number)
        except ValueError:
            raise ValueError(
                f"`threshold` {value!r} is none of the judge's operating points ({', '.join(named) or 'none'}). "
                f"Give one of them, a number in [0, 1], or such a number for each token gained ('0.03{PER_TOKEN}')."
            ) from None
        return cls(limit, number != value)

    def json(self) -> float | str:
        """What `config.json` holds: a number, or text such as `"0.03/token"` if the limit is for each token gained."""
        return f"{self.limit}{PER_TOKEN}" if self.per_token else self.limit

    def __str__(self) -> str:
        return f"{self.limit:g}{PER_TOKEN * self.per_token}"

    def keeps(
        self, log_odds: torch.Tensor, matches_after: torch.LongTensor, last: torch.BoolTensor
    ) -> torch.BoolTensor:
        """
        Which mismatches of rounds to keep: each as if those before it in its round are kept.

        With `per_token`, the mismatches of a round are decided together, from the last one backwards. Keeping one is
        worth the limit times the tokens that it gains, less its probability, and what can be gained from the next one
        on, if that is more than nothing. So one that gains little is kept where much follows it.

        Args:
            log_odds (`torch.Tensor` of shape `(n,)`): Of changing the meaning.
            matches_after (`torch.LongTensor` of shape `(n,)`): How many matching candidates follow each.
            last (`torch.BoolTensor` of shape `(n,)`): Which are the last of their round.
        """
        if not self.per_token:
            return log_odds < torch.logit(torch.tensor(float(self.limit)))
        worth = (self.limit * (1 + matches_after) - log_odds.sigmoid()).tolist()
        ends = last.tolist()
        for place in range(len(worth) - 2, -1, -1):
            if not ends[place]:
                worth[place] += max(0.0, worth[place + 1])
        return torch.tensor(worth, device=log_odds.device) > 0
