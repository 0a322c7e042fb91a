"""The layers of a target, and the hidden states that enter one of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..forward.tap import LayerInput


def layers_of(target: PreTrainedModel) -> torch.nn.ModuleList:
    """
    The layers of a decoder, first to last.

    Raises:
        ValueError: If the target is not a decoder with `layers`.
    """
    layers = None if target.config.is_encoder_decoder else getattr(target.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(
            f"`target` ({type(target).__name__}) is not a decoder with `layers`, whose states the judge uses. Use a "
            "judge that uses the last hidden states, without an adapter."
        )
    return layers


class LayerStates:
    """
    Gives a judge the hidden states that enter a layer of the target (counted from 0). It has the interface of a
    [`Replay`], but computes nothing.

    Attributes:
        entering (`torch.nn.Module`): The layer whose input is used.

    Raises:
        ValueError: If the target is not a decoder, or has no such layer.
    """

    def __init__(self, target: PreTrainedModel, layer: int):
        layers = layers_of(target)
        if type(layer) is not int or not 0 < layer < len(layers):
            raise ValueError(
                f"`layer` must be above 0 and below {len(layers)}, the layers of {type(target).__name__}, got "
                f"{layer!r}."
            )
        self.entering = layers[layer]

    def start(self) -> LayerStates:
        """Begin another text."""
        return self

    def __call__(self, entered: LayerInput, start: int) -> torch.Tensor:
        """
        The hidden states that entered the layer, of shape `(batch, tokens, hidden_size)`. `start` is not used.

        Raises:
            ValueError: If the layer does not get one state for each token.
        """
        if entered.states.dim() != 3:
            raise ValueError(
                f"`target`: its layers get states of shape {tuple(entered.states.shape)}, not one for each token. Use "
                "a judge that uses the last hidden states."
            )
        return entered.states
