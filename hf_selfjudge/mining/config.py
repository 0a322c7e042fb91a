"""Options of mining, each with its help and its range. A new field here becomes an option of `hf-selfjudge mine`, and
part of `mining.json`: labels of other settings are not mixed."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields


def _option(default: object, help: str, **limits: float) -> Field:
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class MiningConfig:
    """
    How labels are mined. Each field's metadata has its help, and its range as `min` and `max`.

    Raises:
        ValueError: If an option is out of its range.
    """

    max_new_tokens: int = _option(256, "Limit of an answer, tokens.", min=1)
    top: int = _option(1, "Choices of the draft to substitute at each position (without lookup).", min=1)
    floor: float = _option(
        0.1, "Least probability of a choice of the draft, except its first one (without lookup).", min=0, max=1
    )
    runners_up: int = _option(0, "The target's next choices to substitute at each position (without lookup).", min=0)
    lookup: int = _option(0, "Draft this many tokens a round by prompt lookup; 0: draft by the draft model.", min=0)
    rounds: int = _option(
        0,
        "Rounds to draft in each answer: their mismatches are rewritten, each with all before it kept. 0: substitute "
        "one token at a time.",
        min=0,
    )
    round_length: int = _option(16, "Tokens drafted in a round, with --rounds.", min=1)
    per_answer: int = _option(48, "Substitutions to score in each answer: mismatches first, then a sample.", min=1)
    rewrites: int = _option(8, "How many of these to rewrite, chosen in the same way.", min=0)
    window: int = _option(20, "Tokens after a substitution that `likelihood` and `confidence` look at.", min=0)
    layer: int | None = _option(
        None, "Write the hidden states that enter this layer; by default `mine` writes the last.", min=1
    )
    ask: bool = _option(False, "Ask the target whether two answers say the same.")
    allow_code: bool = _option(
        False, "Run the code of answers to prompts with `tests` on this machine; else they are compared as text."
    )
    shard: int = _option(64, "Prompts whose labels are written together: what a kill loses at most.", min=1)
    answer_batch: int = _option(32, "Answers decoded at a time.", min=1)
    forward_tokens: int = _option(256, "Tokens of one forward over substitutions: the limit of memory.", min=8)
    answers_at_once: int = _option(8, "Answers whose substitutions share a forward.", min=1)
    seed: int = _option(0, "Seed of everything that is random.")

    def __post_init__(self):
        for option in fields(self):
            value, limits = getattr(self, option.name), option.metadata
            least, most = limits.get("min", -math.inf), limits.get("max", math.inf)
            if value is not None and not least <= value <= most:
                raise ValueError(f"`{option.name}` must be between {least} and {most}, got {value}.")
