"""A draft without the overhead of Python: its forward of one token is compiled, over a cache of fixed size.

In: a loaded model. Out: the same model; its forwards of one token over a [`CroppableStaticCache`] are compiled.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import Cache, CompileConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.utils import logging


logger = logging.get_logger(__name__)

SHORTEST = 512  # tokens of the smallest cache; the next ones are twice as long each
# Cache sizes that are compiled at once. From the second one on, the compiler treats the size as a variable.
WARMED_UP = (SHORTEST, 2 * SHORTEST)


class CroppableStaticCache(Cache):
    """
    The keys and values of one text, in tensors of fixed size. Unlike transformers' static cache it can be cropped: the
    length is a number, and what lies behind it is masked. All layers hold the whole text, also those of sliding
    windows, whose masks hide the rest.

    Args:
        layers (`int`): Number of the model's layers.
        size (`int`): Tokens that it can hold.

    Attributes:
        held (`int`): Tokens that it holds. Whoever calls the model counts them here: compiled code cannot.
    """

    def __init__(self, layers: int, size: int):
        super().__init__(layers=[StaticLayer(size) for _ in range(layers)])
        self.size, self.held = size, 0

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        # Compiled code must not depend on the number, or it would be compiled anew for each token.
        return super().get_seq_length(layer_idx) if torch.compiler.is_compiling() else self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, as other caches do."""
        self.hold(self.held + tokens_to_remove)

    def hold(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        self.held = length
        if self.layers[0].is_initialized:
            torch._foreach_zero_(lengths := [layer.cumulative_length for layer in self.layers])
            torch._foreach_add_(lengths, length)


class SharedCache:
    """The cache of a compiled model. One call has it at a time; others decode as if nothing were compiled. It must not
    refer to the model, which could then never be freed."""

    def __init__(self, layers: int):
        self.layers, self.lock = layers, threading.Lock()
        self.cache: CroppableStaticCache | None = None
        self.user = lambda: None

    def take(self, user: object, length: int) -> CroppableStaticCache | None:
        """An empty cache for a text of at most `length` tokens, for as long as `user` lives; `None` if another one has
        it."""
        with self.lock:
            if self.user() is not None:
                return None
            if self.cache is None or self.cache.size < length:
                self.cache = CroppableStaticCache(self.layers, max(SHORTEST, 1 << (length - 1).bit_length()))
            self.user = weakref.ref(user)
        self.cache.hold(0)
        return self.cache


# By the base model, which copies of a model share.
_shared: weakref.WeakKeyDictionary[torch.nn.Module, SharedCache] = weakref.WeakKeyDictionary()


def shared_cache(model: PreTrainedModel) -> SharedCache | None:
    """The cache that calls of `model` share, if [`compile_step`] has compiled it."""
    return _shared.get(model.base_model)


def compile_step(model: PreTrainedModel, config: CompileConfig | None = None) -> None:
    """
    Compile the forward of one token (`torch.compile`), in place, and warm it up. This takes up to some minutes; the
    compiler keeps its results on disk, and is faster the next time. Where it fails there is a warning, and the model
    stays as it is. A model that is compiled already is left alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder whose layers all have keys and values. Its weights must be
            plain tensors: packed ones cannot be traced.
        config ([`~transformers.CompileConfig`], *optional*): By default the whole step is one graph, on a GPU a CUDA
            graph.
    """
    if shared_cache(model) is not None:
        return
    if config is None:
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        config = CompileConfig(fullgraph=True, mode=mode)
    eager, overridden = model.forward, "forward" in vars(model)
    step = torch.compile(eager, **config.to_dict())

    @functools.wraps(eager)  # `generate` looks at the signature
    def forward(input_ids: torch.LongTensor | None = None, *args, **kwargs):
        one = input_ids is not None and input_ids.shape == (1, 1) and not args
        if one and isinstance(kwargs.get("past_key_values"), CroppableStaticCache):
            with contextlib.suppress(FailOnRecompileLimitHit):  # a call of another sort, after too many others
                return step(input_ids, **kwargs)
        return eager(input_ids, *args, **kwargs)

    layers = model.config.get_text_config().num_hidden_layers
    logger.warning(f"Compiling a step of {model.config.name_or_path}; this can take minutes the first time.")
    model.forward = forward
    try:
        # The compiler counts what all models of a process compile, and would refuse the fifth.
        with torch._dynamo.config.patch(recompile_limit=1000):
            for size in WARMED_UP:
                _warm_up(model, CroppableStaticCache(layers, size))
    except Exception as error:  # whatever compiler, driver or model raise: decoding works without
        del model.forward
        if overridden:
            model.forward = eager
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.warning(f"{model.config.name_or_path} could not be compiled and is used as it is. {reason}")
        return
    _shared[model.base_model] = SharedCache(layers)


@torch.no_grad()
def _warm_up(model: PreTrainedModel, cache: CroppableStaticCache) -> None:
    """Decode some tokens: the first forwards compile and record, the later ones use what they made."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs) -> None:
        kwargs["past_key_values"] = cache
        for _ in range(4):
            new = input_ids.shape[1] - cache.held
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=new, is_first_iteration=False, **kwargs
            )
            outputs = model(**inputs, return_dict=True)
            cache.held = input_ids.shape[1]
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            input_ids = torch.cat([input_ids, outputs.logits[:, -1].argmax(-1, keepdim=True)], dim=-1)

    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, custom_generate=decode)
