"""Makes labels from prompts and a pair: what each substitution does to the target's own answer."""
