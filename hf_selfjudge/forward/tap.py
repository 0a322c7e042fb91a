"""The target's last hidden states and logits, read during any forward.

In: a model. Out: for every forward, the tensor that enters its `lm_head` and the logits that it returns. Nothing else
in the package sets a hook to read a model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


# The taps that were entered in this thread or coroutine; each begins with none.
_entered: ContextVar[tuple[ForwardTap, ...]] = ContextVar("_entered", default=())


def without_taps() -> Context:
    """A copy of the caller's context in which no tap was entered: for a coroutine of its own."""
    context = copy_context()
    context.run(_entered.set, ())
    return context


class LayerInput(NamedTuple):
    """What entered a layer in a forward: states of shape `(batch, tokens, hidden_size)`, and the mask and positions
    that the model was given."""

    states: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor | None


class ForwardTap:
    """
    Context manager that hands the last hidden states and the logits of each forward to a callback.

    Threads and coroutines may share the modules that the hooks are on, so a hook does something only where its tap was
    entered. (While another thread leaves its tap, PyTorch may still call that tap's hooks, and then without the
    keyword arguments.)

    Args:
        model ([`~transformers.PreTrainedModel`]): A model with output embeddings.
        on_forward (`Callable[[torch.Tensor, torch.Tensor], None]`): Called with hidden states of shape
            `(batch, rows, hidden_size)` and logits of shape `(batch, rows, vocab_size)`; with `logits_to_keep=n` there
            are `n` rows, and row `i` holds the state *before* the token that it chooses.
        layer (`torch.nn.Module`, *optional*): A layer of the model. The callback then also gets its [`LayerInput`].

    Raises:
        ValueError: If the model has no output embeddings.
    """

    def __init__(self, model: PreTrainedModel, on_forward: Callable[..., None], layer: torch.nn.Module | None = None):
        self.model, self.head, self.layer = model, model.get_output_embeddings(), layer
        if self.head is None:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no output embeddings, so its last hidden states cannot be "
                "read. Use a model with a language modelling head."
            )
        self.on_forward = on_forward

    def __enter__(self) -> ForwardTap:
        self.hidden = self.states = None
        self.handles = [
            self.head.register_forward_pre_hook(self._at_head),
            self.model.register_forward_pre_hook(self._at_start, with_kwargs=True),
            self.model.register_forward_hook(self._at_end),
        ]
        if self.layer is not None:
            self.handles.append(self.layer.register_forward_pre_hook(self._at_layer, with_kwargs=True))
        self.token = _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *exception) -> None:
        _entered.reset(self.token)
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def entered_on(model: PreTrainedModel) -> list[ForwardTap]:
        """The taps on `model` that were entered in this thread or coroutine."""
        return [tap for tap in _entered.get() if tap.head is model.get_output_embeddings()]

    def _at_start(self, module: torch.nn.Module, inputs: tuple, arguments: dict | None = None) -> None:
        if self in _entered.get():
            self.arguments = arguments

    def _at_layer(self, module: torch.nn.Module, inputs: tuple, arguments: dict | None = None) -> None:
        if self in _entered.get():
            self.states = (inputs[0] if inputs else arguments["hidden_states"]).detach()

    def _at_head(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if self in _entered.get():
            self.hidden = inputs[0].detach()

    def _at_end(self, module: torch.nn.Module, inputs: tuple, output: ModelOutput) -> None:
        if self in _entered.get():
            seen = self.hidden, output.logits.detach()
            if self.layer is not None:
                seen += (LayerInput(self.states, *map(self.arguments.get, ("attention_mask", "position_ids"))),)
            self.on_forward(*seen)
