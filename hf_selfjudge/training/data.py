"""Rows of labels -> batches to train a judge on.

In: labels, as mining wrote them. Out: features of substitutions one below the other; or for training through the model
whole answers, with their substitutes behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch

from ..judge.features import STATES
from .config import SCORES, JudgeConfig


def soft_labels(labels: datasets.Dataset, args: JudgeConfig) -> np.ndarray:
    """
    The probability that the meaning changes, as `args.label` has it, in [0, 1]; NaN where it is not known. Shape
    `(rows,)`.

    Raises:
        ValueError: If it is known of no row, or there is none.
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


def layer_of(labels: datasets.Dataset) -> int | None:
    """
    How many of the target's layers are below the hidden states of labels; `None`: all, as they were mined.

    Raises:
        ValueError: If rows differ in it.
    """
    found = labels.unique("layer") if "layer" in labels.column_names else []
    if len(found) > 1:
        raise ValueError(f"`labels` have hidden states of different layers ({found}). Take those of one.")
    return found[0] if found else None


class Substitutions(torch.utils.data.Dataset):
    """
    Rows of labels in memory.

    Args:
        labels (`datasets.Dataset`): As [`load_labels`] gives them.
        known (`np.ndarray`): The label of each row; rows with NaN are left out.
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


@dataclass
class DataCollatorForSubstitutions:
    """
    Data collator for mined features: puts the rows of a batch one below the other.

    Examples:

    ```python
    >>> import torch
    >>> from hf_selfjudge.training.data import DataCollatorForSubstitutions

    >>> collator = DataCollatorForSubstitutions()
    >>> examples = [
    ...     {"scalars": torch.tensor([0.5, 1.0]), "hidden": torch.zeros(2, 1), "labels": torch.tensor(1.0)},
    ...     {"scalars": torch.tensor([0.1, 2.0]), "hidden": torch.ones(2, 1), "labels": torch.tensor(0.0)},
    ... ]
    >>> collator(examples)
    {'scalars': tensor([[0.5000, 1.0000],
            [0.1000, 2.0000]]), 'hidden': tensor([[[0.],
             [0.]],
    <BLANKLINE>
            [[1.],
             [1.]]]), 'labels': tensor([1., 0.])}
    ```
    """

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
