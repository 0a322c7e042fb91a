"""The rules that decide which mismatches are kept: the judge, and those that need no training."""

from .decoding.rules import Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Rows, Rule, TopK


__all__ = ["Rows", "Coin", "JudgeRule", "KLGate", "LookAhead", "Lossless", "Margin", "Rule", "TopK"]
