"""Public names of the rules; the code is in `decoding/rules.py`."""

from .decoding.rules import Candidate, Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Rule, TopK


__all__ = ["Candidate", "Coin", "JudgeRule", "KLGate", "LookAhead", "Lossless", "Margin", "Rule", "TopK"]
