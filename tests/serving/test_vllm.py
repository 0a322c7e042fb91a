"""The judge in vLLM itself, on tiny models that are saved to disk, in fp32. `environment.sh` makes the environment."""

import concurrent.futures
import importlib
import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding import decode as decode_module
from hf_selfjudge.decoding.rules import JudgeRule, Margin
from tests.builders import VOCAB, build, greedy, midway_judge, perturbed, random_judge, tiny_tokenizer
from tests.serving import fake_vllm


pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")

WORKER = "hf_selfjudge.serving.worker.JudgedWorker"
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
LENGTH, DRAFTED = 40, 5


@pytest.fixture(scope="module")
def pair():
    target = build("llama", hidden_size=128)  # heads that vLLM's kernels have
    return target, perturbed(target, 0.01)


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """Target, draft and judges on disk."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    tokenizer.model_max_length = 256
    for name, model in zip(("target", "draft"), pair, strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, judge in (("layer", midway_judge(pair[0])), ("last", random_judge(pair[0]))):
        judge.info = replace(judge.info, target="./target")
        judge.save_pretrained(folder / name)
    return folder


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(12, VOCAB) for _ in range(rng.randrange(3, 12))] for _ in range(count)]


def decode(folder, requests, selfjudge=None, at_once=True, **options):
    """What vLLM makes of requests: `(prompt, parameters)`."""
    options = {
        **{"model": "target", "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8},
        "speculative_config": {"model": "draft", "num_speculative_tokens": DRAFTED},
        **options,
    }
    if selfjudge is not None:
        options |= {"worker_cls": WORKER, "additional_config": {"selfjudge": selfjudge}}
    greedy = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True}
    given = {
        "options": options,
        "at_once": at_once,
        "requests": [{"prompt": prompt, "params": greedy | params} for prompt, params in requests],
    }
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = {"LD_PRELOAD": str(library)} if library.is_file() else {}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("engine.py")],
        cwd=folder,
        env=os.environ | ENVIRONMENT | preloaded | {"HF_HUB_OFFLINE": "1"},
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return json.loads(lines[-1].removeprefix("RESULT "))


def judge_of(folder, name):
    return {"judge": str(folder / name), "allow_other_weights": True}


def asking(threshold):
    return {"extra_args": {"selfjudge": threshold}}


@pytest.fixture(scope="module")
def lossless(pair):
    """What the target says by itself."""
    return [greedy(pair[0], torch.tensor(prompt), LENGTH) for prompt in prompts(8)]


@pytest.mark.parametrize("selfjudge", ["nothing", "threshold", "request"])
def test_threshold_0_is_lossless(folder, lossless, selfjudge):
    config = None if selfjudge == "nothing" else judge_of(folder, "layer")
    if selfjudge == "threshold":
        config["threshold"] = 0
    own = asking(0) if selfjudge == "request" else {}
    found = decode(folder, [(prompt, own) for prompt in prompts(8)], config)
    assert found["tokens"] == lossless
    if config is not None:
        assert found["counts"] == [0, 0]


def judged_by_transformers(pair, prompt, rule, monkeypatch):
    """What `generate` makes of it. vLLM reads the prompt before it drafts."""
    monkeypatch.setattr(decode_module, "_reads_prompt_first", lambda *arguments: True)
    target, draft = pair
    judged = JudgedModel(target, rule, tokenizer=tiny_tokenizer())
    ids = torch.tensor([prompt])
    # Not to the end: there, transformers drafts less. A draft of its takes tokens that fill up for none at all.
    options = {"max_new_tokens": LENGTH + 2 * DRAFTED, "do_sample": False, "pad_token_id": 1}
    return judged.generate(ids, assistant_model=draft, **options)[0, len(prompt) :][:LENGTH].tolist()


THRESHOLDS = [0.3, 0.5, 0.7, "0.05/token", "0.2/token", "0.4/token", 0, 1]


@pytest.mark.parametrize("name", ["layer", "last"])
def test_decisions_are_those_of_transformers(folder, pair, name, monkeypatch, lossless):
    judge = (midway_judge if name == "layer" else random_judge)(pair[0])
    found = decode(
        folder, [(prompt, asking(limit)) for prompt, limit in zip(prompts(8), THRESHOLDS, strict=True)],
        judge_of(folder, name),
    )  # fmt: skip
    for tokens, prompt, limit in zip(found["tokens"], prompts(8), THRESHOLDS, strict=True):
        assert tokens == judged_by_transformers(pair, prompt, JudgeRule(judge, limit), monkeypatch)
    assert sum(own != other for own, other in zip(found["tokens"], lossless, strict=True)) >= 4
    assert all(found["counts"])


def test_rules_without_a_judge(folder, pair, monkeypatch, lossless):
    found = decode(folder, [(prompt, {}) for prompt in prompts(8)], {"rule": "margin=0.2"})["tokens"]
    assert found == [judged_by_transformers(pair, prompt, Margin(0.2), monkeypatch) for prompt in prompts(8)]
    assert found != lossless


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"async_scheduling": False, "enable_prefix_caching": True, "block_size": 32},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 8, "max_num_seqs": 1},
        {"enforce_eager": False},
    ],
    ids=["asynchronous", "cached prefixes", "prompts in chunks", "compiled"],
)
def test_ways_to_run(folder, options):
    shared = prompts(1, seed=3)[0] * 8  # longer than a block of the cache
    requests = [(shared + prompt, asking(limit)) for prompt, limit in zip(prompts(8), THRESHOLDS, strict=True)]
    expected = decode(folder, requests, judge_of(folder, "layer"), async_scheduling=False, enable_prefix_caching=False)
    assert decode(folder, requests, judge_of(folder, "layer"), **options)["tokens"] == expected["tokens"]


def test_a_hundred_requests_do_not_touch_each_other(folder):
    rng = random.Random(0)
    requests = [(prompt, asking(rng.choice(THRESHOLDS))) for prompt in prompts(100)]
    alone = decode(folder, requests, judge_of(folder, "layer"), at_once=False)
    order = rng.sample(range(100), 100)
    together = decode(folder, [requests[number] for number in order], judge_of(folder, "layer"))
    assert together["tokens"] == [alone["tokens"][number] for number in order]
    assert all(together["counts"])


def test_constraints_are_never_overruled(folder):
    """By a judge that accepts everything."""
    prompt, everything = prompts(1)[0], asking(1)
    banned = "abcdefghijklm"
    words = [[tiny_tokenizer().convert_tokens_to_ids(letter)] for letter in banned]
    requests = [
        (prompt, everything),
        (prompt, everything | {"bad_words": [*banned]}),
        (prompt, everything | {"allowed_token_ids": [20, 21, 22]}),
        (prompt, everything | {"structured_outputs": {"regex": "(ab|ba|c){60}"}}),
        (prompt, everything | {"stop_token_ids": [*range(12, 38)]}),
        (prompt, everything | {"repetition_penalty": 1.3}),
    ]
    free, bad, allowed, structured, stopped, penalised = decode(folder, requests, judge_of(folder, "layer"))["tokens"]
    assert not {*bad} & {token for (token,) in words}
    assert {*allowed} <= {20, 21, 22}
    text = tiny_tokenizer().decode(structured)
    assert re.fullmatch("(ab|ba|c)*[ab]?", text)
    assert free[: len(stopped) - 1] == stopped[:-1] or len(stopped) < len(free)
    assert len(penalised) == LENGTH


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_log_probabilities_are_the_targets_own(folder, pair, mode):
    requests = [(prompt, asking(1) | {"logprobs": 1}) for prompt in prompts(3)]
    found = decode(folder, requests, judge_of(folder, "layer"), logprobs_mode=mode)
    for (prompt, _), tokens, logprobs in zip(requests, found["tokens"], found["logprobs"], strict=True):
        with torch.no_grad():
            rows = pair[0](torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = rows.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-3)
    assert found["counts"][0] > 0


def test_sampling(folder):
    """What a filter masks is tested in `test_worker.py`: with drafts, vLLM's own sampling on a CPU does not keep to
    filters."""
    requests = [(prompt, asking(1) | {"temperature": 0.8, "top_p": 0.6}) for prompt in prompts(8)]
    found = decode(folder, requests, judge_of(folder, "layer"))
    assert [len(tokens) for tokens in found["tokens"]] == [LENGTH] * 8
    assert found["counts"][0] > 0


def test_prompt_lookup(folder, pair):
    """Drafts need no model."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    repeated = [prompt * 3 for prompt in prompts(4)]
    requests = [(prompt, asking(0)) for prompt in repeated] + [(prompt, asking(1)) for prompt in repeated]
    found = decode(folder, requests, judge_of(folder, "layer"), speculative_config=drafts)
    assert found["tokens"][:4] == [greedy(pair[0], torch.tensor(prompt), LENGTH) for prompt in repeated]
    assert found["counts"][0] > 0


@pytest.mark.parametrize(
    ("selfjudge", "options", "message"),
    [
        ("layer", {"speculative_config": None}, "needs drafts: --speculative-config"),
        ("missing", {}, "neither a folder nor"),
        ("strict", {}, "made for another target"),
        ("gpt2", {"model": "gpt2", "speculative_config": {**{"method": "ngram", "num_speculative_tokens": 3}}},
         "which GPT2LMHeadModel does not give in vLLM"),
    ],
)  # fmt: skip
def test_what_is_refused_at_the_start(folder, selfjudge, options, message):
    config = judge_of(folder, selfjudge)
    if selfjudge == "strict":
        config = {"judge": str(folder / "layer")}
        (folder / "strict").symlink_to(folder / "target")
        options = {"model": "strict"}
    if selfjudge == "gpt2":
        target = build("gpt2", n_embd=128)
        target.save_pretrained(folder / "gpt2")
        tiny_tokenizer().save_pretrained(folder / "gpt2")
        judge = midway_judge(target)
        judge.info = replace(judge.info, target="./gpt2")
        judge.save_pretrained(folder / "gpt2-judge")
        config = judge_of(folder, "gpt2-judge")
    with pytest.raises(RuntimeError, match=message):
        decode(folder, [], config, **options)


# The server ------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, folder, *options):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.url = f"http://localhost:{free.getsockname()[1]}"
        script = Path(sys.executable).with_name("hf-selfjudge")
        command = [script, "serve", "target,draft", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
        self.log = (folder / "serve.log").open("w+")
        self.process = subprocess.Popen(
            [*command, "--port", self.url.rpartition(":")[2], "--max-num-seqs", "8", *options],
            cwd=folder,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self):
        for _ in range(240):
            assert self.process.poll() is None, Path(self.log.name).read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health")
                return
            except OSError:
                time.sleep(1)
        raise TimeoutError(Path(self.log.name).read_text()[-4000:])

    def metrics(self):
        lines = urllib.request.urlopen(f"{self.url}/metrics").read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("selfjudge_")}

    def complete(self, client, prompt, threshold=None, **options):
        extra = {"ignore_eos": True, "vllm_xargs": {} if threshold is None else {"selfjudge": threshold}}
        options = {"max_tokens": LENGTH, "temperature": 0} | options
        return client.completions.create(model="target", prompt=prompt, extra_body=extra, **options)


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder, "--judge", "layer", "--threshold", "0.5")
    try:
        server.wait()
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")


def text_of(stream):
    return "".join(chunk.choices[0].text for chunk in stream)


def test_a_judged_answer_streams(server, client, pair, monkeypatch):
    prompt = "why is it so?"
    before = server.metrics()
    found = text_of(server.complete(client, prompt, stream=True))
    rule = JudgeRule(midway_judge(pair[0]), 0.5)
    expected = judged_by_transformers(pair, tiny_tokenizer()(prompt)["input_ids"], rule, monkeypatch)
    assert found == tiny_tokenizer().decode(expected, skip_special_tokens=True)
    after = server.metrics()
    assert {name for name in after if after[name] > before.get(name, 0)} == {
        *("selfjudge_judged_tokens_total", "selfjudge_refused_mismatches_total", "selfjudge_rule_seconds_total"),
    }
    assert text_of(server.complete(client, prompt, threshold=0, stream=True)) != found


def test_a_wrong_threshold_is_refused(server, client):
    with pytest.raises(Exception, match=r"400.*`selfjudge` in the request: `threshold` must be in \[0, 1\]"):
        server.complete(client, "why?", threshold=7)
    assert server.complete(client, "why?").choices[0].text


def test_a_client_that_goes_away_harms_nobody(server, client):
    expected = {limit: server.complete(client, "how many?", threshold=limit).choices[0].text for limit in (0, 0.5, 1)}
    leaving = server.complete(client, "tell me.", stream=True, max_tokens=200)
    next(iter(leaving))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        limits = [0, 0.5, 1] * 2
        futures = [pool.submit(server.complete, client, "how many?", limit) for limit in limits]
        leaving.close()
        found = [future.result().choices[0].text for future in futures]
    assert found == [expected[limit] for limit in limits]


def test_the_log_and_the_end(server, folder, client):
    server.complete(client, "why?")
    log = (folder / "serve.log").read_text()
    assert log.startswith("VLLM_USE_V2_MODEL_RUNNER=0 PROMETHEUS_MULTIPROC_DIR=")
    assert "Decoding with JudgeRule(judge for ./target, threshold=0.5)." in log
    assert "mismatches kept and" in log


# vLLM is what the fakes say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__init__", "forward", "apply_logits_processors", "_get_logprobs_tensors"])
def test_signatures_of_the_sampler(name):
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    real, fake = (inspect.signature(getattr(owner, name)) for owner in (RejectionSampler, fake_vllm.RejectionSampler))
    assert [*real.parameters] == [*fake.parameters]


@pytest.mark.parametrize("name", ["__init__", "load_model", "sample_tokens"])
def test_signatures_of_the_worker(name):
    from vllm.v1.worker.cpu_worker import CPUWorker

    real, fake = (inspect.signature(getattr(owner, name)) for owner in (CPUWorker, fake_vllm.CPUWorker))
    assert [*real.parameters] == [*fake.parameters]


def test_names_that_the_package_imports():
    for module, names in fake_vllm.MODULES.items():
        assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []
    from vllm.v1.worker.gpu_model_runner import ExecuteModelState

    assert {"logits", "sample_hidden_states", "aux_hidden_states"} <= {*ExecuteModelState._fields}


def test_the_version():
    assert vllm.__version__ == fake_vllm.VERSION
