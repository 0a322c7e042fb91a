"""The console script on the tiny pair: labels and a judge that several tests use."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from hf_selfjudge.cli import app as script
from tests.builders import random_judge


MINE = ("--dtype", "float32", "--max-new-tokens", 24, "--per-answer", 4, "--answer-batch", 6)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the console script; returns exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-selfjudge", *map(str, arguments)])
        monkeypatch.setattr(script.torch, "set_num_threads", lambda threads: None)
        with pytest.raises(SystemExit) as stop:
            script.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def succeed(run):
    """Call the console script, which must not fail; returns standard output."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fail(run):
    """Call the console script, which must end in a sentence; returns the sentence in one line."""

    def call(*arguments):
        code, _, err = run(*arguments)
        assert code == 1, err
        return err.replace("\n", " ")

    return call


@pytest.fixture(scope="session")
def mined(pair_folders, tmp_path_factory):
    """A folder with labels of 12 prompts in `labels`, and a judge that was trained on them in `judge`."""
    folder = tmp_path_factory.mktemp("mined")
    rows = [{"prompt": f"why is {i} not {i + 1}?", "check": "number" if i % 2 else "text"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels, judge = ("--output", folder / "labels"), ("--output", folder / "judge", "--components", 8)
    for command in (
        ("mine", "--pair", pair_folders, "--prompts", folder / "prompts.jsonl", *labels, *MINE),
        ("train", "--labels", folder / "labels", *judge),
    ):
        script.app([*map(str, command)], standalone_mode=False)
    return folder


@pytest.fixture
def judge(mined, tmp_path):
    """A trained judge that a test may change."""
    return shutil.copytree(mined / "judge", tmp_path / "j")


@pytest.fixture
def untrained(pair_folders, llama, tmp_path):
    """A folder of a judge for the pair."""
    judge = random_judge(llama[0])
    judge.info = replace(judge.info, target=pair_folders.split(",")[0])
    judge.save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"


@pytest.fixture
def questions(tmp_path):
    """Rows as Spec-Bench has them."""
    rows = [
        {"question_id": i, "category": category, "turns": [f"what is {i}?"], "reference": [reference]}
        for i, (category, reference) in enumerate(
            [("math_reasoning", "so\n#### 7"), ("rag", ["a", "b"]), ("writing", "")] * 3
        )
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
