"""Estimates, from the target's logits and hidden states at a candidate, the probability that the candidate changes
the meaning. It does not know how text is generated."""
