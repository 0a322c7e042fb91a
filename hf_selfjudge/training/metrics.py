"""Log-odds and labels -> how well a judge tells candidates apart."""

from __future__ import annotations

import numpy as np
import torch
from transformers import EvalPrediction

from ..mining.layers import IGNORED
from ..scoring.statistics import auc


def agreement(odds: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """
    Compare log-odds with labels, both of shape `(rows,)`, at a threshold of 0.5.

    Returns:
        `dict` with `accuracy`, `accept_rate` and, if anything is accepted, `false_accept_rate`: the mean label of the
        accepted.
    """
    accepted = odds < 0
    rates = {
        "accuracy": float(((labels < 0.5) == accepted).float().mean()),
        "accept_rate": float(accepted.float().mean()),
    }
    return rates | ({"false_accept_rate": float(labels[accepted].mean())} if accepted.any() else {})


def judge_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of [`agreement`], and `auroc` for labels above 0.5 (left out if all or none of them are)."""
    odds, labels = (torch.tensor(values).flatten() for values in (prediction.predictions, prediction.label_ids))
    odds, labels = odds[labels != IGNORED], labels[labels != IGNORED]
    area = auc(labels.numpy() > 0.5, odds.numpy())
    return agreement(odds, labels) | ({} if np.isnan(area) else {"auroc": area})
