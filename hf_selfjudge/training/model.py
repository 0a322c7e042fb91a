"""A judge on its target, trained on states that the target computes anew, with an adapter in its last layers."""

from __future__ import annotations

import json

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from ..judge.judge import Judge
from ..judge.lora import Adapter
from ..mining.layers import StateReader
from ..models.cpu import HalfLinear


class TargetWithJudge(torch.nn.Module):
    """
    A target with a judge on it. The target's own weights are not trained.

    Args:
        target ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Computes the hidden states.
        judge ([`Judge`]): Made for the target.

    Raises:
        ValueError: If the target's attention cannot take the mask of substitutes ([`packs`]), its weights are packed
            so that no gradient passes them, the judge is for another target, or a judge of an earlier layer meets an
            adapter.
    """

    def __init__(self, target: PreTrainedModel | PeftModel, judge: Judge):
        super().__init__()
        self.target, self.judge = target, judge
        base = target.get_base_model() if self.has_adapter else target
        if any(isinstance(module, HalfLinear) for module in base.modules()):
            raise ValueError(
                "`model`: no gradient passes through packed half-precision weights. Load the target in another type: "
                "`load_model(name, torch.bfloat16)`."
            )
        if not self.has_adapter:
            judge.check_target(target)  # not below an adapter: PEFT renames the weights
            target.requires_grad_(False)
        elif judge.info.layer is not None:
            raise ValueError(
                f"`judge` looks at what enters layer {judge.info.layer}, but an adapter changes the last hidden "
                "states. Train it on labels with the last hidden states."
            )
        self.reader = StateReader(base, judge.info.layer)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in the target."""
        return isinstance(self.target, PeftModel)

    def forward(self, scalars: torch.Tensor, places: torch.LongTensor, **text: torch.Tensor) -> torch.Tensor:
        """
        Args:
            scalars (`torch.Tensor` of shape `(batch, substitutes, len(SCALARS))`): Of the target without an adapter.
            places (`torch.LongTensor` of shape `(batch, substitutes)`): Which tokens are replaced.
            text: `input_ids`, `position_ids` and `sees` of [`StateReader.forward`].

        Returns:
            `torch.FloatTensor` of shape `(batch, substitutes)`: log-odds that the meaning changes.
        """
        states = self.reader(places=places, **text)
        return self.judge(scalars.flatten(0, 1), states.flatten(0, 1)).view(places.shape)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Like that of [`~transformers.PreTrainedModel`]. Without an adapter no activation of the target is kept."""
        if self.has_adapter:
            base = self.target.get_base_model()
            base.activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)


def add_adapter(model: Judge | TargetWithJudge, peft_config: PeftConfig) -> TargetWithJudge:
    """
    Put a new adapter into the target below a judge.

    Raises:
        TypeError: If `peft_config` is not one.
        ValueError: If `model` has no target or an adapter already, or decoding could not use such an adapter.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "`peft_config` must be a `peft.PeftConfig` instance (e.g. `peft.LoraConfig`), got "
            f"{type(peft_config).__name__}."
        )
    if isinstance(model, Judge):
        raise ValueError(
            "You passed `peft_config` without a target: a `Judge` alone is trained on mined features, and there is no "
            "model to put an adapter into. Pass the target, or a `TargetWithJudge`."
        )
    if model.has_adapter:
        raise ValueError(
            "You passed a `PeftModel` instance together with a `peft_config` to the trainer. Please first merge and "
            "unload the existing adapter, and pass the resulting model along with the new `peft_config`."
        )
    adapted = get_peft_model(model.target, peft_config)
    adapter_of(adapted)  # refuse now what decoding could not use
    return TargetWithJudge(adapted, model.judge)


def adapter_of(model: PeftModel) -> Adapter:
    """
    The adapter of a model, as PEFT would save it.

    Raises:
        ValueError: If it is not a plain LoRA in numbered layers: others cannot be replayed.
    """
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted)) | {"inference_mode": True}
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Adapter(config, {name: value.detach().cpu().contiguous() for name, value in tensors.items()})
