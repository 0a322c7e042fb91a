"""The judge: in the target's logits and hidden states at a candidate, out the probability that it changes the meaning.
Knows nothing of generation."""
