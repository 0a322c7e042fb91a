"""The target's last hidden states and logits, read during any forward.

In: a model. Out: for every forward, the tensor that enters its `lm_head` and the logits that the model returns. Knows
nothing of what the rows mean: mining and generating give them their meaning. Nothing else in the package sets a hook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


# The taps entered in this thread or coroutine; each begins with none.
_entered: ContextVar[tuple[ForwardTap, ...]] = ContextVar("_entered", default=())


def without_taps() -> Context:
    """A copy of the caller's context in which no tap was entered: for a coroutine of its own."""
    context = copy_context()
    context.run(_entered.set, ())
    return context


class LayerInput(NamedTuple):
    """What entered a layer in a forward: states of shape `(batch, tokens, hidden_size)`, and what the model was told
    of their places."""

    states: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor | None


class ForwardTap:
    """
    Context manager that hands the last hidden states and the logits of each forward to a callback.

    The hooks sit on modules that threads and coroutines may share, so they answer only where the tap was entered.
    While another thread's tap leaves, PyTorch may still call its hooks, and then without the keyword arguments.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model with output embeddings.
        on_forward (`Callable[[torch.Tensor, torch.Tensor], None]`): Called with hidden states of shape
            `(batch, rows, hidden_size)` and logits of shape `(batch, rows, vocab_size)`; with `logits_to_keep=n` there
            are `n` rows, and row `i` holds the state *before* the token that it chooses.
        layer (`torch.nn.Module`, *optional*): One of the model's. The callback is then also given what it was
            [`LayerInput`] by.

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
    def layers(model: PreTrainedModel) -> list[torch.nn.Module]:
        """The layers that the taps on `model` that were entered here look at."""
        return [tap.layer for tap in _entered.get() if tap._is_on(model) and tap.layer is not None]

    @staticmethod
    def hand_over(model: PreTrainedModel, hidden: torch.Tensor, entering: dict[torch.nn.Module, torch.Tensor]) -> None:
        """Give the taps on `model` that were entered here the hidden states of a forward that was computed
        elsewhere, and what entered its layers, before its output is returned."""
        for tap in _entered.get():
            if tap._is_on(model):
                tap.hidden, tap.states = hidden, entering.get(tap.layer)

    def _is_on(self, model: PreTrainedModel) -> bool:
        return self.head is model.get_output_embeddings()

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
            told = self.hidden, output.logits.detach()
            if self.layer is not None:
                told += (LayerInput(self.states, *map(self.arguments.get, ("attention_mask", "position_ids"))),)
            self.on_forward(*told)
