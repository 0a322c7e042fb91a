"""Precisions for models on a CPU: fp16 weights packed for fp32 arithmetic, and int8 weights for drafts.

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


def quantise_int8(model: PreTrainedModel) -> None:
    """Give the linear layers of a CPU model in fp32 int8 weights, one scale for each output channel, and quantise
    their inputs as they come (PyTorch's dynamic quantisation). Layers with more inputs than outputs (an MLP's down
    projection, keys and values) stay in half precision: inputs of the former have outliers that int8 cannot hold."""
    wide = {
        name: torch.ao.quantization.per_channel_dynamic_qconfig
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module.in_features <= module.out_features
    }
    with warnings.catch_warnings():
        # It is deprecated, but its successor has no fast kernels for CPUs without AVX-512.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=UserWarning)
        torch.ao.quantization.quantize_dynamic(model, wide, inplace=True)
    pack_half(model)


def precision(model: PreTrainedModel) -> str:
    """The precision of a model's weights, in words."""
    kinds = {type(module) for module in model.modules()}
    if torch.ao.nn.quantized.dynamic.Linear in kinds:
        return "int8 and fp16 weights"
    if HalfLinear in kinds:
        return "fp16 weights, fp32 arithmetic"
    return str(model.dtype).removeprefix("torch.")
