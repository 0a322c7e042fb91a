"""What the package promises: its public names, its entry points, and the judges that come with it."""

import json
import subprocess
import sys

import pytest

import hf_selfjudge
from hf_selfjudge import Judge, rules
from hf_selfjudge.judge.shipped import HUB_CARDS, OTHERS, SHIPPED, shipped_judge
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.models.pair import PAIRS


PUBLIC = [
    "Judge", "JudgeConfig", "JudgeTrainer", "JudgedModel", "MiningConfig", "Pair", "Threshold", "load_labels",
    "load_model", "load_pair", "mine", "read_prompts",
]  # fmt: skip
JUDGE_FOLDERS = sorted(path.parent for path in HUB_CARDS.glob("*/config.json"))


def test_the_public_names():
    assert hf_selfjudge.__all__ == PUBLIC
    assert all(getattr(hf_selfjudge, name).__doc__ for name in PUBLIC)


def test_the_rules():
    assert {name for name in rules.__all__ if issubclass(getattr(rules, name), rules.Rule)} == {
        *("Coin", "JudgeRule", "KLGate", "LookAhead", "Lossless", "Margin", "Rule", "TopK"),
    }


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-m", "hf_selfjudge", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_every_shipped_judge_is_listed():
    assert {shipped_judge(*key) for key in SHIPPED} | {HUB_CARDS / name for name in OTHERS} == {*JUDGE_FOLDERS}


@pytest.mark.parametrize("folder", JUDGE_FOLDERS, ids=lambda folder: folder.name)
def test_files_of_a_shipped_judge(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "reliability.png", "results.json"}
    assert all(name.endswith((".md", ".json", ".safetensors", ".png")) for name in names)
    curves = {f"curve-{bench}.png" for bench in json.loads((folder / "results.json").read_text()).get("bench", {})}
    assert curves == {name for name in names if name.startswith("curve-")}


@pytest.mark.parametrize("folder", JUDGE_FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_judge_loads(folder, tmp_path, monkeypatch):
    judge = Judge.from_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert fingerprint(Judge.from_pretrained(folder.name)) == fingerprint(judge)
    assert judge.info.target in {target for target, _ in PAIRS.values()}
    assert judge.head.weight.isfinite().all()
    assert 0 < judge.info.threshold.limit < 1
    assert judge.info.to_json() == {"layer": None} | json.loads((folder / "config.json").read_text())
