"""Forwards of a model: in tokens, out logits and hidden states; of many calls in lock-step, of many branches in one
cache. Knows nothing of drafts and judges."""
