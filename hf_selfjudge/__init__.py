"""
Judge decoding for transformers: `generate(assistant_model=draft)` that also keeps draft tokens which differ from the
target's choice but not from its meaning.

models, data       a target and its draft; prompts
forward, judge     features of a draft token from one forward of the target; its probability of changing the meaning
decoding           stock `generate`, with the judge or another rule inside
scoring, mining    comparing answers; labels, by substituting draft tokens into the target's own answer
training           labels -> judge
bench              speed against quality
hub, demo, cli     repositories, the page, the commands
"""

from .data.prompts import read_prompts
from .decoding.judged_model import JudgedModel
from .judge.judge import Judge
from .judge.threshold import Threshold
from .mining.config import MiningConfig
from .mining.job import mine
from .mining.label_files import load_labels
from .models.load import load_model
from .models.pair import Pair, load_pair
from .training.config import JudgeConfig
from .training.trainer import JudgeTrainer


__all__ = [
    "Judge",
    "JudgeConfig",
    "JudgeTrainer",
    "JudgedModel",
    "MiningConfig",
    "Pair",
    "Threshold",
    "load_labels",
    "load_model",
    "load_pair",
    "mine",
    "read_prompts",
]
