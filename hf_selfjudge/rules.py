"""The rules that decide which mismatches are kept: the judge, and those that need no training."""

from .decoding.rules import Candidate, Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Rule, TopK


__all__ = ["Candidate", "Coin", "JudgeRule", "KLGate", "LookAhead", "Lossless", "Margin", "Rule", "TopK"]
