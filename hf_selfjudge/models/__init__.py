"""Loads models: from a name to a target, its draft and their tokenizer. It knows no judges."""

from .compiled import compile_step
from .load import load_model
from .pair import Pair, load_pair


__all__ = ["Pair", "compile_step", "load_model", "load_pair"]
