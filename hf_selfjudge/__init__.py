"""
Judge decoding for transformers: `generate(assistant_model=draft)` that also keeps draft tokens which differ from the
target's choice but not from its meaning.

models, data       a target and its draft; prompts
forward, judge     features of a draft token from one forward of the target; its probability of changing the meaning
decoding           stock `generate`, with the judge or another rule inside
scoring, mining    comparing answers; labels, by substituting draft tokens into the target's own answer
training           labels -> judge
bench              speed against quality
serving            the judge inside vLLM
hub, demo, cli     repositories, the page, the commands
"""

import importlib


# Where each public name is defined. It is imported when it is first used: training and mining need packages that take
# seconds to import, a server needs neither.
_MODULES = {
    "Judge": "judge.judge",
    "JudgeConfig": "training.config",
    "JudgeTrainer": "training.trainer",
    "JudgedModel": "decoding.judged_model",
    "MiningConfig": "mining.config",
    "Pair": "models.pair",
    "Threshold": "judge.threshold",
    "load_labels": "mining.label_files",
    "load_model": "models.load",
    "load_pair": "models.pair",
    "mine": "mining.job",
    "read_prompts": "data.prompts",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
