"""What a judge sees of a target beside its last hidden states: states midway, or an adapter's.

In: what entered a layer in a forward of the target. Out: that, or the last hidden states as the target would have them
with the judge's adapter in the layers from there on. For these, the last layers run once more: the target itself runs
once and without the adapter, so that its own text stays what it is, and what comes on top is these layers' share of a
forward. Knows nothing of candidates.
"""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..forward.tap import ForwardTap, LayerInput


# As PEFT writes them: the last number in a module's path before its name in the layer.
NAME = re.compile(r"base_model\.model\.(?P<layers>.+?)\.(?P<layer>\d+)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What an adapter may have switched on that changes more than an added product of two matrices.
UNSUPPORTED = (
    *("use_dora", "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "arrow_config"),
)


@dataclass
class Adapter:
    """
    A LoRA adapter (https://huggingface.co/papers/2106.09685), as PEFT saves it.

    Args:
        config (`dict`): Content of `adapter_config.json`.
        tensors (`dict[str, torch.Tensor]`): Content of `adapter_model.safetensors`.
    """

    config: dict
    tensors: dict[str, torch.Tensor]

    def __post_init__(self):
        if self.config.get("peft_type") != "LORA":
            raise ValueError(f"`adapter`: only LoRA can be replayed, got {self.config.get('peft_type')!r}.")
        if found := [name for name in UNSUPPORTED if self.config.get(name) not in (None, False, "none", {}, [])]:
            raise ValueError(f"`adapter`: {', '.join(found)} cannot be replayed. Use plain LoRA.")
        if self.config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError("`adapter`: `init_lora_weights` changes the target's own weights. Use plain LoRA.")
        for name in ("r", "lora_alpha"):
            value = self.config.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**16:
                raise ValueError(f"`adapter`: {name} must be a number above 0, got {value!r}.")
        if unknown := [name for name in self.tensors if len(name) > 300 or not NAME.fullmatch(name)]:
            raise ValueError(f"`adapter`: {unknown[0][:300]!r} is no weight of a LoRA adapter in numbered layers.")
        parts = [*map(NAME.fullmatch, self.tensors)]
        if len({part["layers"] for part in parts}) > 1:
            raise ValueError("`adapter` is in layers of several parts of a model, of which one can be replayed.")
        sides = [(part["layer"], part["module"], part["side"]) for part in parts]
        if not sides or {place[:2] for place in sides if place[2] == "A"} != {p[:2] for p in sides if p[2] == "B"}:
            raise ValueError("`adapter` has not both matrices of each module.")

    @property
    def scale(self) -> float:
        """What its product is multiplied by."""
        rank = self.config["r"]
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def products(self) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """For each layer and module in it: `A` of shape `(r, in)` and `B` of shape `(out, r)`."""
        pairs: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            part = NAME.fullmatch(name)
            pairs.setdefault((int(part["layer"]), part["module"]), {})[part["side"]] = tensor
        return {place: (pair["A"], pair["B"]) for place, pair in pairs.items()}


def layers_of(target: PreTrainedModel) -> torch.nn.ModuleList:
    """
    The layers of a decoder, first to last.

    Raises:
        ValueError: If the target is no decoder with `layers`.
    """
    layers = None if target.config.is_encoder_decoder else getattr(target.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(
            f"`target` ({type(target).__name__}) is no decoder with `layers`, which the judge looks into. Use a judge "
            "that looks at the last hidden states, without an adapter."
        )
    return layers


class LayerStates:
    """
    The target's states on their way through it: nothing is computed. In the place of a [`Replay`].

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder.
        layer (`int`): How many of its layers are below.

    Attributes:
        entering (`torch.nn.Module`): The next layer.

    Raises:
        ValueError: If the target is no decoder, or has no more layers than that.
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
        """For a text of its own: nothing is kept of any."""
        return self

    def __call__(self, entered: LayerInput, start: int) -> torch.Tensor:
        """
        Args:
            entered ([`LayerInput`]): Of a forward of the target.
            start (`int`): Tokens that its cache held before.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, hidden_size)`: what entered the layer.

        Raises:
            ValueError: If that is no state for each token.
        """
        if entered.states.dim() != 3:
            raise ValueError(
                f"`target`: what enters its layers has the shape {tuple(entered.states.shape)}, not one state for "
                "each token. Use a judge that looks at the last hidden states."
            )
        return entered.states


class Replay:
    """
    The last layers of a target with an adapter in them; the target's own modules and weights are shared, not changed.

    Args:
        target ([`~transformers.PreTrainedModel`]): A decoder.
        adapter ([`Adapter`]): In its last layers.

    Attributes:
        entering (`torch.nn.Module`): The first of these layers in the target: what enters it is replayed.

    Raises:
        ValueError: If the target is no decoder whose layers can be run by themselves (found by trying), or the
            adapter is for other layers than it has.
    """

    def __init__(self, target: PreTrainedModel, adapter: Adapter):
        products = adapter.products()
        layers = layers_of(target)
        if len({parameter.device for parameter in target.parameters()}) > 1:
            raise ValueError(
                "`target` is spread over several devices: its last layers cannot be replayed with the judge's "
                "adapter. Use a judge without one."
            )
        first, count = min(layer for layer, _ in products), len(layers)
        if max(layer for layer, _ in products) >= count:
            raise ValueError(f"`adapter` has layers beyond the {count} of `target`. It was made for another one.")
        self.entering = layers[first]
        self.decoder = apart(target.get_decoder())
        self.decoder.config = config = copy.deepcopy(self.decoder.config)
        config.num_hidden_layers = count - first
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[first:]
        self.decoder.layers = torch.nn.ModuleList(apart(layer) for layer in layers[first:])
        for index, layer in enumerate(self.decoder.layers):
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = index
        self._try(target)
        for (layer, name), (a, b) in products.items():
            module = dict(self.decoder.layers[layer - first].named_modules()).get(name)
            shape = None if not isinstance(module, torch.nn.Linear) else (module.out_features, module.in_features)
            if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"`adapter`: {name} of layer {layer} has matrices of shape {tuple(a.shape)} and {tuple(b.shape)}, "
                    f"which fit no linear layer of `target` there ({shape}). It was made for another one."
                )
            _add(module, a, b, adapter.scale)

    def start(self) -> ReplaySession:
        """For a text of its own."""
        return ReplaySession(self.decoder)

    @torch.no_grad()
    def _try(self, target: PreTrainedModel) -> None:
        """Without the adapter, the layers by themselves must give what they give in the target."""
        config = target.config.get_text_config()
        ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0)).to(target.device)
        seen = []
        try:
            with ForwardTap(target, lambda hidden, logits, entered: seen.append((hidden, entered)), self.entering):
                target(input_ids=ids, use_cache=False)
            ((hidden, entered),) = seen
            replayed = self.start()(entered, 0)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"`target`: the last layers of {type(target).__name__} cannot be run by themselves ({error}). Use a "
                "judge without an adapter."
            ) from error
        if (replayed - hidden).norm() > torch.finfo(hidden.dtype).eps ** 0.5 * hidden.norm():
            raise ValueError(
                f"`target`: the last layers of {type(target).__name__} do something else by themselves than in it. "
                "Use a judge without an adapter."
            )


class ReplaySession:
    """
    The replay of one text, forward by forward, with a cache of its own.

    Args:
        decoder ([`~transformers.PreTrainedModel`]): The layers.
    """

    def __init__(self, decoder: PreTrainedModel):
        self.decoder, self.cache = decoder, DynamicCache()

    @torch.no_grad()
    def __call__(self, entered: LayerInput, start: int) -> torch.Tensor:
        """
        Args:
            entered ([`LayerInput`]): Of a forward of the target.
            start (`int`): Tokens that its cache held before: what this one has beyond is forgotten.

        Returns:
            `torch.Tensor` of shape `(1, tokens, hidden_size)`: the last hidden states.

        Raises:
            ValueError: If this one holds fewer: a forward of the target was not replayed.
        """
        held = self.cache.get_seq_length()
        if held < start:
            raise ValueError(
                f"The judge's adapter has seen {held} of {start} tokens. Start without `past_key_values` of an "
                "earlier call."
            )
        if held > start:
            self.cache.crop(start - held)
        return self.decoder(
            inputs_embeds=entered.states,
            attention_mask=entered.attention_mask,
            position_ids=entered.position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def apart(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module and all in it that shares every weight, and has no hooks."""
    other = copy.copy(module)
    other._modules = {name: None if child is None else apart(child) for name, child in module._modules.items()}
    other._forward_hooks, other._forward_pre_hooks = OrderedDict(), OrderedDict()
    return other


def _add(module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add the product to what a linear layer gives."""

    def added(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        first, second = a.to(output.device), b.to(output.device)
        return output + (inputs[0].to(a.dtype) @ first.T @ second.T * scale).to(output.dtype)

    a, b = a.to(module.weight.device, torch.float32), b.to(module.weight.device, torch.float32)
    module.register_forward_hook(added)
