"""The target's last hidden states and logits, read during any forward.

In: a model. Out: for every forward, the tensor that enters its `lm_head` and the logits that the model returns. Knows
nothing of what the rows mean: mining and generating give them their meaning. Nothing else in the package sets a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


# The taps entered in this thread or coroutine; each begins with none.
_entered: ContextVar[tuple[HiddenTap, ...]] = ContextVar("_entered", default=())


def untapped() -> Context:
    """A copy of the caller's context in which no tap was entered: for a coroutine of its own."""
    context = copy_context()
    context.run(_entered.set, ())
    return context


class HiddenTap:
    """
    Context manager that hands the last hidden states and the logits of each forward to a callback.

    The hooks sit on modules that threads and coroutines may share, so they answer only where the tap was entered.

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
        self.hidden = None
        self.handles = [
            self.head.register_forward_pre_hook(self._at_head),
            self.model.register_forward_hook(self._at_end),
        ]
        self.token = _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *exception) -> None:
        _entered.reset(self.token)
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def hand_over(model: PreTrainedModel, hidden: torch.Tensor) -> None:
        """Give the taps on `model` that were entered here the hidden states of a forward that was computed
        elsewhere, before its output is returned."""
        for tap in _entered.get():
            if tap.head is model.get_output_embeddings():
                tap.hidden = hidden

    def _at_head(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if self in _entered.get():
            self.hidden = inputs[0].detach()

    def _at_end(self, module: torch.nn.Module, inputs: tuple, output: ModelOutput) -> None:
        if self in _entered.get():
            self.on_forward(self.hidden, output.logits.detach())
