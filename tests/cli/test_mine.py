"""`mine`, `add-layer`, `labels` and `train`."""

import copy
import json
import string
from types import SimpleNamespace

import pandas
import pytest

from hf_selfjudge import load_labels
from hf_selfjudge.cli import labels, options
from hf_selfjudge.mining.label_files import mining_of
from hf_selfjudge.utils import processes
from tests.builders import tiny_tokenizer
from tests.cli.conftest import MINE


def test_labels_in_tables_and_in_context(succeed, mined, tmp_path):
    out = succeed("labels", mined / "labels", "--examples", 2, "--json", tmp_path / "t.json")
    assert "48 substitutions (48 rewritten) of 12 prompts" in out
    for words in ("by category", "by token replaced", "without a rewrite", "harmless", "target "):
        assert words in out
    tables = json.loads((tmp_path / "t.json").read_text())
    assert sum(row["substitutions"] for row in tables["rates"]["kind"]) == 48
    assert {row["score"] for row in tables["predictors"]} >= {"margin", "likelihood", "confidence"}
    assert not list(tmp_path.glob("*.incomplete*"))


def test_ceiling(succeed, fail, mined, prompts_file, tmp_path, monkeypatch):
    command = ("ceiling", mined / "labels", "--prompts", mined / "prompts.jsonl")
    assert "no label in" in fail(*command)  # random models write no numbers
    rows = [{"category": "c", "prompt_id": str(i), "first": i % 2, "again": i > 4} for i in range(9)]
    asked = []
    monkeypatch.setattr(labels, "label_again", lambda *how: asked.append(how) or pandas.DataFrame(rows))
    out = succeed(*command, "--substitutions", 9, "--dtype", "float32", "--json", tmp_path / "c.json")
    assert "labels of the same substitutions, made twice" in out
    assert [row["category"] for row in json.loads((tmp_path / "c.json").read_text())["agreement"]] == ["c", "all"]
    assert asked[0][4:] == (9, False, 32, 0)


def test_add_layer(succeed, fail, mined, tmp_path):
    out = succeed("add-layer", mined / "labels", "--layer", 1, "--output", tmp_path / "midway")
    assert json.loads((tmp_path / "midway" / "mining.json").read_text())["reread_dtype"] == "float32"  # as mined
    assert "with the hidden states that enter layer 1" in out
    assert mining_of(load_labels(tmp_path / "midway"))["layer"] == 1
    message = fail("add-layer", mined / "labels", "--layer", 9, "--output", tmp_path / "other")
    assert "`layer` must be above 0 and below 2" in message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("add-layer", "--layer", 1, "--output", "o"), "`add-layer` does not share its work, and 2 processes were"),
        (("ceiling", "--prompts", "p"), "`ceiling` does not share its work, and 2 processes were started"),
    ],
)
def test_work_that_is_not_shared_needs_one_process(fail, mined, monkeypatch, command, message):
    monkeypatch.setattr(processes, "this_process", lambda: SimpleNamespace(num_processes=2))
    assert message in fail(*command, mined / "labels")


def test_several_processes_each_have_a_whole_target(fail, pair_folders, prompts_file, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "this_process", lambda: SimpleNamespace(num_processes=2))
    command = ("mine", "--pair", pair_folders, "--prompts", prompts_file, "--output", tmp_path / "o", *MINE)
    assert "`--device-map` would put 2 targets on the same devices" in fail(*command, "--device-map", "auto")


def test_compact(succeed, fail, mined, prompts_file, tmp_path):
    out = succeed("compact", mined / "labels", "--output", tmp_path / "small")
    assert f"{len(load_labels(mined / 'labels'))} substitutions in {tmp_path / 'small'}, 0." in out
    again = ("add-layer", tmp_path / "small", "--layer", 1, "--output", tmp_path / "again")
    assert "the labels come without the tokens of their prompts" in fail(*again)
    succeed(*again, "--prompts", prompts_file)
    assert load_labels(tmp_path / "again")["prompt_ids"][:] == load_labels(mined / "labels")["prompt_ids"][:]


def test_mining_along_judged_text(succeed, judge, pair_folders, prompts_file, tmp_path):
    out = succeed(
        *("mine", "--pair", pair_folders, "--prompts", prompts_file, "--limit", 3, "--output", tmp_path / "on"),
        *("--judge", judge, "--threshold", 0.9, "--shuffle", "--ask", *MINE),
    )
    rows = load_labels(tmp_path / "on")
    assert f"{len(rows)} substitutions" in out
    assert "of 3 prompts in" in out
    assert {*rows["own"]} == {False}
    record = json.loads((tmp_path / "on" / "mining.json").read_text())
    assert record["written_by"].startswith(f"{judge}, weights ")
    assert record["written_by"].endswith(", threshold 0.9")
    assert record["prompts"] == 3
    assert record["prompts_options"] == {"limit": 3, "shuffle": 0}


def test_without_rewrites(succeed, fail, pair_folders, prompts_file, tmp_path):
    """Labels can be looked at; there is nothing to train on."""
    on = ("--pair", pair_folders, "--prompts", prompts_file, "--limit", 3)
    succeed("mine", *on, "--output", tmp_path / "l", *MINE, "--rewrites", 0)
    succeed("labels", tmp_path / "l", "--json", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["predictors"] == []
    message = fail("train", "--labels", tmp_path / "l", "--output_dir", tmp_path / "j")
    assert "`labels`: 'changed' is known of no row" in message


def test_standard_input_is_for_one_process(fail, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "this_process", lambda: SimpleNamespace(num_processes=2))
    message = fail("mine", "--prompts", "-", "--output", tmp_path / "l")
    assert "several processes cannot share standard input" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufefflabels: [nowhere]".encode(), "nowhere has no mining.json"),
        ("labels: [nowhere]".encode("utf-16"), "judge.yaml:1: this is not UTF-8 text, but perhaps UTF-16"),
        (b"folds: 2\nlabels: [\xe9]", "judge.yaml:2: this is not UTF-8 text, but perhaps Latin-1"),
        (b"labels: [nowhere", "`config`: "),
        (b"labels: [nowhere]\nscalars: null", "`scalars` must be 'none' or a list of margin, "),
        (b"labels: [nowhere]\nscalars: margin\nstates: none", "nowhere has no mining.json"),
        (b"labels: [nowhere]\ndo_eval: true", "`do_eval` needs labels to evaluate on"),
        (b"labels: [nowhere]\ndo_predict: true", "`do_predict` needs labels to evaluate on"),
    ],
)
def test_the_config_of_training_is_read_as_text(fail, tmp_path, content, message):
    (tmp_path / "judge.yaml").write_bytes(content)
    assert message in fail("train", "--config", tmp_path / "judge.yaml", "--output_dir", tmp_path / "j")


def test_an_option_that_needs_another_package(fail, mined, tmp_path, monkeypatch):
    def missing(*arguments):
        raise ImportError("Please install it.")

    monkeypatch.setattr("transformers.Trainer.create_optimizer", missing)
    message = fail("train", "--labels", mined / "labels", "--output_dir", tmp_path / "other")
    assert "hf-selfjudge: Please install it." in message


def test_pairs_whose_embeddings_are_padded_differently(succeed, fail, llama, tokenizer, prompts_file, tmp_path):
    """One tokenizer, 64 and 72 rows of embeddings, as in one family; and another tokenizer, which is refused."""
    target, draft = llama[0], copy.deepcopy(llama[1])
    draft.resize_token_embeddings(72, mean_resizing=False)
    other = tiny_tokenizer("zyx" + string.digits)
    for name, model, words in (("target", target, tokenizer), ("draft", draft, tokenizer), ("other", draft, other)):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    on = ("--pair", f"{tmp_path / 'target'},{tmp_path / 'draft'}", "--prompts", prompts_file, "--limit", 3)
    succeed("mine", *on, "--output", tmp_path / "l", *MINE)
    assert len(load_labels(tmp_path / "l")) > 0
    rules = ("--rule", "margin=1", "--rule", "greedy", "--rule", "draft")
    succeed("bench", *on, "--output", tmp_path / "b", "--dtype", "float32", "--max-new-tokens", 16, *rules)
    lines = [json.loads(line) for line in (tmp_path / "b" / "quality.jsonl").read_text().splitlines()]
    tokens = {(line["method"], line["prompt"]): line["tokens"] for line in lines}
    prompts = {prompt for _, prompt in tokens}
    assert all(tokens["greedy", prompt] == tokens["lossless", prompt] for prompt in prompts)
    pair = f"{tmp_path / 'target'},{tmp_path / 'other'}"
    message = fail("mine", "--pair", pair, "--prompts", prompts_file, "--output", tmp_path / "l2", *MINE)
    assert "has another tokenizer than" in message
