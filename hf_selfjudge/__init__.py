"""
Judge decoding for transformers: `generate(assistant_model=draft)` that also keeps draft tokens which differ from the
target's choice but not from its meaning.

prompts -> mismatches   where the draft disagrees with the target's own answer
        -> labels       what each substitution does to that answer, told by the target itself
        -> judge        the probability that a substitution changes the meaning
        -> generation   stock `generate`, with the judge (or another of the rules) inside
        -> report       speed beside quality
"""

from .generation import JudgedModel
from .judge import Judge, JudgeInfo
from .judge_config import JudgeConfig
from .labels import MiningConfig, load_labels, mining_of
from .mining import mine
from .mismatches import special_tokens
from .prompts import Prompt, Prompts, read_prompts
from .rereading import reread
from .rules import JudgeRule
from .sources import SourceError, load_model
from .stats import Stats
from .trainer import JudgeTrainer, new_judge


__all__ = [
    "Judge",
    "JudgeConfig",
    "JudgeInfo",
    "JudgeRule",
    "JudgeTrainer",
    "JudgedModel",
    "MiningConfig",
    "Prompt",
    "Prompts",
    "SourceError",
    "Stats",
    "load_labels",
    "load_model",
    "mine",
    "mining_of",
    "new_judge",
    "read_prompts",
    "reread",
    "special_tokens",
]
