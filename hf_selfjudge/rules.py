"""Public names of the rules; the code is in `decoding/rules.py`."""

from .decoding.rules import Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Mismatches, Rule, TopK


__all__ = ["Coin", "JudgeRule", "KLGate", "LookAhead", "Lossless", "Margin", "Mismatches", "Rule", "TopK"]
