"""Loads models: from a name to a target, its draft and their tokenizer. It knows no judges."""

from .load import load_model
from .pair import Pair, load_pair


__all__ = ["Pair", "load_model", "load_pair"]
