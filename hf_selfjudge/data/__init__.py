"""Reads prompts: from files and datasets of any shape to [`Prompt`]s and their tokens. It loads no model."""
