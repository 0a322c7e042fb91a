"""Rows of labels -> what a judge is trained on: a soft label for each, and their features in memory."""

from __future__ import annotations

import datasets
import numpy as np
import torch

from ..judge.features import STATES
from .config import SCORES, JudgeConfig


def soft_labels(labels: datasets.Dataset, args: JudgeConfig) -> np.ndarray:
    """
    The probability that a substitution changes the meaning, as chosen by `args.label`.

    Returns:
        `np.ndarray` of shape `(rows,)`: in [0, 1]; NaN where it is not known.

    Raises:
        ValueError: If there are no rows, or it is known for none of them.
    """
    if not len(labels):
        raise ValueError("`labels` are empty. Mine some.")
    column = "reconvergence" if args.label == "lost" else args.label
    values = np.array(labels[column][:], dtype=float)
    if np.isnan(values).all():
        raise ValueError(f"`labels`: {args.label!r} is known of no row. Mine with `rewrites` above 0.")
    if args.label == "lost":
        return 1 - values
    if args.label in SCORES:
        threshold = np.nanmedian(values) if args.label_threshold is None else args.label_threshold
        return np.where(np.isnan(values), np.nan, values > threshold)
    return values


class Substitutions(torch.utils.data.Dataset):
    """
    Labels with mined features in memory. An item has `scalars` of shape `(len(SCALARS),)`, `hidden` of shape
    `(len(STATES), hidden_size)` and `labels`, a number.

    Args:
        labels (`datasets.Dataset`): As [`load_labels`] gives them.
        known (`np.ndarray` of shape `(rows,)`): The label of each row; rows with NaN are left out.
    """

    def __init__(self, labels: datasets.Dataset, known: np.ndarray):
        keep = np.flatnonzero(~np.isnan(known))
        rows = labels.select(keep).with_format("numpy")
        self.labels = torch.from_numpy(known[keep]).float()
        self.scalars = torch.from_numpy(np.stack(rows["scalars"][:]))
        self.hidden = torch.from_numpy(np.stack([np.stack(rows[name][:]) for name in STATES], axis=1))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)[index] for name in ("scalars", "hidden", "labels")}
