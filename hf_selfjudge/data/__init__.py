"""Prompts: in files and datasets of any shape, out [`Prompt`]s and their tokens. Knows nothing of models."""
