"""vLLM's rejection sampler with a rule inside: the row of a candidate that the rule keeps becomes one-hot, so that all
of vLLM's kernels accept it, greedy or sampled."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

from ..decoding.rules import Lossless, Rule
from .rounds import Rounds
from .settings import LOSSLESS, Rules, asked_for


logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name


class JudgedSampler(RejectionSampler):
    """
    A [`RejectionSampler`] that asks a rule about candidates before they are verified.

    Args:
        runner ([`GPUModelRunner`]): The runner that it belongs to; it knows the requests.
        rules ([`Rules`]): The rules of the server.
        special_tokens (`Iterable[int]`): Neither accepted against the target's choice nor
            overruled, like the stop tokens of a request.

    Attributes:
        step ([`ExecuteModelState`], *optional*): What the target computed in the step that is sampled now. Without it,
            as while vLLM warms up, no rule is asked.
        judged, refused (`int`): Mismatches that a rule kept, and those that it did not and that ended a draft.
        seconds (`float`): Time that the rules took.
    """

    def __init__(self, runner: GPUModelRunner, rules: Rules, special_tokens: Iterable[int]):
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self.runner, self.rules = runner, rules
        size = runner.model_config.get_vocab_size()
        self.special_tokens = {token for token in special_tokens if token < size}  # a tokenizer may have more
        self.special = torch.zeros(size, dtype=torch.bool, device=runner.device)
        self.special[sorted(self.special_tokens)] = True
        self.step: ExecuteModelState | None = None
        self.judged = self.refused = 0
        self.seconds = 0.0

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        self._kept = self._own = None
        output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        if self._kept is not None:
            self._count(metadata, output.sampled_token_ids)
        return output

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, metadata: SpecDecodeMetadata
    ) -> torch.Tensor:
        """Penalties and constraints, and then the rules. `logits` have a row for each candidate."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        if self.step is None:
            return logits
        since = time.perf_counter()
        names = self.runner.input_batch.req_ids[: len(metadata.num_draft_tokens)]
        requests = [self.runner.requests[name] for name in names]
        rules = [self._rule(request) for request in requests]
        if all(isinstance(rule, Lossless) for rule in rules):
            return logits
        final = logits
        if not sampling_metadata.all_greedy:
            final = apply_sampling_constraints(logits.clone(), metadata.cu_num_draft_tokens, sampling_metadata)
        tokens = metadata.draft_token_ids.long()
        rounds = Rounds(
            counts=metadata.num_draft_tokens,
            tokens=tokens,
            prompt_lengths=[request.num_prompt_tokens for request in requests],
            places=self.runner.positions[metadata.logits_indices],
            scores=logits,
            final_scores=final,
            logits=self.step.logits,
            hidden=self._hidden(metadata),
            special=self.special,
            stops=[request.sampling_params.all_stop_token_ids - self.special_tokens for request in requests],
            sampled=[request.sampling_params.temperature > 0 for request in requests],
        )
        self._kept, self._asked = rounds.decide(rules)
        (rows,) = self._kept.nonzero(as_tuple=True)
        if self.is_processed_logprobs_mode:
            self._own = final[rows]
        logits[rows] = -torch.inf
        logits[rows, tokens[rows]] = 0.0
        self.seconds += time.perf_counter() - since
        return logits

    def _rule(self, request: CachedRequestState) -> Rule:
        """The rule of a request. One that the server does not have is not guessed: the request is decoded losslessly.
        (Values that no server has are refused before, by [`RequestCheck`].)"""
        try:
            return self.rules.of(asked_for(request.sampling_params.extra_args))
        except ValueError as error:
            logger.warning_once("Request %s is decoded losslessly. %s", request.req_id, str(error))
            return LOSSLESS

    def _hidden(self, metadata: SpecDecodeMetadata) -> torch.Tensor:
        """The hidden states that the rules read, of shape `(rows, hidden_size)`."""
        if self.rules.layer is None:
            return self.step.sample_hidden_states
        (entered,) = self.step.aux_hidden_states
        return entered[metadata.logits_indices]

    def _count(self, metadata: SpecDecodeMetadata, sampled_token_ids: torch.Tensor) -> None:
        """Count the mismatches that a rule decided about, up to the end of what each draft added."""
        lengths = (sampled_token_ids != PLACEHOLDER_TOKEN_ID).sum(-1)
        counts = torch.tensor(metadata.num_draft_tokens, device=lengths.device)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self._kept), device=lengths.device) - starts.repeat_interleave(counts)
        end = lengths.repeat_interleave(counts) - 1  # where a token of the target's own stands
        judged = (self._asked & self._kept & (place < end)).sum()
        refused = (self._asked & ~self._kept & (place == end)).sum()
        judged, refused = torch.stack([judged, refused]).tolist()
        self.judged += judged
        self.refused += refused

    def _get_logprobs_tensors(
        self,
        max_num_logprobs: int,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        target_logits: torch.Tensor,
        bonus_logits: torch.Tensor,
        sampled_token_ids: torch.Tensor,
    ) -> LogprobsTensors:
        """Log-probabilities of kept candidates are the target's own, not those of one-hot rows."""
        if self._own is not None:
            target_logits = target_logits.clone()
            target_logits[self._kept] = self._own
        return super()._get_logprobs_tensors(
            max_num_logprobs, metadata, logits, target_logits, bonus_logits, sampled_token_ids
        )
