"""The parts of vLLM that the package builds on, as far as tests need them. Their signatures are compared with those of
vLLM where that is installed."""

import sys
from collections import namedtuple
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import torch


VERSION = "0.32.0"


class RejectionSampler(torch.nn.Module):
    """Greedy verification and log-probabilities, without kernels."""

    def __init__(self, sampler, spec_config=None, device=None):
        super().__init__()
        self.is_processed_logprobs_mode = sampler.logprobs_mode.startswith("processed")

    def forward(self, metadata, draft_probs, logits, sampling_metadata):
        raw = logits[metadata.target_logits_indices].float()
        target = self.apply_logits_processors(raw.clone(), sampling_metadata, metadata)
        target = apply_sampling_constraints(target, metadata.cu_num_draft_tokens, sampling_metadata)
        output = torch.full((len(metadata.num_draft_tokens), metadata.max_spec_len + 1), -1)
        start = 0
        for request, count in enumerate(metadata.num_draft_tokens):
            for place in range(count + 1):
                if place == count:
                    output[request, place] = logits[metadata.bonus_logits_indices[request]].argmax()
                    break
                choice = target[start + place].argmax()
                output[request, place] = choice
                if choice != metadata.draft_token_ids[start + place]:
                    break
            start += count
        shown = target if self.is_processed_logprobs_mode else raw
        logprobs = self._get_logprobs_tensors(0, metadata, logits, shown, None, output)
        return SimpleNamespace(sampled_token_ids=output, logprobs_tensors=logprobs)

    def apply_logits_processors(self, logits, sampling_metadata, metadata):
        return logits + sampling_metadata.bias

    def _get_logprobs_tensors(
        self, max_num_logprobs, metadata, logits, target_logits, bonus_logits, sampled_token_ids
    ):
        return target_logits.log_softmax(-1).gather(-1, metadata.draft_token_ids[:, None]).squeeze(-1)


def apply_sampling_constraints(logits, cu_num_draft_tokens, sampling_metadata):
    return logits if sampling_metadata.all_greedy else logits + sampling_metadata.filter


class CPUWorker:
    def __init__(self, vllm_config, local_rank, rank, distributed_init_method, is_driver_worker=False):
        self.model_config = vllm_config.model_config

    def load_model(self, *, load_dummy_weights=False):
        target = SimpleNamespace(set_aux_hidden_state_layers=lambda layers: self.layers.append(layers))
        self.layers = []
        self.model_runner = runner(get_model=lambda: target)

    def sample_tokens(self, grammar_output):
        step = self.model_runner.execute_model_state
        self.model_runner.execute_model_state = None
        return self.model_runner.rejection_sampler(*step.arguments)


class LogitsProcessor:
    pass


Step = namedtuple("Step", ["logits", "sample_hidden_states", "aux_hidden_states", "arguments"])


@dataclass
class Metadata:
    """Of requests with these drafts, as vLLM's `SpecDecodeMetadata`."""

    drafts: list[list[int]]
    num_draft_tokens: list[int] = field(init=False)

    def __post_init__(self):
        self.num_draft_tokens = [len(draft) for draft in self.drafts]
        self.max_spec_len = max(self.num_draft_tokens)
        rows = np.cumsum([0, *(count + 1 for count in self.num_draft_tokens)])
        self.bonus_logits_indices = torch.tensor(rows[1:] - 1)
        self.target_logits_indices = torch.cat([torch.arange(a, b - 1) for a, b in zip(rows, rows[1:], strict=False)])
        self.logits_indices = torch.arange(rows[-1])
        self.cu_num_draft_tokens = torch.tensor(self.num_draft_tokens).cumsum(0)
        self.draft_token_ids = torch.tensor([token for draft in self.drafts for token in draft])


def request(name, prompt=4, extra=None, temperature=0.0, stops=()):
    """The state of a request."""
    params = SimpleNamespace(extra_args=extra, temperature=temperature, all_stop_token_ids={*stops})
    return SimpleNamespace(req_id=name, num_prompt_tokens=prompt, sampling_params=params)


def runner(vocab_size=6, logprobs_mode="raw_logprobs", **more):
    """A model runner without requests."""
    return SimpleNamespace(
        sampler=SimpleNamespace(logprobs_mode=logprobs_mode),
        speculative_config=None,
        device="cpu",
        model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size),
        requests={},
        input_batch=SimpleNamespace(req_ids=[]),
        use_aux_hidden_state_outputs=False,
        **more,
    )


class Logger:
    """Keeps what is logged."""

    def __init__(self, name):
        self.lines = []

    def info(self, line, *values):
        self.lines.append(line % values)

    def warning_once(self, line, *values):
        if line % values not in self.lines:
            self.info(line, *values)


class Counter:
    """As of `prometheus_client`, which comes with vLLM."""

    def __init__(self, name, documentation):
        self.value = 0.0

    def inc(self, amount):
        assert amount >= 0
        self.value += amount


class Dummy:
    """What is only named in annotations."""


MODULES = {
    "prometheus_client": {"Counter": Counter},
    "vllm": {"__version__": VERSION},
    "vllm.config": {"VllmConfig": Dummy},
    "vllm.logger": {"init_logger": Logger},
    "vllm.model_executor": {},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.interfaces": {"supports_eagle3": lambda model: True},
    "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
    "vllm.sampling_params": {"SamplingParams": Dummy},
    "vllm.tokenizers": {
        "cached_tokenizer_from_config": lambda config: SimpleNamespace(added_tokens_decoder={}, all_special_ids=[5])
    },
    "vllm.v1": {},
    "vllm.v1.core": {},
    "vllm.v1.core.sched": {},
    "vllm.v1.core.sched.output": {"GrammarOutput": Dummy},
    "vllm.v1.outputs": dict.fromkeys(
        ("AsyncModelRunnerOutput", "ModelRunnerOutput", "LogprobsTensors", "SamplerOutput"), Dummy
    ),
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": {"BatchUpdate": Dummy, "LogitsProcessor": LogitsProcessor},
    "vllm.v1.sample.metadata": {"SamplingMetadata": Dummy},
    "vllm.v1.sample.rejection_sampler": {
        "PLACEHOLDER_TOKEN_ID": -1,
        "RejectionSampler": RejectionSampler,
        "apply_sampling_constraints": apply_sampling_constraints,
    },
    "vllm.v1.spec_decode": {},
    "vllm.v1.spec_decode.metadata": {"SpecDecodeMetadata": Dummy},
    "vllm.v1.worker": {},
    "vllm.v1.worker.cpu_worker": {"CPUWorker": CPUWorker},
    "vllm.v1.worker.gpu_input_batch": {"CachedRequestState": Dummy},
    "vllm.v1.worker.gpu_model_runner": {"ExecuteModelState": Dummy, "GPUModelRunner": Dummy},
}
OURS = tuple(f"hf_selfjudge.serving.{name}" for name in ("sampler", "worker", "request_check"))


def install(monkeypatch) -> None:
    """Put the fake in the place of vLLM. Modules of the package that import it are imported anew."""
    for name, content in MODULES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
