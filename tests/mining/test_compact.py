"""Labels without hidden states and prompts, and both added again."""

from dataclasses import replace

import numpy as np
import pytest

from hf_selfjudge import JudgeConfig, JudgeTrainer, load_labels, mine
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.judge.features import AFTER, BEFORE, STATES
from hf_selfjudge.mining.compact import compact_labels
from hf_selfjudge.mining.label_files import mining_of
from hf_selfjudge.mining.layers import add_layer_states, answers_of
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.training.model import new_judge
from tests.builders import MINING, PROMPTS, perturbed


LAYER = 1


@pytest.fixture
def labels(llama, tokenizer, tmp_path):
    target = llama[0]
    mine(Pair(target, perturbed(target, 0.05), tokenizer), PROMPTS, replace(MINING, layer=LAYER), tmp_path / "labels")
    return tmp_path / "labels"


def test_states_and_prompts_are_added_again(llama, tokenizer, labels, tmp_path):
    whole, small = load_labels(labels), compact_labels(labels, tmp_path / "small")
    assert small.features == whole.features
    dropped = [*STATES, "prompt_ids"]
    assert {*small["prompt_ids"]} == {*small["hidden_after"]} == {None}
    kept = [name for name in whole.column_names if name not in (*dropped, "source")]
    assert small.select_columns(kept).to_dict() == whole.select_columns(kept).to_dict()
    sizes = [sum(file.stat().st_size for file in folder.glob("*.parquet")) for folder in (labels, tmp_path / "small")]
    assert sizes[1] < sizes[0]
    again = add_layer_states(llama[0], tmp_path / "small", LAYER, tmp_path / "again", 4, PROMPTS, tokenizer)
    assert again["prompt_ids"][:] == whole["prompt_ids"][:]
    for name in (BEFORE, AFTER):
        np.testing.assert_allclose(again[name][:], whole[name][:], atol=2e-3, rtol=2e-3)


def test_new_shards_are_added(labels, tmp_path):
    first, *others = sorted(labels.glob("labels-*.parquet"))
    aside = {path: path.read_bytes() for path in others}
    for path in others:
        path.unlink()
    few = len(compact_labels(labels, tmp_path / "small"))
    written = (tmp_path / "small" / first.name).stat().st_mtime_ns
    for path, content in aside.items():
        path.write_bytes(content)
    assert few < len(compact_labels(labels, tmp_path / "small")) == len(load_labels(labels))
    assert (tmp_path / "small" / first.name).stat().st_mtime_ns == written


def test_mining_goes_on_after_compact_shards(llama, tokenizer, labels, tmp_path):
    """What was kept in a repository can be continued on another machine."""
    compact_labels(labels, tmp_path / "small")
    for path in (tmp_path / "small").glob("*-00001-of-*"):
        path.unlink()
    pair = Pair(llama[0], perturbed(llama[0], 0.05), tokenizer)
    rows = mine(pair, PROMPTS, replace(MINING, layer=LAYER), tmp_path / "small")
    missing = rows.data.column(STATES[0]).is_null().to_pylist()
    assert {*missing} == {True, False}
    columns = ["prompt_id", "position", "substitute", "rewritten_suffix"]
    assert rows.select_columns(columns).to_dict() == load_labels(labels).select_columns(columns).to_dict()
    # And be kept once more.
    compact_labels(tmp_path / "small", tmp_path / "again")
    states = add_layer_states(llama[0], tmp_path / "again", LAYER, tmp_path / "states", 4, PROMPTS, tokenizer)
    assert states["prompt_ids"][:] == load_labels(labels)["prompt_ids"][:]


def test_a_run_that_was_cut_off_goes_on(labels, tmp_path):
    whole = compact_labels(labels, tmp_path / "small").to_dict()
    first = min((tmp_path / "small").glob("labels-*.parquet"))
    first.unlink()
    first.with_name(f"{first.stem}.incomplete.parquet").write_bytes(b"half")  # as a kill leaves it
    assert compact_labels(labels, tmp_path / "small").to_dict() == whole


def test_what_is_missing_is_said(llama, tokenizer, labels, tmp_path):
    small = compact_labels(labels, tmp_path / "small")
    args = JudgeConfig(str(tmp_path / "judge"), components=2, max_steps=1, use_cpu=True, disable_tqdm=True)
    with pytest.raises(ValueError, match="`labels` have no hidden states. Add them: `hf-selfjudge add-layer"):
        JudgeTrainer(new_judge(mining_of(small), args), args, train_dataset=small)
    with pytest.raises(ValueError, match="`labels` come without the tokens of their prompts"):
        answers_of(small, np.zeros(len(small)))
    for prompts in (None, [Prompt("other", "Hi")]):
        with pytest.raises(ValueError, match="`prompts`: the labels come without the tokens of their prompts, and "):
            add_layer_states(llama[0], tmp_path / "small", LAYER, tmp_path / "again", 4, prompts, tokenizer)
    changed = [replace(prompt, text=f"{prompt.text}!", messages=None) for prompt in PROMPTS]
    with pytest.raises(ValueError, match="`prompts` have the ids of those that .* was mined on, but other tokens"):
        add_layer_states(llama[0], tmp_path / "small", LAYER, tmp_path / "again", 4, changed, tokenizer)
    with pytest.raises(ValueError, match="`output` is the folder of the labels"):
        compact_labels(labels, labels)
    other = tmp_path / "other"
    target = llama[0]
    mine(Pair(target, perturbed(target, 0.05), tokenizer), PROMPTS, MINING, other)
    with pytest.raises(ValueError, match="has labels that were mined in another way"):
        compact_labels(other, tmp_path / "small")
