"""Judges that look at states midway in the target: labels read again there, and decoding that sees the same."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig

from hf_selfjudge import Judge, JudgeConfig, JudgedModel, JudgeTrainer, load_labels, mine
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.judge.features import AFTER, AHEAD, BEFORE, STATES
from hf_selfjudge.mining import job
from hf_selfjudge.mining import labels as labels_module
from hf_selfjudge.mining.label_files import mining_of
from hf_selfjudge.mining.layers import add_layer_states
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.models.tokens import before_special
from hf_selfjudge.training.model import TargetWithJudge, new_judge
from hf_selfjudge.training.script import ScriptArguments, main
from tests.builders import MINING, PROMPTS, build, midway_judge, perturbed


LAYER = 1


def states(model, ids):
    """What enters the layer, as transformers tells it."""
    with torch.no_grad():
        output = model(input_ids=torch.as_tensor(ids).view(1, -1), output_hidden_states=True)
    return output.hidden_states[LAYER][0]


def mined(target, folder, tokenizer, prompts=PROMPTS, **options):
    return mine(Pair(target, perturbed(target, 0.05), tokenizer), prompts, replace(MINING, **options), folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_each_row_gets_the_states_of_its_text(architecture, tokenizer, tmp_path):
    target, folder = build(architecture), tmp_path / "labels [1]"
    before = mined(target, folder, tokenizer)
    states(target, [3])  # a forward with `output_hidden_states` changes nothing
    after = add_layer_states(target, folder, LAYER, tmp_path / "midway", batch=2)
    assert [mining_of(labels)["layer"] for labels in (before, after)] == [None, LAYER]
    assert before.features == after.features
    others = (*STATES, "source")
    assert before.remove_columns(others).to_dict() == after.remove_columns(others).to_dict()
    for row in after:
        text = [*row["prompt_ids"], *row["answer_ids"][: row["position"]], row["substitute"]]
        expected = states(target, text)[-2:].half().numpy()
        found = np.array([row[name] for name in (BEFORE, AFTER)])
        assert row[AHEAD] is None  # it is no round
        np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
    assert not np.allclose(before["hidden_after"][:], after["hidden_after"][:], atol=1e-2)


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_states_of_a_layer_are_mined_at_once(architecture, rounds, tokenizer, tmp_path):
    """The same labels as with `add_layer_states` afterwards."""
    target = build(architecture)
    mined(target, tmp_path / "labels", tokenizer, rounds=rounds)
    after = add_layer_states(target, tmp_path / "labels", LAYER, tmp_path / "after")
    at_once = mined(target, tmp_path / "at-once", tokenizer, layer=LAYER, rounds=rounds)
    assert {drafted is not None for drafted in at_once["drafted"]} == {rounds > 0}
    assert mining_of(at_once)["layer"] == LAYER
    others = (*STATES, "source")
    assert at_once.remove_columns(others).to_dict() == after.remove_columns(others).to_dict()
    for name in STATES if rounds else (BEFORE, AFTER):
        np.testing.assert_allclose(at_once[name][:], after[name][:], atol=2e-3, rtol=2e-3)
    if rounds:
        for row in at_once:
            start = len(row["answer_ids"]) - row["drafted"]
            end = start + before_special(row["answer_ids"][start:], mining_of(at_once)["special_tokens"])
            text = [*row["prompt_ids"], *row["answer_ids"][:end]]
            ahead = states(target, text)[len(row["prompt_ids"]) + row["position"] + 1 :]
            expected = ahead.mean(0) if len(ahead) else np.array(row[AFTER])
            np.testing.assert_allclose(row[AHEAD], expected, atol=2e-3, rtol=2e-3)
        assert np.any(np.array(at_once[AHEAD][:]) != np.array(at_once[AFTER][:]))
    with pytest.raises(ValueError, match="`layer` must be above 0 and below 2"):
        mined(target, tmp_path / "other", tokenizer, layer=2)


def test_a_layer_of_a_model_that_does_not_pack(tokenizer, tmp_path, monkeypatch):
    """Each substitution in a cache of its own gives the same states."""
    target = build("llama")
    packed = mined(target, tmp_path / "packed", tokenizer, layer=LAYER)
    for module in (job, labels_module):
        monkeypatch.setattr(module, "packs", lambda model: False)
    alone = mined(target, tmp_path / "alone", tokenizer, layer=LAYER)
    for name in (BEFORE, AFTER):
        np.testing.assert_allclose(packed[name][:], alone[name][:], atol=2e-3, rtol=2e-3)


def test_a_run_that_was_cut_off_goes_on(llama, tokenizer, tmp_path):
    target, folder, output = llama[0], tmp_path / "labels", tmp_path / "midway"
    mined(target, folder, tokenizer)
    whole = add_layer_states(target, folder, LAYER, output).to_dict()
    first, second = sorted(output.glob("labels-*.parquet"))
    shutil.rmtree(output / "cache")
    second.unlink()
    second.with_name(f"{second.stem}.incomplete.parquet").write_bytes(b"half")  # as a kill leaves it
    assert len(load_labels(output)) == 16
    kept = first.stat().st_mtime_ns
    assert add_layer_states(target, folder, LAYER, output).to_dict() == whole
    assert first.stat().st_mtime_ns == kept
    assert {path.name for path in output.glob("labels-*.json")} == {path.name for path in folder.glob("labels-*.json")}


@pytest.mark.parametrize(("rounds", "states_used"), [(0, (BEFORE, AFTER)), (3, STATES)])
def test_a_judge_of_these_labels_looks_there(rounds, states_used, llama, tokenizer, tmp_path):
    """Trained on labels that were read again, in a file and back, and through the model on the same text."""
    target, folder = llama[0], tmp_path / "midway"
    mined(target, tmp_path / "labels", tokenizer, rounds=rounds)
    labels = add_layer_states(target, tmp_path / "labels", LAYER, folder)
    args = JudgeConfig(str(tmp_path / "judge"), components=2, max_steps=3, use_cpu=True, disable_tqdm=True)
    trainer = JudgeTrainer(args=args, train_dataset=labels)
    assert trainer.judge.info.states == [*states_used]
    trainer.train()
    trainer.save_model()
    judge = Judge.from_pretrained(tmp_path / "judge")
    assert judge.info.layer == LAYER
    through = JudgeTrainer(TargetWithJudge(target, judge), args, train_dataset=labels, processing_class=tokenizer)
    np.testing.assert_allclose(through.odds(labels), trainer.odds(labels), atol=2e-2)


@pytest.mark.parametrize("how", ["draft", "processor", "early exit"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_judge_sees_the_states_of_the_text(architecture, how, prompt):
    """In every round, whatever was dropped before, and whoever ran the target's layers in between."""
    target, seen = build(architecture), []
    draft = {"assistant_model": perturbed(target, 0.05)}
    options = {
        "draft": draft,
        "processor": draft | {"logits_processor": [lambda ids, scores: scores + target(ids[:, -4:]).logits[:, -1]]},
        "early exit": {"assistant_early_exit": 1},
    }[how]

    class Noting(JudgeRule):
        def keep(self, mismatches):
            kept = super().keep(mismatches)
            reached = int(kept.cumprod(0).sum()) + 1  # what comes after a rejected one is not in the text
            rows = zip(mismatches.positions.tolist(), mismatches.tokens.tolist(), mismatches.hidden, strict=True)
            seen.extend([*rows][:reached])
            return kept

    judged = JudgedModel(target, Noting(midway_judge(target), 0.5))
    output = judged.generate(prompt, max_new_tokens=40, do_sample=False, **options)
    assert len(seen) > 2
    for position, candidate, hidden in seen:
        text = torch.cat([output[0, : prompt.shape[1] + position], torch.tensor([candidate])])
        torch.testing.assert_close(hidden[:2], states(target, text)[-2:], atol=1e-4, rtol=1e-4)


def test_batches_give_what_each_gives_alone(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(midway_judge(target), 0.5))
    ids = torch.cat([prompt, prompt.roll(3, 1), prompt.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padding on the left
    how = {"assistant_model": draft, "max_new_tokens": 30, "do_sample": False}
    together = judged.generate(ids, attention_mask=mask, **how)
    assert judged.stats.judged
    for row, shown, answer in zip(ids, mask.bool(), together, strict=True):
        alone = judged.generate(row[shown][None], **how)[0]
        assert torch.equal(alone, answer[-len(alone) :])


def test_a_shard_without_substitutions_is_kept(llama, tokenizer, tmp_path):
    target, folder = llama[0], tmp_path / "labels"
    rows = mined(target, folder, tokenizer)
    first = min(folder.glob("labels-*.parquet"))
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(first).slice(0, 0), first)
    left = add_layer_states(target, folder, LAYER, tmp_path / "midway")
    assert 0 < len(left) == len(load_labels(folder)) < len(rows)


def test_states_too_large_for_the_file_are_refused(llama, tokenizer, tmp_path):
    target = build("llama")
    mined(target, tmp_path / "labels", tokenizer)
    with torch.no_grad():
        target.model.layers[LAYER - 1].mlp.down_proj.weight.mul_(1e6)
    made = json.loads((tmp_path / "labels" / "mining.json").read_text())
    (tmp_path / "labels" / "mining.json").write_text(json.dumps(made | {"target_fingerprint": fingerprint(target)}))
    with pytest.raises(ValueError, match="`layer`: what enters layer 1 is too large for fp16"):
        add_layer_states(target, tmp_path / "labels", LAYER, tmp_path / "midway")
    with pytest.raises(ValueError, match="`layer`: what enters layer 1 is too large for fp16"):
        mined(target, tmp_path / "at-once", tokenizer, layer=LAYER)
    assert not [*(tmp_path / "midway").glob("*.parquet"), *(tmp_path / "at-once").glob("*.parquet")]


def test_what_does_not_fit_is_refused(llama, tokenizer, tmp_path):
    target, gpt2, folder = llama[0], build("gpt2"), tmp_path / "labels"
    mined(target, folder, tokenizer)
    with pytest.raises(ValueError, match="`layer` must be above 0 and below 2, the layers of LlamaForCausalLM, got 2"):
        add_layer_states(target, folder, 2, tmp_path / "midway")
    with pytest.raises(ValueError, match="`output` is the folder of the labels"):
        add_layer_states(target, folder, LAYER, folder)
    with pytest.raises(ValueError, match="`folder`: the labels are of other weights than `target`"):
        add_layer_states(build("qwen2"), folder, LAYER, tmp_path / "midway")
    with pytest.raises(ValueError, match="`batch` must be 1 or more, got 0"):
        add_layer_states(target, folder, LAYER, tmp_path / "midway", batch=0)
    with pytest.raises(ValueError, match=r"`target` \(GPT2LMHeadModel\) is not a decoder with `layers`"):
        JudgedModel(gpt2, JudgeRule(midway_judge(gpt2), 0.5))
    assert not (tmp_path / "midway").exists()
    add_layer_states(target, folder, LAYER, tmp_path / "midway")
    with pytest.raises(ValueError, match=r"different models or layers \(layer: None and 1\)"):
        load_labels([folder, tmp_path / "midway"])
    with pytest.raises(ValueError, match=r"made with other settings \(layer: 1 there, None now"):
        mined(target, tmp_path / "midway", tokenizer)


def test_judge_and_labels_are_of_one_layer(llama, tokenizer, tmp_path):
    target, folder, midway = llama[0], tmp_path / "labels", tmp_path / "midway"
    last = mined(target, folder, tokenizer, [*PROMPTS, Prompt("d", "is it not so?")])  # enough for two folds
    rows = add_layer_states(target, folder, LAYER, midway)
    args = JudgeConfig(str(tmp_path / "judge"), components=2, max_steps=1, use_cpu=True, disable_tqdm=True)
    for labels, other in ((rows, last), (last, rows)):
        with pytest.raises(ValueError, match="The labels have hidden states of layer"):
            JudgeTrainer(new_judge(mining_of(other), args), args, train_dataset=labels)
    with pytest.raises(ValueError, match="The labels have hidden states of layer None, the judge looks at layer 1"):
        JudgeTrainer(new_judge(mining_of(rows), args), args, train_dataset=rows, eval_dataset=last)
    with pytest.raises(ValueError, match=r"different models or layers \(layer: None and 1\)"):
        JudgeTrainer(new_judge(mining_of(last), args), args, train_dataset=concatenate_datasets([last, rows]))
    made = JudgeTrainer(build("llama"), args, train_dataset=rows, processing_class=tokenizer)
    assert made.judge.info.layer == LAYER
    adapter = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    with pytest.raises(ValueError, match="`judge` looks at what enters layer 1, but an adapter changes"):
        JudgeTrainer(build("llama"), args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    with pytest.raises(ValueError, match="`lora_layers`: an adapter changes the last hidden states"):
        main(ScriptArguments([str(midway)], folds=2, lora_layers=1), args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, "layer is 0, not the number of a layer"),
        ({"depth": 1}, "this version of hf_selfjudge does not know depth"),
        ({"layer": True}, "layer is True, not the number of a layer"),
        (
            {"layer": 1, "adapter": True},
            "it has an adapter, .* and uses layer 1",
        ),
    ],
)
def test_a_damaged_config_is_refused(change, message, tmp_path):
    midway_judge(build("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Judge.from_pretrained(tmp_path)
