"""
Judge decoding for transformers: `generate(assistant_model=draft)` that also keeps draft tokens which differ from the
target's choice but not from its meaning.

prompts -> mismatches   where the draft disagrees with the target's own answer
        -> labels       what each substitution does to that answer, told by the target itself
        -> judge        the probability that a substitution changes the meaning
        -> generation   stock `generate`, with the judge (or another of the rules) inside
        -> report       speed beside quality
"""

from .data.prompts import Prompt, Prompts, read_prompts
from .decoding.judged_model import JudgedModel
from .decoding.rules import JudgeRule
from .decoding.stats import Stats
from .judge.info import JudgeInfo
from .judge.judge import Judge
from .mining.config import MiningConfig
from .mining.job import mine
from .mining.labels import load_labels, mining_of
from .mining.layers import add_layer_states
from .models.load import load_model
from .models.tokens import special_tokens
from .models.wheels import SourceError
from .training.config import JudgeConfig
from .training.trainer import JudgeTrainer, new_judge


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
    "add_layer_states",
    "special_tokens",
]
