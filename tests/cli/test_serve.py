"""`serve`: the command that starts vLLM's server. `tests/serving/test_vllm.py` runs it."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_selfjudge.cli import serve
from hf_selfjudge.judge.shipped import shipped_judge
from tests.builders import adapted_judge, adapter, build, random_judge


@pytest.fixture
def started(monkeypatch):
    """Calls of the server, which ends by itself with code 3."""
    calls = []

    def start(command, env, start_new_session):
        assert start_new_session
        calls.append((command, env))
        assert Path(env["PROMETHEUS_MULTIPROC_DIR"]).is_dir()
        return SimpleNamespace(wait=lambda: 3 if command[-1] != "killed" else -9)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    monkeypatch.setattr(serve.subprocess, "Popen", start)
    yield calls
    for number, handler in handlers.items():
        signal.signal(number, handler)


def options_of(words):
    """The options in the words of a command, those in JSON read."""
    read = {}
    for name, value in zip(words[2::2], words[3::2], strict=True):
        read[name] = json.loads(value) if value.startswith("{") else value
    return read


def test_the_command(run, started, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    code, out, _ = run("serve", "qwen2.5-coder", "--threshold", "0.02/token", "--port", 8001, "--draft-length=7")
    assert code == 3
    ((command, env),) = started
    target, draft = "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert options_of(command[1:]) == {
        "--model": target,
        "--speculative-config": {"model": draft, "num_speculative_tokens": 7},
        "--worker-cls": "hf_selfjudge.serving.worker.JudgedWorker",
        "--additional-config": {
            "selfjudge": {
                **{"judge": str(shipped_judge("qwen2.5-coder")), "threshold": "0.02/token"},
                "allow_other_weights": True,
            }
        },
        "--port": "8001",
    }
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "VLLM_LOGGING_LEVEL" not in env
    assert not Path(env["PROMETHEUS_MULTIPROC_DIR"]).exists()
    # What is printed is what is run.
    words = shlex.split(out)
    assert words[words.index("python") + 1 :] == command[1:]
    assert {word for word in words if word.startswith(("VLLM_", "PROMETHEUS_"))} == {
        f"{name}={env[name]}" for name in ("VLLM_USE_V2_MODEL_RUNNER", "PROMETHEUS_MULTIPROC_DIR")
    }


def test_prompt_lookup_and_a_rule(run, started, tmp_path):
    assert run("serve", tmp_path / "target", "--instead-of-judge", "margin=0.5", "--dtype", "float32")[0] == 3
    read = options_of(started[0][0][1:])
    assert read["--model"] == str(tmp_path / "target")
    assert read["--speculative-config"] == {
        **{"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2, "num_speculative_tokens": 5}
    }
    assert read["--additional-config"] == {"selfjudge": {"rule": "margin=0.5"}}


def test_a_server_that_is_killed(run, started):
    assert run("serve", "a,b", "--instead-of-judge", "margin=1", "killed")[0] == 128 + 9


def test_a_judge_in_a_folder(run, started, tmp_path, monkeypatch):
    random_judge(build("llama")).save_pretrained(tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    assert run("serve", "target,draft", "--judge", "judge")[0] == 3
    config = options_of(started[0][0][1:])["--additional-config"]["selfjudge"]
    assert config == {"judge": str(tmp_path / "judge"), "allow_other_weights": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a,b",), "`--judge`: none is shipped for these models"),
        (("a,b,c",), "`pair` must be one of"),
        (("a,b", "--judge", "nowhere/judge"), "`judge`:"),
        (("a,b", "--judge", "x", "--instead-of-judge", "margin=1"), "Use one of the two"),
        (("a,b", "--instead-of-judge", "margin=1", "--threshold", "0.5"), "a threshold is for a judge"),
        (("a,b", "--instead-of-judge", "kl=1"), "`rule` must be a rule that needs neither a judge"),
        (("qwen2.5-coder", "--threshold", "soft"), "`threshold` 'soft' is none of the judge's operating points"),
        (("qwen2.5-coder", "--draft-length", "auto"), "`--draft-length` must be a number of tokens"),
        (("qwen2.5-coder", "--draft-length", "0"), "`--draft-length` must be a number of tokens"),
        (("qwen2.5-coder", "--worker-cls", "other"), "`--worker-cls` is set by this command"),
        (("qwen2.5-coder", "--additional-config={}"), "is set by this command"),
        (("qwen2.5-coder", "--worker_cls=auto"), "is set by this command"),
        (("qwen2.5-coder", "--speculative-config.num_speculative_tokens=3"), "is set by this command"),
        (("qwen2.5-coder", "--model", "other"), "is set by this command"),
    ],
)
def test_mistakes_are_found_before_vllm_starts(run, started, arguments, message):
    code, _, err = run("serve", *arguments)
    assert (code, started) == (1, [])
    assert message in err


def test_a_judge_that_cannot_be_served(run, started, tmp_path):
    target = build("llama")
    adapted_judge(target, adapter(target)).save_pretrained(tmp_path)
    code, _, err = run("serve", "a,b", "--judge", tmp_path)
    assert code == 1
    assert "has a LoRA adapter" in err


def test_without_vllm(run, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, err = run("serve", "qwen2.5-coder")
    assert code == 1
    assert "vLLM is not installed here" in err
    assert os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None
