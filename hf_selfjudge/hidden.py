"""The target's last hidden states and logits, read during any forward.

In: a model. Out: for every forward, the tensor that enters its `lm_head` and the logits that the model returns. Knows
nothing of what the rows mean: mining and generating give them their meaning. Nothing else in the package sets a hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class HiddenTap:
    """
    Context manager that hands the last hidden states and the logits of each forward to a callback.

    The hooks sit on modules that threads may share, so they answer only to the thread that entered the tap.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model with output embeddings.
        on_forward (`Callable[[torch.Tensor, torch.Tensor], None]`): Called with hidden states of shape
            `(batch, rows, hidden_size)` and logits of shape `(batch, rows, vocab_size)`; with `logits_to_keep=n` there
            are `n` rows, and row `i` holds the state *before* the token that it chooses.

    Raises:
        ValueError: If the model has no output embeddings.
    """

    def __init__(self, model: PreTrainedModel, on_forward: Callable[[torch.Tensor, torch.Tensor], None]):
        self.model, self.head = model, model.get_output_embeddings()
        if self.head is None:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no output embeddings, so its last hidden states cannot be "
                "read. Use a model with a language modelling head."
            )
        self.on_forward = on_forward

    def __enter__(self) -> HiddenTap:
        self.thread, self.hidden = threading.get_ident(), None
        self.handles = [
            self.head.register_forward_pre_hook(self._at_head),
            self.model.register_forward_hook(self._at_end),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()

    def _at_head(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if threading.get_ident() == self.thread:
            self.hidden = inputs[0].detach()

    def _at_end(self, module: torch.nn.Module, inputs: tuple, output: ModelOutput) -> None:
        if threading.get_ident() == self.thread:
            self.on_forward(self.hidden, output.logits.detach())
