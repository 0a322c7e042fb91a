"""Precisions for models on a CPU: fp16 weights packed for fp32 arithmetic, and low-bit weights for drafts.

In: a loaded model. Out: the same model, changed in place.
"""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel


class HalfLinear(torch.nn.Linear):
    """
    A linear layer that computes in fp32 from a packed fp16 copy of its weight (FBGEMM).

    A CPU without bf16 arithmetic multiplies bf16 matrices row by row: verifying 6 candidates costs 6 times one token,
    and speculation cannot be faster. Here 6 rows cost 1.3 to 1.5 times one, and one row reads half the memory of fp32.
    A CPU with bf16 arithmetic (AVX-512) reads prompts and large batches up to twice as fast in bf16, but decodes one
    text at less than half the speed of this. fp16 holds bf16 weights exactly, except those below 6e-5.
    """

    packed: torch.ScriptObject
    sample_when_packed: torch.Tensor

    def pack(self) -> None:
        bias = None if self.bias is None else self.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.detach().float(), bias)
        self.sample_when_packed = self.sample()

    def sample(self) -> torch.Tensor:
        """Thousands of values of weight and bias. The step is odd, so that they come from all rows and columns."""
        return torch.cat([p.detach().flatten()[:: p.numel() // 4096 | 1].float() for p in self.parameters()])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(input, self.packed)


def pack_half(model: PreTrainedModel) -> None:
    """Turn every `nn.Linear` of a CPU model into a [`HalfLinear`] in place, and all other weights into fp32.
    Parameters keep their values, so that [`fingerprint`] does not change."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = HalfLinear
            module.pack()
    for module in model.modules():
        if not isinstance(module, HalfLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def check_packed(model: PreTrainedModel) -> None:
    """A `ValueError` for a model whose weights were changed after they were packed (by merging an adapter, or loading
    others): it would still compute with the old ones."""
    for name, module in model.named_modules():
        if isinstance(module, HalfLinear) and not torch.equal(module.sample_when_packed, module.sample()):
            raise ValueError(
                f"`target`: the weights of {name} were changed after they were packed for the CPU, and the packed "
                "copy would still be used. Load the model with `load_model(..., dtype=torch.bfloat16)`, then change "
                "its weights; or save it as it is now and load it again."
            )


def takes_packed() -> bool:
    """Whether this CPU has the kernels of packed weights (FBGEMM, on x86)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class LowBitLinear(torch.nn.Module):
    """
    A linear layer with int4 weights for few rows (a text that is being decoded), and another layer for more (a prompt
    that is being read, texts side by side).

    With few rows reading the weights is what costs time, and int4 reads the least. With many rows arithmetic is, and
    the kernel for int4 takes up to four times as long as that for int8.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): Each is rounded to the nearest of 16 values,
            which are evenly spaced between the lowest and the highest of 32 neighbouring weights.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): Stays in fp32.
        wide (`torch.nn.Module`): The layer for more than `FEW` rows.
    """

    FEW, GROUP = 4, 32

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wide: torch.nn.Module):
        super().__init__()
        self.wide, self.bias = wide, None if bias is None else bias.detach().float()
        groups = weight.detach().float().unflatten(1, (-1, self.GROUP))
        low, high = groups.aminmax(dim=-1)
        # The kernel is fast in bf16 only.
        scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
        level = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
        # A weight is (level - 8) * scale + centre. The 2 is the layout on a GPU and has no effect here.
        self.packed = torch._convert_weight_to_int4pack_for_cpu(level.flatten(1).int(), 2)
        self.scale_and_centre = torch.stack([scale, (low + 8 * scale).bfloat16()], -1).transpose(0, 1).contiguous()

    @classmethod
    def takes(cls, layer: torch.nn.Linear) -> bool:
        """Whether the kernel takes a layer of this size."""
        return layer.in_features % cls.GROUP == 0 and layer.out_features % 16 == 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.flatten(0, -2)
        if len(rows) > self.FEW:
            return self.wide(input)
        rows = rows.bfloat16().contiguous()
        output = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.GROUP, self.scale_and_centre).float()
        if self.bias is not None:
            output += self.bias
        return output.unflatten(0, input.shape[:-1])


def pack_low_bit(model: PreTrainedModel) -> None:
    """
    Give the linear layers of a CPU model in fp32 weights of 4 and 8 bits, in place.

    For more than four rows, weights are in int8 with one scale for each output channel, and inputs are quantised as
    they come (PyTorch's dynamic quantisation). Layers with more inputs than outputs (an MLP's down projection, keys
    and values) are in half precision there: inputs of the former have outliers that int8 cannot hold. For up to four
    rows, weights are in int4 and inputs in bf16 ([`LowBitLinear`]). The output embeddings are in int8
    for any number of rows, which is as fast.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    weights = {
        name: (module.weight, module.bias)
        for name, module in linear.items()
        if LowBitLinear.takes(module) and module is not model.get_output_embeddings()
    }
    wide = {
        name: torch.ao.quantization.per_channel_dynamic_qconfig
        for name, module in linear.items()
        if module.in_features <= module.out_features
    }
    with warnings.catch_warnings():
        # It is deprecated, but its successor has no fast kernels for CPUs without AVX-512.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=UserWarning)
        torch.ao.quantization.quantize_dynamic(model, wide, inplace=True)
    pack_half(model)
    for name, weight_and_bias in weights.items():
        model.set_submodule(name, LowBitLinear(*weight_and_bias, model.get_submodule(name)))


def precision(model: PreTrainedModel) -> str:
    """The precision of a model's weights, in words."""
    kinds = {type(module) for module in model.modules()}
    if torch.ao.nn.quantized.dynamic.Linear in kinds:
        return "int4 and int8 weights"
    if HalfLinear in kinds:
        return "fp16 weights, fp32 arithmetic"
    return str(model.dtype).removeprefix("torch.")
