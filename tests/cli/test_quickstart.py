"""`quickstart`, `card` and `demo`."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_selfjudge import Judge
from hf_selfjudge.cli import quickstart
from hf_selfjudge.judge.threshold import Threshold
from tests.builders import build, random_judge


def test_quickstart_and_card(succeed, fail, judge, pair_folders, prompts_file, tmp_path):
    figures = tmp_path / "figures.json"
    out = succeed(
        *("quickstart", "--pair", pair_folders, "--judge", judge, "--prompts", prompts_file, "--limit", 3),
        *("--max-new-tokens", 24, "--threshold", 1, "--draft-length", 5, "--json", figures),
    )
    assert "tokens/round" in out
    assert "draft, judged" in out
    assert "One token costs the target" in out
    assert "The judge makes" in out
    results = json.loads(figures.read_text())
    assert results["pair"] == pair_folders
    assert results["prompts"] == 3
    runs = {run["decoding"]: run for run in results["runs"]}
    assert list(runs) == ["greedy", "assisted", "lossless", "judged"]
    assert runs["greedy"]["tokens_per_round"] == 1
    assert runs["judged"]["tokens_per_round"] > runs["lossless"]["tokens_per_round"] > 1
    assert runs["greedy"]["agreement"] == runs["assisted"]["agreement"] == 1 > runs["judged"]["agreement"]
    assert runs["greedy"]["judged_share"] == runs["assisted"]["judged_share"] == 0 < runs["judged"]["judged_share"]
    assert runs["judged"]["logprob_per_token"] < runs["greedy"]["logprob_per_token"] < 0
    assert all(run["tokens_per_second"] > 0 and run["seconds_per_answer"] > 0 for run in results["runs"])
    succeed("card", judge, "--results", figures)
    assert "Measured in decoding" in (judge / "README.md").read_text()
    text = figures.read_text()
    figures.write_bytes(text.encode("utf-8-sig"))  # as some editors save it
    succeed("card", judge, "--results", figures)
    figures.write_bytes(text.encode("utf-16"))
    message = fail("card", judge, "--results", figures)
    assert "figures.json:1: this is not UTF-8 text, but perhaps UTF-16. Save it as UTF-8." in message


@pytest.mark.parametrize("place", ["--offload", "--device-map=cpu"])
def test_a_target_that_does_not_fit_into_memory(succeed, judge, pair_folders, prompts_file, tmp_path, place):
    figures = tmp_path / "figures.json"
    succeed(
        *("quickstart", "--pair", pair_folders, "--judge", judge, "--prompts", prompts_file, "--limit", 2),
        *("--max-new-tokens", 16, "--threshold", 0, place, "--json", figures, "--dtype", "float32"),
    )
    results = json.loads(figures.read_text())
    assert results["offloaded"] is (place == "--offload")
    assert [run["agreement"] for run in results["runs"]] == [1] * 4  # lossless


def test_an_offloaded_target_answers_fewer_prompts(succeed, fail, judge, pair_folders, tmp_path):
    figures = tmp_path / "figures.json"
    options = ("quickstart", "--pair", pair_folders, "--judge", judge, "--max-new-tokens", 4, "--offload")
    succeed(*options, "--json", figures)
    assert json.loads(figures.read_text())["prompts"] == quickstart.OFFLOADED_PROMPTS
    assert "`--offload` and `--device-map` both say where" in fail(*options, "--device-map", "auto")


def test_what_a_command_names_is_text(succeed, fail, tmp_path):
    name = "[/INST] :smile: [red]x"
    assert f"{tmp_path / name} has no mining.json" in fail("labels", tmp_path / name)
    random_judge(build("llama")).save_pretrained(tmp_path / name / "judge")
    out = succeed("card", tmp_path / name / "judge")
    assert out.strip() == f"Card written to {tmp_path / name / 'judge' / 'README.md'}"


def test_quickstart_trains(succeed, pair_folders, tmp_path, monkeypatch):
    small = quickstart.MiningConfig(max_new_tokens=16, per_answer=3, answer_batch=12)
    monkeypatch.setattr(quickstart, "QUICK_MINING", small)
    monkeypatch.setattr(quickstart, "PROMPTS", tmp_path)
    for name, count in (("quickstart", 2), ("train", 12)):
        rows = [json.dumps({"prompt": f"what is {i} {name}?"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    output = tmp_path / "out"
    succeed("quickstart", "--pair", pair_folders, "--train", "--output", output, "--max-new-tokens", 16)
    assert Judge.from_pretrained(output / "judge").info.target == "./target"
    assert (output / "judge" / "README.md").is_file()


def test_demo(succeed, fail, untrained, pair_folders, monkeypatch):
    page = pytest.importorskip("hf_selfjudge.demo.page")
    received = {}

    def build_page(pair, judge, name, folder):
        received.update(pair=pair, judge=judge, name=name, folder=folder)
        return SimpleNamespace(launch=lambda **settings: received.update(settings))

    monkeypatch.setattr(page, "build", build_page)
    succeed(*("demo", "--pair", pair_folders, "--judge", untrained, "--threshold", "0.1/token", "--dtype", "float32"))
    assert received["judge"].info.threshold == Threshold(0.1, per_token=True)
    assert (received["name"], received["folder"]) == (str(untrained), untrained)
    assert received["pair"].draft.dtype == torch.float32
    assert "'soft' is none of the judge's" in fail("demo", "--judge", untrained, "--threshold", "soft")
