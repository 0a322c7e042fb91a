"""What ends in one sentence, before any model is loaded; and prompts and folders that need care."""

import json
import shutil

import pytest

from hf_selfjudge import Judge
from hf_selfjudge.cli import options
from hf_selfjudge.hub.results import public_file
from hf_selfjudge.judge.shipped import shipped_judge
from tests.cli.conftest import MINE


SHIPPED = shipped_judge("qwen2.5-coder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quickstart", "--prompts", "none.jsonl"), "none.jsonl could not be read"),
        (("quickstart", "--pair", "a,b", "--limit", "1"), "no judge is shipped for 'a,b'"),
        (("quickstart", "--train", "--judge", "x"), "Use one of the two"),
        (("mine", "--prompts", "none.jsonl", "--output", "labels"), "none.jsonl could not be read"),
        (("train", "--labels", "labels", "--output_dir", "judge"), "no mining.json"),
        (("quickstart", "--draft-length", "0"), "`draft_length` must be a number of tokens, 1 or more, or 'auto'"),
        (("quickstart", "--threshold", "soft"), "`threshold` 'soft' is none of the judge's operating points"),
        (
            ("quickstart", "--train", "--threshold", "soft"),
            "`threshold` 'soft' is none of the judge's operating points",
        ),
        (
            ("mine", "--prompts", "p.jsonl", "--output", "labels", "--threshold", "0.5"),
            "`threshold` is that of a judge",
        ),
        (("train", "--labels", "labels", "--output_dir", "judge", "--config"), "`config`: no file is named"),
        (("train", "--config=none.yaml", "--output_dir", "judge"), "none.yaml"),
        (("card", "nothing/here"), "nothing/here is neither a folder nor in the cache"),
        (("quickstart", "--pair", "a/b,c/d", "--judge", SHIPPED), "No source has the model `a/b`"),
    ],
)
def test_mistakes_end_in_a_sentence(fail, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments)


def test_an_unknown_dtype_is_refused(run):
    code, _, err = run("quickstart", "--dtype", "int4")
    assert code == 2
    assert "'int4' is not one of" in err


def test_unwritable_paths_fail_before_the_work(fail, prompts_file, tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for arguments in (
        ("mine", "--prompts", prompts_file, "--output", below),
        ("train", "--labels", tmp_path, "--output_dir", below),
        ("labels", tmp_path, "--json", below / "t.json"),
        ("quickstart", "--prompts", prompts_file, "--json", below / "f.json"),
        ("quickstart", "--prompts", prompts_file, "--train", "--output", below),
    ):
        assert f"cannot write to {below}" in fail(*arguments)


def test_empty_and_long_prompts(fail, untrained, pair_folders, tmp_path):
    path = tmp_path / "p.jsonl"
    for content, message in (("", "are empty"), (json.dumps({"prompt": "a" * 250}), "exceeds the context of 256")):
        path.write_text(content)
        for command in (
            ("quickstart", "--judge", untrained),
            ("bench", "--rule", "stock", "--output", tmp_path / "b"),
        ):
            assert message in fail(*command, "--pair", pair_folders, "--prompts", path)


def test_prompts_that_are_too_long_are_named(succeed, untrained, pair_folders, tmp_path):
    """In every command, and what is counted is what was answered."""
    path, figures, bench = tmp_path / "p.jsonl", tmp_path / "figures.json", tmp_path / "b"
    rows = [{"id": i, "prompt": "a" * (240 if i % 2 else 5)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on = ("--pair", pair_folders, "--prompts", path, "--max-new-tokens", 24, "--dtype", "float32")
    sentence = "2 prompts too long and left out: 1, 3."
    out = succeed("quickstart", *on, "--judge", untrained, "--json", figures)
    assert sentence in out
    assert {key: json.loads(figures.read_text())[key] for key in ("prompts", "left_out")} == {
        "prompts": 2, "left_out": ["1", "3"],
    }  # fmt: skip
    out = succeed("mine", *on, "--output", tmp_path / "l", "--per-answer", 4, "--rewrites", 0)
    assert "of 2 prompts in" in out
    assert sentence in out
    for mode in ("quality", "timing", "timing"):  # and started again
        out = succeed("bench", *on, "--rule", "stock", "--mode", mode, "--output", bench)
        assert sentence in out
        results = json.loads((bench / f"{mode}-results.json").read_text())[mode]
        assert (results["prompts"], results["left_out"]) == (2, ["1", "3"])
        assert "to 2 prompts of p.jsonl (2 more were too long)" in results["heading"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "\\ud800"}', "p.jsonl:2: `text` has half of a surrogate pair"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "p.jsonl:2: expected text or chat messages"),
        (b'{"prompt": "\xe9"}', "p.jsonl:2: this is not UTF-8 text"),
    ],
)
def test_rows_are_refused_before_models_load(fail, tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(options, "load_pair", None)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + row + b"\n")
    for command in (
        ("quickstart", "--judge", "x"),
        ("mine", "--output", tmp_path / "l"),
        ("bench", "--rule", "stock", "--output", tmp_path / "b"),
    ):
        assert message in fail(*command, "--pair", "no,models", "--prompts", path)


@pytest.mark.heavy
def test_folders_of_relative_paths_mean_the_same_elsewhere(
    succeed, judge, pair_folders, prompts_file, tmp_path, monkeypatch
):
    """Two parts look like a Hub id where the folder is not in sight: its owner must not be published as one."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, folder in zip(("target", "draft"), pair_folders.split(","), strict=True):
        shutil.copytree(folder, home / "kim" / name)
    shutil.copytree(judge, home / "kim" / "judge")
    monkeypatch.chdir(home)
    used = ("--pair", "kim/target,kim/draft", "--prompts", prompts_file, "--limit", 12)
    for command in (
        ("mine", *used, "--judge", "kim/judge", "--output", tmp_path / "labels", *MINE),
        ("bench", *used, "--rule", "judge:kim/judge=0.5", "--output", tmp_path / "bench", "--max-new-tokens", 4),
        ("quickstart", *used, "--judge", "kim/judge", "--json", tmp_path / "q.json", "--max-new-tokens", 4),
    ):
        succeed(*command)
    monkeypatch.chdir(elsewhere)
    for command in (
        ("labels", tmp_path / "labels"),
        ("add-layer", tmp_path / "labels", "--layer", 1, "--output", tmp_path / "midway"),
        ("train", "--labels", tmp_path / "labels", "--output_dir", tmp_path / "new", "--components", 4),
        ("card", judge, "--results", tmp_path / "q.json", "--bench", tmp_path / "bench"),
    ):
        succeed(*command)
    assert Judge.from_pretrained(tmp_path / "new").info.target == "./target"
    for folder in (tmp_path / "new", judge):
        for file in ("README.md", "config.json", "results.json"):
            assert not (folder / file).is_file() or "kim" not in (folder / file).read_text()
    assert "kim" not in public_file(tmp_path / "bench" / "quality-results.json")
