"""Decoding: in a target, a rule and a draft, out text and what was decided about each token. Knows nothing of where a
judge comes from."""
