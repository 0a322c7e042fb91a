"""Mining: in prompts and a pair, out labels: what each substitution does to the target's own answer. Knows nothing of
training."""
