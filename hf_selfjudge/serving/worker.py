"""vLLM's worker, with a judge. vLLM starts it by its name: `worker_cls="hf_selfjudge.serving.worker.JudgedWorker"`."""

from __future__ import annotations

import copy
import time

from prometheus_client import Counter
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ..models.tokens import special_ids
from .sampler import JudgedSampler
from .settings import KEY, Rules, ServingConfig


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name

TESTED_VERSION = "0.32"
LOG_SECONDS = 10.0  # between two lines in the log
# Drafters that do not need hidden states of the target for themselves.
WITHOUT_STATES = ("draft_model", "ngram", "ngram_gpu", "suffix", "medusa")
COUNTERS = {
    "judged": Counter("selfjudge_judged_tokens", "Draft tokens kept though the target chose another token."),
    "refused": Counter("selfjudge_refused_mismatches", "Draft tokens rejected after a rule did not keep them."),
    "seconds": Counter("selfjudge_rule_seconds", "Time that the rules took."),
}


class JudgedWorker(Worker):
    """
    A worker of vLLM that decodes with what `selfjudge` in `additional_config` says ([`ServingConfig`]).

    Raises:
        ImportError: If this version of vLLM was not tested.
        ValueError: If the configuration cannot be served.
    """

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs):
        self.serving = ServingConfig.read(vllm_config.additional_config)
        self.rules = Rules(self.serving)
        check_supported(vllm_config, self.serving, self.rules)
        # The cache of compiled targets has to tell apart which layer's input they return.
        vllm_config.additional_config["selfjudge_layer"] = self.rules.layer
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **kwargs) -> None:
        super().load_model(**kwargs)
        runner, judge = self.model_runner, self.rules.judge
        special_tokens = special_ids(cached_tokenizer_from_config(self.model_config))
        if judge is not None:
            judge.to(runner.device)
            special_tokens |= {*judge.info.special_tokens}
        if self.rules.layer is not None:
            target = runner.get_model()
            if not supports_eagle3(target):
                raise ValueError(
                    f"`judge` reads what enters layer {self.rules.layer}, which {type(target).__name__} does not give "
                    "in vLLM (it has no EAGLE-3 interface). Use a judge of the last hidden states."
                )
            target.set_aux_hidden_state_layers((self.rules.layer,))
            runner.use_aux_hidden_state_outputs = True
        self.sampler = runner.rejection_sampler = JudgedSampler(runner, self.rules, special_tokens)
        self._counted, self._logged, self._next_line = dict.fromkeys(COUNTERS, 0), (0, 0), 0.0
        logger.info("Decoding with %s.", self.rules.default)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        self.sampler.step = self.model_runner.execute_model_state
        try:
            return super().sample_tokens(grammar_output)
        finally:
            self.sampler.step = None
            self._publish()

    def _publish(self) -> None:
        """Add what was counted since the last step to the metrics, and now and then to the log."""
        sampler = self.sampler
        for name, counter in COUNTERS.items():
            counter.inc(getattr(sampler, name) - self._counted[name])
            self._counted[name] = getattr(sampler, name)
        if (sampler.judged, sampler.refused) != self._logged and time.monotonic() >= self._next_line:
            self._logged, self._next_line = (sampler.judged, sampler.refused), time.monotonic() + LOG_SECONDS
            logger.info(
                "Judge: %d mismatches kept and %d refused so far, in %.1f s.",
                *(sampler.judged, sampler.refused, sampler.seconds),
            )


def check_supported(vllm_config: VllmConfig, serving: ServingConfig, rules: Rules) -> None:
    """
    Check that vLLM is configured in a way that the judge supports.

    Raises:
        ImportError: If this version of vLLM was not tested.
        ValueError: If something else has to be changed; says what.
    """
    if not vllm_version.startswith(f"{TESTED_VERSION}."):
        raise ImportError(
            f"This is vLLM {vllm_version}; hf_selfjudge was tested with {TESTED_VERSION}. Install that one."
        )
    drafts, model = vllm_config.speculative_config, vllm_config.model_config
    if drafts is None:
        raise ValueError(
            f'`{KEY}` needs drafts: --speculative-config \'{{"model": "DRAFT", "num_speculative_tokens": 5}}\'.'
        )
    others = ", ".join(WITHOUT_STATES)
    problems = {
        "`--tensor-parallel-size` and `--pipeline-parallel-size` must be 1: processes could decide differently.": (
            vllm_config.parallel_config.world_size > 1
        ),
        "The environment variable VLLM_USE_V2_MODEL_RUNNER must be 0: the judge works in the V1 model runner.": (
            vllm_config.use_v2_model_runner
        ),
        f"`rejection_sample_method` must be standard, got {drafts.rejection_sample_method}.": (
            drafts.rejection_sample_method != "standard"
        ),
        f"The {drafts.method} drafter reads hidden states of the target, and the judge those of layer {rules.layer}: "
        f"vLLM gives only one of them. Use a judge of the last hidden states, or a drafter among {others}.": (
            rules.layer is not None and drafts.method not in WITHOUT_STATES
        ),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"`{KEY}` cannot be used. {problem}")
    if rules.judge is not None:
        config = copy.copy(model.hf_config)
        config.name_or_path = model.model
        rules.judge.check_config(config, allow_other_weights=serving.allow_other_weights)
