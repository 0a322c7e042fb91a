"""The last hidden states that a target would have with the judge's LoRA adapter in its last layers.

The target itself runs without the adapter, so that its own text stays the same. What enters the first adapted layer
is then fed to copies of the last layers, which share the target's weights and have the adapter.
"""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..forward.tap import ForwardTap, LayerInput
from ..models.offload import shallow_copy
from .layers import layers_of


# The names that PEFT gives to an adapter's matrices. The layer is the last number in the module's path.
NAME = re.compile(r"base_model\.model\.(?P<layers>.+?)\.(?P<layer>\d+)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Options of PEFT that do more than add the product of two matrices.
UNSUPPORTED = (
    *("use_dora", "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "arrow_config"),
)


@dataclass
class Adapter:
    """
    A LoRA adapter (https://huggingface.co/papers/2106.09685), as PEFT saves it: the content of `adapter_config.json`
    and that of `adapter_model.safetensors`.

    Raises:
        ValueError: If it is not plain LoRA in numbered layers.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __post_init__(self):
        config = self.config
        if config.get("peft_type") != "LORA":
            raise ValueError(f"`adapter`: only LoRA can be replayed, got {config.get('peft_type')!r}.")
        if used := [name for name in UNSUPPORTED if config.get(name) not in (None, False, "none", {}, [])]:
            raise ValueError(f"`adapter`: {', '.join(used)} cannot be replayed. Use plain LoRA.")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError("`adapter`: `init_lora_weights` changes the target's own weights. Use plain LoRA.")
        for name in ("r", "lora_alpha"):
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**16:
                raise ValueError(f"`adapter`: {name} must be a number above 0, got {value!r}.")
        if unknown := [name for name in self.tensors if len(name) > 300 or not NAME.fullmatch(name)]:
            raise ValueError(f"`adapter`: {unknown[0][:300]!r} is not a weight of LoRA in numbered layers.")
        if len({NAME.fullmatch(name)["layers"] for name in self.tensors}) > 1:
            raise ValueError("`adapter` is in the layers of several parts of a model. Only one part can be replayed.")
        products = self.products()
        if not products or any(sides.keys() != {"A", "B"} for sides in products.values()):
            raise ValueError("`adapter` does not have both matrices of each module.")

    def products(self) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
        """For each layer and module in it the matrices: `A` of shape `(r, in)` and `B` of shape `(out, r)`."""
        products: dict[tuple[int, str], dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            part = NAME.fullmatch(name)
            products[int(part["layer"]), part["module"]][part["side"]] = tensor
        return products


class Replay:
    """
    The last layers of a target, a decoder, with an adapter. They share the target's weights; the target is not
    changed.

    Attributes:
        entering (`torch.nn.Module`): The first adapted layer in the target. Its input is what is replayed.

    Raises:
        ValueError: If the last layers of the target cannot be run by themselves (which is tried), or the adapter does
            not fit them.
    """

    def __init__(self, target: PreTrainedModel, adapter: Adapter):
        products, layers = adapter.products(), layers_of(target)
        if len({parameter.device for parameter in target.parameters()} - {torch.device("meta")}) > 1:
            raise ValueError(
                "`target` is spread over several devices: its last layers cannot be replayed with the judge's "
                "adapter. Use a judge without one."
            )
        first, count = min(layer for layer, _ in products), len(layers)
        if max(layer for layer, _ in products) >= count:
            raise ValueError(f"`adapter` has layers beyond the {count} of `target`. It was made for another one.")
        self.entering = layers[first]
        self.decoder = shared_copy(target.get_decoder())
        self.decoder.config = config = copy.deepcopy(self.decoder.config)
        config.num_hidden_layers = count - first
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[first:]
        self.decoder.layers = torch.nn.ModuleList(shared_copy(layer) for layer in layers[first:])
        for index, layer in enumerate(self.decoder.layers):
            for module in layer.modules():
                if "layer_idx" in vars(module):  # the layer's place in the cache
                    module.layer_idx = index
        self._try(target)
        rank = adapter.config["r"]
        scale = adapter.config["lora_alpha"] / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
        for (layer, name), sides in products.items():
            a, b = sides["A"], sides["B"]
            module = dict(self.decoder.layers[layer - first].named_modules()).get(name)
            shape = None if not isinstance(module, torch.nn.Linear) else (module.out_features, module.in_features)
            if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"`adapter`: {name} of layer {layer} has matrices of shape {tuple(a.shape)} and {tuple(b.shape)}, "
                    f"which fit no linear layer of `target` there ({shape}). It was made for another one."
                )
            _add_product(module, a.to(target.device), b.to(target.device), scale)

    def start(self) -> ReplaySession:
        """Begin another text."""
        return ReplaySession(self.decoder)

    @torch.no_grad()
    def _try(self, target: PreTrainedModel) -> None:
        """Check that the layers, still without the adapter, compute what they compute in the target."""
        config = target.config.get_text_config()
        ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0)).to(target.device)
        forwards = []
        try:
            with ForwardTap(target, lambda hidden, _, entered: forwards.append((hidden, entered)), self.entering):
                target(input_ids=ids, use_cache=False)
            ((hidden, entered),) = forwards
            difference, limit = self.start()(entered, 0) - hidden, torch.finfo(hidden.dtype).eps ** 0.5
            if difference.float().norm() > limit * hidden.float().norm():
                raise ValueError("they compute something else than in the target")
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"`target`: the last layers of {type(target).__name__} cannot be run by themselves ({error}). Use a "
                "judge without an adapter."
            ) from error


class ReplaySession:
    """The replay of one text, forward by forward, with a cache of its own. `decoder` is that of a [`Replay`]."""

    def __init__(self, decoder: PreTrainedModel):
        self.decoder, self.cache = decoder, DynamicCache()

    @torch.no_grad()
    def __call__(self, entered: LayerInput, start: int) -> torch.Tensor:
        """
        The last hidden states, of shape `(1, tokens, hidden_size)`, where `entered` is the input of the first adapted
        layer in a forward of the target, and `start` the number of tokens in the target's cache before that forward.
        What this session's cache holds beyond `start` was discarded in the target, and is discarded here.

        Raises:
            ValueError: If this session's cache holds fewer: a forward of the target was not replayed.
        """
        length = self.cache.get_seq_length()
        if length < start:
            raise ValueError(
                f"The judge's adapter has seen {length} of {start} tokens. Start without `past_key_values` of an "
                "earlier call."
            )
        if length > start:
            self.cache.crop(start - length)
        return self.decoder(
            inputs_embeds=entered.states,
            attention_mask=entered.attention_mask,
            position_ids=entered.position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module and its submodules that shares all weights, without the hooks."""
    clone = shallow_copy(module)
    clone._modules = {name: None if child is None else shared_copy(child) for name, child in module._modules.items()}
    clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()
    return clone


def _add_product(module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Make a linear layer add `scale * B A x` to its output."""

    def add(_, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        here = output.device  # the target may have been moved
        return output + (inputs[0].to(a.dtype) @ a.to(here).T @ b.to(here).T * scale).to(output.dtype)

    a, b = a.float(), b.float()
    module.register_forward_hook(add)
