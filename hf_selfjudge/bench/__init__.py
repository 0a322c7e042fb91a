"""Compares methods of decoding on the same prompts: speed beside quality, with intervals. It does not know how
a judge was trained."""
