"""Scoring: in two answers, or an answer and what is right, out whether they say the same, and how good it is. Knows
nothing of decoding."""
