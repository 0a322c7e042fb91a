"""Trains a judge on labels, and measures it on held-out prompts."""
