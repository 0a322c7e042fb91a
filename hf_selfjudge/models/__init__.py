"""Loading models: in a name, out a target, a draft and their tokenizer. Knows nothing of judges."""

from .load import load_model
from .pair import Pair, load_pair


__all__ = ["Pair", "load_model", "load_pair"]
