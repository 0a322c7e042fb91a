"""Rows of labels -> what a judge is trained on: a soft label for each, and their features in memory."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from torch.utils.data import StackDataset

from ..judge.features import AHEAD, STATES
from ..judge.info import JudgeInfo
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


def features(labels: datasets.Dataset, known: np.ndarray, info: JudgeInfo) -> StackDataset:
    """
    Labels with mined features in memory, for the judge that `info` describes. Rows whose label in `known` is NaN are
    left out.

    Returns:
        `StackDataset`: its items have `scalars` of shape `(len(SCALARS),)`, `hidden` of shape
        `(len(STATES), hidden_size)`, with 0 for a state that the judge does not use, and `labels`, a number.

    Raises:
        ValueError: If the labels have the hidden states of another layer, or lack one that the judge uses.
    """
    if (mined := mining_of(labels)["layer"]) != info.layer:
        raise ValueError(
            f"The labels have hidden states of layer {mined}, the judge looks at layer {info.layer} (None: the last "
            "ones). Leave out `model`: then the judge is made for the labels."
        )
    if any(labels.data.column(name).null_count for name in info.states):
        raise ValueError("`labels` have no hidden states. Add them: `hf-selfjudge add-layer LABELS --layer …`.")
    keep = np.flatnonzero(~np.isnan(known))
    rows = labels.select(keep).with_format("numpy")
    hidden = np.zeros((len(keep), len(STATES), info.hidden_size), np.float16)
    for name in info.states:
        hidden[:, STATES.index(name)] = np.stack(rows[name][:])
    return StackDataset(
        scalars=torch.from_numpy(np.stack(rows["scalars"][:])),
        hidden=torch.from_numpy(hidden),
        labels=torch.from_numpy(known[keep]).float(),
    )


def states_of(labels: datasets.Dataset) -> list[str]:
    """The hidden states that a judge of these labels uses if nothing else is asked for: what is ahead of a candidate
    is known for rounds only."""
    return [name for name in STATES if name != AHEAD or None not in labels["drafted"][:]]


def check_ahead(labels: datasets.Dataset, states: Sequence[str]) -> None:
    """Raise `ValueError` if a judge of these `states` looks at what is ahead, and that is not known of all labels."""
    if AHEAD in states and None in labels["drafted"][:]:
        raise ValueError(
            "`states`: what is ahead of a candidate is known for rounds only, and `labels` have others. Leave out "
            f"{AHEAD}, or mine with `rounds`."
        )
