"""Training: in labels, out a judge that was measured on held-out prompts. Knows nothing of how labels were mined."""
