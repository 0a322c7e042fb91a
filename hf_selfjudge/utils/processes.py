"""Several processes that a launcher started, and that share the work."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """Which of several processes this is. Call it before models are loaded: it chooses the process's own GPU."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
