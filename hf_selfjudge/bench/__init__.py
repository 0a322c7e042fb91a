"""The bench: in prompts and methods of decoding, out speed beside quality, with
intervals. Knows nothing of training."""
