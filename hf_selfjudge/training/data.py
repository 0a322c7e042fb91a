"""Rows of labels -> what a judge is trained on: a soft label for each, and their features in memory."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from torch.utils.data import StackDataset

from ..judge.features import STATES
from ..mining.label_files import mining_of
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


def features(labels: datasets.Dataset, known: np.ndarray, layer: int | None) -> StackDataset:
    """
    Labels with mined features in memory, for a judge of a `layer`. Rows whose label in `known` is NaN are left out.

    Returns:
        `StackDataset`: its items have `scalars` of shape `(len(SCALARS),)`, `hidden` of shape
        `(len(STATES), hidden_size)` and `labels`, a number.

    Raises:
        ValueError: If the labels have the hidden states of another layer.
    """
    if (mined := mining_of(labels)["layer"]) != layer:
        raise ValueError(
            f"The labels have hidden states of layer {mined}, the judge looks at layer {layer} (None: the last ones). "
            "Leave out `model`: then the judge is made for the labels."
        )
    if labels.data.column(STATES[0]).null_count:
        raise ValueError("`labels` have no hidden states. Add them: `hf-selfjudge add-layer LABELS --layer …`.")
    keep = np.flatnonzero(~np.isnan(known))
    rows = labels.select(keep).with_format("numpy")
    return StackDataset(
        scalars=torch.from_numpy(np.stack(rows["scalars"][:])),
        hidden=torch.from_numpy(np.stack([np.stack(rows[name][:]) for name in STATES], axis=1)),
        labels=torch.from_numpy(known[keep]).float(),
    )
