"""Models whose weights are not all in the memory of one device: accelerate's hooks fetch them for each forward."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from accelerate.hooks import add_hook_to_module
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def layers_on_disk(source: str, device: str) -> dict[str, str]:
    """
    A `device_map` that leaves a model's layers on disk and puts everything else on a device.

    Args:
        source (`str`): Folder or Hub id of the model.
        device (`str`): Where the rest is, and where the layers compute.

    Raises:
        ValueError: If the model's class does not say which modules are its layers.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    layers = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    if not layers:
        raise ValueError(f"`device_map`: the layers of {type(model).__name__} are not known. Give a `dict`.")
    device_map = dict.fromkeys(layers, "disk")
    for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not any(name.startswith(f"{layer}.") for layer in layers):
            module = name.rpartition(".")[0]
            device_map[name if any(layer.startswith(f"{module}.") for layer in layers) else module] = device
    return device_map


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether some weights are fetched for each forward."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


_locks: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_new_lock = threading.Lock()


def in_turn(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """A context in which no other thread is with the same offloaded model: its hooks would unload weights that another
    thread computes with. Nothing is locked for a model in memory."""
    if not is_offloaded(model):
        return contextlib.nullcontext()
    with _new_lock:
        return _locks.setdefault(model.base_model, threading.RLock())


def shallow_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its weights and submodules. accelerate replaces the `forward` of a module by one
    that is bound to it; the copy gets one of its own."""
    clone = copy.copy(module)
    if (hook := vars(clone).pop("_hf_hook", None)) is not None:
        del clone.forward, clone._old_forward
        add_hook_to_module(clone, copy.copy(hook))
    return clone
