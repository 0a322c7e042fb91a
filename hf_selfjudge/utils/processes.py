"""Several processes that a launcher started, and that share the work."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def require_one_process(command: str) -> None:
    """A `ValueError` if a launcher started several processes for a command that does not share its work."""
    if (count := this_process().num_processes) > 1:
        raise ValueError(f"{command} does not share its work, and {count} processes were started. Start one.")


def this_process() -> PartialState:
    """Which of several processes this is. Call it before models are loaded: it chooses the process's own GPU."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
