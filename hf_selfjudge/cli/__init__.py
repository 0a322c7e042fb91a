"""The commands of `hf-selfjudge`, one module for each or for a few that belong together."""
