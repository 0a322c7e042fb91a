"""Refuses requests whose extra arguments ask for a threshold that no judge has, before they reach the target."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from .settings import asked_for


class RequestCheck(LogitsProcessor):
    """vLLM asks each logits processor about the parameters of a request. This one does nothing else: with speculative
    decoding none is applied to logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """
        Raises:
            ValueError: If `selfjudge` in the request is not a threshold. The server answers with status 400.
        """
        asked_for(sampling_params.extra_args)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass
