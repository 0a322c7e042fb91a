"""Training a judge on labels with a planted signal, on features and through the model."""

import copy
import doctest
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_selfjudge import Judge, JudgeConfig, JudgeTrainer, load_labels
from hf_selfjudge.forward.tap import ForwardTap
from hf_selfjudge.hub.results import add_results
from hf_selfjudge.judge.features import AFTER, AHEAD, BEFORE, SCALARS, STATES
from hf_selfjudge.judge.shipped import HUB_CARDS, SHIPPED, shipped_judge
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.mining.label_files import mining_of, mining_records
from hf_selfjudge.mining.layers import DataCollatorForJudge, answers_of
from hf_selfjudge.models.cpu import HalfLinear
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.models.pair import DRAFT_MODEL, LOOKUP, parse_pair
from hf_selfjudge.scoring.statistics import auc
from hf_selfjudge.training import script as training
from hf_selfjudge.training.data import soft_labels
from hf_selfjudge.training.evaluation import TRAINED_ON_OTHERS, calibrate, reliability, training_free
from hf_selfjudge.training.model import TargetWithJudge, new_judge
from hf_selfjudge.training.script import ScriptArguments, main, make_parser
from hf_selfjudge.utils.names import public_mining
from tests.builders import (
    HIDDEN,
    LABELS_HIDDEN,
    RESULTS,
    TRAINING,
    Padding,
    build,
    card_of,
    lora,
    through,
    write_answer_labels,
    write_labels,
)
from tests.builders import training_config as config


def script(*folders, **options):
    return ScriptArguments([str(folder) for folder in folders], **{"resamples": 50} | options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    base = tmp_path_factory.mktemp("fit")
    folder = write_labels(base / "labels")
    return folder, main(script(folder), config(base / "judge")), base / "judge"


def test_the_planted_signal_is_found(fitted):
    _, judge, _ = fitted
    measured = judge.info.training["held_out"]
    value, low, high = measured["scores"]["judge"]["auc_changed_answer"]
    assert low <= value <= high
    assert low > 0.8 > measured["scores"]["margin"]["auc_changed_answer"][0]
    assert measured["log_loss"] < measured["log_loss_of_the_mean"]
    assert measured["scores"]["judge"]["mean_label_among_accepted"]["0.5"] < measured["mean_label"] / 2
    assert measured["scores"]["judge"]["changed_among_accepted"]["0.75"] < measured["changed_answers"] / 120 / 2
    assert (measured["rows"], measured["rows_checked"]) == (240, 120)


def test_what_was_trained_is_on_disk(fitted):
    _, judge, folder = fitted
    loaded = Judge.from_pretrained(folder)
    assert loaded.info == judge.info
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), judge.state_dict().values(), strict=True)
    )
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "reliability.png",
    }


@pytest.mark.heavy
def test_the_threshold_accepts_the_share_asked_for(fitted, tmp_path):
    folder, judge, _ = fitted
    wide = main(script(folder, accept_share=0.9), config(tmp_path))
    assert 0 < judge.info.threshold.limit < wide.info.threshold.limit < 1


@pytest.mark.heavy
def test_training_again_gives_the_same(fitted, tmp_path):
    folder, judge, _ = fitted
    again = main(script(folder), config(tmp_path))
    assert again.info == judge.info
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), judge.state_dict().values(), strict=True)
    )


def test_features_are_whitened(fitted):
    folder, judge, _ = fitted
    rows = load_labels(folder).with_format("torch")
    hidden = torch.stack([torch.stack(list(rows[name][:])) for name in judge.info.states], 1).float()
    scalars = (torch.stack(list(rows["scalars"][:])) - judge.scalar_mean) / judge.scalar_scale
    parts = torch.einsum("nsh,shc->nsc", hidden - judge.hidden_mean, judge.projection)
    for values in (scalars, *parts.unbind(1)):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones(values.shape[1]), atol=1e-2, rtol=0)


@pytest.mark.heavy
@pytest.mark.parametrize("looks_at", [{"scalars": ["margin"]}, {"states": ["hidden_after"]}, {"states": []}])
def test_a_judge_uses_only_its_features(fitted, tmp_path, looks_at):
    folder, _, _ = fitted
    judge = main(script(folder, resamples=2), config(tmp_path, **looks_at))
    full = {"scalars": list(SCALARS), "states": [BEFORE, AFTER]} | looks_at
    assert judge.head.in_features == len(full["scalars"]) + 20 * len(full["states"])
    scalars, hidden = torch.randn(5, len(SCALARS)), torch.randn(5, len(STATES), LABELS_HIDDEN)
    before = Judge.from_pretrained(tmp_path)(scalars, hidden)
    scalars[:, [SCALARS.index(name) for name in SCALARS if name not in full["scalars"]]] += 1
    hidden[:, [STATES.index(name) for name in STATES if name not in full["states"]]] += 1
    assert torch.equal(judge(scalars, hidden), before)


def test_labels(fitted, tmp_path):
    labels = load_labels(fitted[0])
    changed, flipped, lost = (
        soft_labels(labels, config(tmp_path, label=name)) for name in ("changed", "flipped", "lost")
    )
    known = ~np.isnan(flipped)
    assert known.sum() == 120
    np.testing.assert_array_equal(changed[known], flipped[known])
    np.testing.assert_allclose(changed[~known], lost[~known], rtol=1e-6)
    likelihood = np.array(labels["likelihood"][:])
    np.testing.assert_array_equal(
        soft_labels(labels, config(tmp_path, label="likelihood", label_threshold=0.7)), likelihood > 0.7
    )
    assert soft_labels(labels, config(tmp_path, label="likelihood")).mean() == 0.5
    with pytest.raises(ValueError, match="'says_no' is known of no row"):
        JudgeTrainer(
            args=config(tmp_path, label="says_no"),
            train_dataset=labels,
        )


@pytest.mark.heavy
def test_the_published_label_needs_no_rewrite(fitted, tmp_path):
    """SelfJudge's code: logistic regression on the hidden state after the token, `confidence` above a threshold."""
    args = config(tmp_path / "judge", label="confidence", states=["hidden_after"], scalars=["none"])
    judge = main(script(fitted[0]), args)
    assert judge.info.training["held_out"]["mean_label"] == 0.5
    assert "--label confidence --label_threshold" in (tmp_path / "judge/README.md").read_text()


def test_calibration_finds_slope_and_intercept():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=20000) * 2
    truth = 1 / (1 + np.exp(-(0.5 * odds - 1)))
    slope, intercept = calibrate(odds, truth)
    assert (slope, intercept) == (pytest.approx(0.5, abs=1e-3), pytest.approx(-1, abs=1e-3))
    rows = reliability(truth, (rng.random(20000) < truth).astype(float))
    assert sum(row["rows"] for row in rows) == 20000
    assert all(abs(row["probability"] - row["label"]) < 0.05 for row in rows)


def with_column(labels, name, values):
    """Labels in which one column has other values."""
    return labels.remove_columns(name).add_column(name, values)


@pytest.mark.heavy
def test_each_category_is_measured_also_by_a_judge_of_the_others(fitted, tmp_path, monkeypatch):
    labels = load_labels(fitted[0])
    odd = np.arange(len(labels)) // 6 % 4 >= 2  # two of each four prompts, one of which is checked
    labels = with_column(labels, "category", np.where(odd, "odd", "even").tolist())
    monkeypatch.setattr(training, "load_labels", lambda folders: labels)
    judge = main(script("labels", leave_one_category_out=True), config(tmp_path / "judge"))
    measured = judge.info.training["held_out"]
    assert {name: part["rows"] for name, part in measured["by_category"].items()} == {"even": 60, "odd": 60}
    for name, rows in (("odd", odd), ("even", ~odd)):
        other = JudgeTrainer(args=config(tmp_path / name), train_dataset=labels.select(np.flatnonzero(~rows)))
        other.train()
        rows = np.flatnonzero(rows & ~np.isnan(np.array(labels["flipped"][:], dtype=float)))
        expected = auc(np.array(labels["flipped"][:])[rows].astype(float), other.odds(labels.select(rows)))
        scores = measured["by_category"][name]["scores"]
        assert scores[TRAINED_ON_OTHERS]["auc_changed_answer"][0] == pytest.approx(expected)
        assert scores["judge"]["auc_changed_answer"][0] != scores[TRAINED_ON_OTHERS]["auc_changed_answer"][0]
    assert TRAINED_ON_OTHERS not in measured["scores"]
    for score, value in measured["within_categories"].items():
        parts = [part["scores"][score]["auc_changed_answer"][0] for part in measured["by_category"].values()]
        assert min(parts) <= value[0] <= max(parts)
    card = (tmp_path / "judge/README.md").read_text()
    assert "| category | prompts | substitutions | changed | judge | judge of the other categories | margin |" in card
    assert "| odd | 10 | 60 |" in card
    assert "--accept_share 0.5 --leave_one_category_out true" in card


def test_what_was_held_out_is_named(fitted, tmp_path, monkeypatch):
    """All labels of one category are 0, so that nothing can be learned from them alone."""
    labels = load_labels(fitted[0])
    labels = labels.select(np.flatnonzero(np.array(labels["check"][:]) == "number"))
    same = np.arange(len(labels)) % 2 == 0
    labels = with_column(labels, "category", np.where(same, "same", "mixed").tolist())
    labels = with_column(labels, "changed", np.where(same, 0.0, labels["changed"][:]).tolist())
    monkeypatch.setattr(training, "load_labels", lambda folders: labels)
    with pytest.raises(ValueError, match=r"\(Held out was the category 'mixed'\.\)"):
        main(script("labels", folds=2, leave_one_category_out=True), config(tmp_path, max_steps=2))


def test_one_category_cannot_be_left_out(fitted, tmp_path):
    with pytest.raises(ValueError, match="`leave_one_category_out`: all labels are of one category, '-'"):
        main(script(fitted[0], leave_one_category_out=True), config(tmp_path))


def test_look_ahead_counts_the_candidates_that_match_after_a_mismatch(fitted):
    labels = load_labels(fitted[0])
    assert "look-ahead" not in training_free(labels)
    # Rounds of ten candidates.
    for name, value in {"drafted": [10], "answer_ids": [[3] * 10], "position": [0, 2, 3, 4, 7, 8]}.items():
        labels = with_column(labels, name, value * (len(labels) // len(value)))
    np.testing.assert_array_equal(training_free(labels)["look-ahead"], [-1, 0, 0, -2, 0, -1] * 40)


# -- the shape of TRL's trainers -----------------------------------------------------------------------------------


@pytest.fixture
def target():
    return build("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Labels whose answers differ, of the tiny target."""
    folder = tmp_path_factory.mktemp("answers") / "labels"
    return load_labels(write_answer_labels(folder, build("llama", num_hidden_layers=3)))


def test_every_trainable_parameter_changes_and_every_other_does_not(target, answers, tmp_path):
    trainer = through(target, answers, tmp_path, lora())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {name.split(".")[-3] for name in trainable if "lora" in name} == {"lora_A", "lora_B"}
    assert {name for name in trainable if "lora" not in name} == {"judge.head.weight", "judge.head.bias"}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) == (name not in trainable), name


def test_the_head_alone_through_the_model(target, answers, tmp_path):
    trainer = through(target, answers, tmp_path)
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        "judge.head.weight",
        "judge.head.bias",
    }
    trainer.train()
    assert trainer.judge.head.weight.any()


@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_equals_uninterrupted(target, answers, tmp_path, adapter):
    def run(folder, **options):
        own = build("llama", num_hidden_layers=3)
        return through(own, answers, folder, lora() if adapter else None, **options)

    whole = run(tmp_path / "whole")
    whole.train()
    first = run(tmp_path / "parts", save_strategy="steps", save_steps=3)
    first.train()
    assert (tmp_path / "parts/checkpoint-3/adapter_model.safetensors").is_file() == adapter
    second = run(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_substitutes_see_what_they_would_see_alone(target, answers, tmp_path):
    """Packed, padded and beside other answers, each state is that of the text with the substitute."""
    judge = new_judge(mining_of(answers), config(tmp_path, components=4))
    rows = answers_of(answers, np.array(answers["changed"][:]))
    batch = DataCollatorForJudge(0)([rows[i] for i in range(3)])
    seen = []
    judge.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    TargetWithJudge(target, judge)(**{name: value for name, value in batch.items() if name != "labels"})
    states = seen[0].view(3, -1, len(STATES), HIDDEN)
    for i in range(3):
        for s, (place, token) in enumerate(zip(rows[i]["places"], rows[i]["substitutes"], strict=True)):
            text, alone = [*rows[i]["input_ids"][:place], token], []
            with ForwardTap(target, lambda hidden, _, alone=alone: alone.append(hidden[0, -2:])):
                target(input_ids=torch.tensor([text]))
            torch.testing.assert_close(states[i, s, :2], alone[0], atol=1e-4, rtol=1e-4)


def test_the_collator_gives_what_its_docstring_says():
    text = DataCollatorForJudge.__doc__.replace("```python", "").replace("```", "")
    result = doctest.DocTestRunner().run(
        doctest.DocTestParser().get_doctest(text, {}, "DataCollatorForJudge", None, 0)
    )
    assert result.failed == 0
    assert result.attempted > 3


def test_the_script_trains_an_adapter(tmp_path, monkeypatch):
    """After the head, on the same labels; each fold begins with the target as it was."""
    target = build("llama", num_hidden_layers=3)
    before = {name: value.clone() for name, value in target.named_parameters()}
    monkeypatch.setattr(training, "load_model", lambda reference, dtype: (target, Padding()))
    folder = write_answer_labels(tmp_path / "labels", target)
    options = {"folds": 2, "lora_layers": 2, "lora_r": 2, "lora_epochs": 2.0, "lora_learning_rate": 0.01}
    # Only the adapter's training reads text.
    of_text = {"activation_checkpointing": True, "train_sampling_strategy": "group_by_length"}
    with pytest.raises(ValueError, match="`lora_layers` is 4, but the target has 3 layers"):
        main(script(folder, folds=2, lora_layers=4), config(tmp_path / "judge", components=4))
    judge = main(script(folder, **options), config(tmp_path / "judge", components=4, **of_text))
    loaded = Judge.from_pretrained(tmp_path / "judge")
    assert loaded.info == judge.info
    assert {layer for layer, _ in loaded.adapter.products()} == {1, 2}
    assert all(sides["B"].any() for sides in loaded.adapter.products().values())
    assert "--lora_layers 2 --lora_learning_rate 0.01 --lora_modules q_proj v_proj --lora_r 2" in (
        tmp_path / "judge/README.md"
    ).read_text().replace("--lora_batch 4 --lora_epochs 2.0 ", "")
    assert judge.info.training["held_out"]["rows"] == 36
    for name, value in target.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.heavy
def test_two_processes_train_what_one_trains(fitted, tmp_path):
    """A launcher shares the batches: a step on twice half of the rows is a step on all."""
    folder, _, _ = fitted
    options, rows = {"components": 4, "max_steps": 30}, 240
    one = main(script(folder, resamples=2), config(tmp_path / "one", per_device_train_batch_size=rows, **options))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = {"labels": folder, "resamples": 2, "per_device_train_batch_size": rows // 2}
    arguments = TRAINING | options | arguments | {"output_dir": tmp_path / "two"}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [*launcher, "-m", "hf_selfjudge", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = Judge.from_pretrained(tmp_path / "two")
    assert two.info.training["held_out"]["rows"] == one.info.training["held_out"]["rows"] == rows
    first, second = (judge.head.weight / judge.info.training["fit"]["slope"] for judge in (one, two))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


@pytest.mark.heavy
def test_what_the_card_says_remakes_the_judge(fitted, tmp_path):
    """The options on the card, read by the parser, are those it was trained with."""
    folder, _, _ = fitted
    options = {
        "scalars": ["none"],
        "prior": float("inf"),
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "per_device_train_batch_size": 100,
        "dataloader_drop_last": True,
        "weight_decay": 0.5,
        "seed": 3,
    }
    judge = main(script(folder, resamples=2), config(tmp_path / "one", **options))
    text = (tmp_path / "one/README.md").read_text()
    (command,) = (line for line in text.splitlines() if line.startswith("hf-selfjudge train"))
    arguments = shlex.split(command)[2:]
    arguments[arguments.index("labels/1")] = str(folder)
    arguments[-1] = str(tmp_path / "two")
    again = main(*make_parser().parse_args_and_config([*arguments, "--resamples", "2", "--disable_tqdm", "true"]))
    assert again.info == judge.info
    assert all(map(torch.equal, again.state_dict().values(), judge.state_dict().values()))


def test_the_card_says_that_mining_was_stopped(fitted, tmp_path):
    folder, judge, _ = fitted
    stopped = shutil.copytree(folder, tmp_path / "labels", ignore=shutil.ignore_patterns("cache"))
    (stopped / "labels-00000-of-00001.parquet").rename(stopped / "labels-00000-of-00007.parquet")
    (stopped / "answers-00000-of-00001.parquet").rename(stopped / "answers-00000-of-00007.parquet")
    mining = mining_records(load_labels(stopped))
    assert (judge.info.training["mining"][0]["shards"], mining[0]["shards"]) == ([1, 1], [1, 7])
    other = copy.deepcopy(judge)
    other.info = replace(judge.info, training=judge.info.training | {"mining": [*map(public_mining, mining)]})
    for each, count in ((judge, 0), (other, 2)):
        card_of(each, tmp_path)
        assert (tmp_path / "README.md").read_text().count("stopped after 1 of 7 shards") == count


def test_the_card_says_which_layer(fitted, tmp_path):
    _, judge, _ = fitted
    card_of(judge, tmp_path)
    assert "add-layer" not in (tmp_path / "README.md").read_text()
    other, training = copy.deepcopy(judge), copy.deepcopy(judge.info.training)
    training["mining"][0] |= {"layer": 5, "reread_dtype": "bfloat16"}
    other.info = replace(judge.info, layer=5, training=training)
    card_of(other, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "the target's hidden states above its first 5 layers: hidden_before, hidden_after |" in text
    mined, read, trained = (line for line in text.splitlines() if line.startswith("hf-selfjudge "))
    assert mined.endswith(" --output mined/1")
    assert read == "hf-selfjudge add-layer mined/1 --layer 5 --dtype bfloat16 --output labels/1"
    assert trained.startswith("hf-selfjudge train --labels labels/1 ")


def test_a_judge_no_better_than_chance_is_not_calibrated(fitted, tmp_path, monkeypatch):
    """A negative slope would turn it upside down."""
    folder, judge, _ = fitted
    monkeypatch.setattr(training, "calibrate", lambda odds, label: (-0.5, 0.1))
    other = main(script(folder, resamples=2), config(tmp_path))
    fit = other.info.training["fit"]
    assert (fit["slope"], fit["intercept"]) == (1, 0)
    slope = judge.info.training["fit"]["slope"]
    torch.testing.assert_close(judge.head.weight, slope * other.head.weight)


def test_training_again_discards_what_was_measured(fitted, tmp_path):
    folder, _, saved = fitted
    judge = Judge.from_pretrained(saved)
    judge.info = replace(judge.info, threshold="0.03/token", operating_points={"fast": {"threshold": 0.3}})
    again = JudgeTrainer(judge, config(tmp_path, max_steps=1), train_dataset=load_labels(folder))
    assert again.judge.info.training
    again.train()
    assert not again.judge.info.training
    assert not again.judge.info.operating_points
    assert again.judge.info.threshold == Threshold(0.5)


def test_a_target_needs_no_arguments(target, answers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    judging = JudgeTrainer(target, train_dataset=answers, processing_class=Padding())
    assert judging.args.output_dir == "llama-Judge"
    assert judging.args.per_device_train_batch_size == 4


def test_metrics_are_logged(fitted, tmp_path):
    labels = load_labels(fitted[0])
    args = config(tmp_path, logging_steps=5, eval_strategy="steps", max_steps=10)
    judging = JudgeTrainer(args=args, train_dataset=labels, eval_dataset=labels.select(range(60)))
    judging.train()
    names = ("loss", "accuracy", "accept_rate", "false_accept_rate")
    assert all(name in judging.state.log_history[0] for name in names)
    last = [entry for entry in judging.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_auroc"] > 0.8
    assert 0 < last["eval_false_accept_rate"] < 0.5 < last["eval_accept_rate"] < 1


def test_the_script_reads_yaml_and_the_command_line(tmp_path):
    (tmp_path / "judge.yaml").write_text("labels: [a, b]\ncomponents: 16\nlearning_rate: 0.01\n")
    arguments = ["--config", str(tmp_path / "judge.yaml"), "--output_dir", str(tmp_path), "--components", "32"]
    script_args, training_args = make_parser().parse_args_and_config(arguments)
    assert script_args.labels == ["a", "b"]
    assert (training_args.components, training_args.learning_rate) == (32, 0.01)


# -- options of transformers' trainer: obeyed or refused -------------------------------------------------------------


def on_features(folder, output, rows=range(180), own=None, **options):
    """A trainer of the head; `own` are its other arguments."""
    options = {"components": 8, "max_steps": 12, "per_device_train_batch_size": 64} | options
    args = config(output, **options)
    labels = load_labels(folder).select(rows)
    return JudgeTrainer(args=args, train_dataset=labels, **(own or {}))


STEPWISE = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is refused: labels are soft already"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is refused"),
        ({"fp16_full_eval": True}, "`fp16_full_eval` is refused: a judge is kept in fp32"),
        ({"bf16_full_eval": True}, "`bf16_full_eval` is refused: a judge is kept in fp32"),
        ({"fp16": True}, "`fp16` is refused: a CPU .* set `bf16` and `use_cpu`"),
        ({"use_liger_kernel": True}, "`use_liger_kernel` is refused"),
        ({"fsdp": True}, "`fsdp` is refused: a judge is small"),
        ({"parallelism_config": {"tp_size": 2}}, "`parallelism_config` is refused: a judge is small"),
        ({"optim_target_modules": ["head"]}, "`optim_target_modules` is refused"),
        ({"optim": "schedule_free_adamw"}, "`optim` is refused"),
        ({"optim_args": "momentum=0.9"}, "`optim_args` is refused: adamw_torch.* takes none"),
        ({"length_column_name": "tokens"}, "`length_column_name` is refused"),
        ({"activation_checkpointing": True}, "`activation_checkpointing` is refused: on mined features"),
        (
            {"gradient_checkpointing": True},
            "is refused: on mined features.* `gradient_checkpointing` is its older name",
        ),
        ({"include_num_input_tokens_seen": "all"}, "`include_num_input_tokens_seen` is refused: on mined features"),
        ({"include_for_metrics": ["inputs"]}, "`include_for_metrics` is refused: on mined features"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is refused: on mined features"),
        ({"train_sampling_strategy": "batch_rebalance"}, "`train_sampling_strategy` is refused: on mined features"),
        ({"eval_on_start": True}, "`eval_on_start` is refused: there is no `eval_dataset`"),
        ({"eval_strategy": "steps"}, "didn't pass an `eval_dataset`"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "`save_strategy` is refused"),
        (STEPWISE | {"save_steps": 4, "load_best_model_at_end": True}, r"`save_steps` is refused: .* \(2\)"),
        ({"batch_eval_metrics": True}, "`batch_eval_metrics` is refused: the metrics need"),
        ({"eval_do_concat_batches": False}, "`eval_do_concat_batches` is refused: the metrics need"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be 1 or more, got 0"),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be 1 or more, got 0"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a number above 0, got 0.0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be a number above 0, got -1.0"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be a number above 0, got inf"),
        ({"weight_decay": -1.0}, "`weight_decay` must be a number, 0 or more, got -1.0"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be a number, 0 .* or more, got -1.0"),
        ({"max_grad_norm": float("nan")}, "`max_grad_norm` must be a number, 0 .* or more, got nan"),
        ({"max_steps": 0}, "`max_steps` is 0 and `num_train_epochs` 0"),
        ({"max_steps": -1}, "`max_steps` is -1 and `num_train_epochs` 0"),
        ({"num_train_epochs": -1.0}, "`max_steps` is -1 and `num_train_epochs` -1"),
        ({"num_train_epochs": float("inf")}, "`max_steps` is -1 and `num_train_epochs` inf"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 181},
            "180 rows for batches of 181 on each of 1 processes, and `dataloader_drop_last` is True",
        ),
        ({"label_names": ["changed"]}, "`label_names`: the label is chosen by `label`"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "`hub_strategy`: checkpoints are not published"),
    ],
    ids=str,
)
def test_options_that_would_not_be_obeyed_are_refused(fitted, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        on_features(fitted[0], tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"bf16": True}, False),  # the head is in fp32 whatever the target is in
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True}, False),
        ({"auto_find_batch_size": True}, False),
        ({"average_tokens_across_devices": False}, False),
        ({"remove_unused_columns": False}, False),
        ({"logging_first_step": True, "logging_nan_inf_filter": False}, False),
        ({"full_determinism": False, "torch_empty_cache_steps": 1}, False),
        ({"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2, "num_train_epochs": 1.0}, True),
        ({"weight_decay": 1.0}, True),
        ({"max_grad_norm": 0.01}, True),
        ({"optim": "adafactor"}, True),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, True),
        ({"warmup_steps": 5}, True),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, True),
        ({"train_sampling_strategy": "sequential"}, True),
        ({"dataloader_drop_last": True}, True),
        ({"data_seed": 3}, True),
        ({"seed": 3}, True),
        ({"per_device_train_batch_size": 1000}, True),
    ],
    ids=str,
)
def test_options_are_obeyed(fitted, tmp_path, options, other):
    """Those that change what comes out do, and the others do not."""
    weights = []
    for folder, chosen in (("plain", {}), ("chosen", options)):
        judging = on_features(fitted[0], tmp_path / folder, **chosen)
        judging.train()
        judging.save_model()
        weights.append(Judge.from_pretrained(tmp_path / folder).head.weight)  # takes fp32 only
    assert torch.equal(*weights) != other


def test_the_end_of_training_is_looked_at(fitted, tmp_path):
    judging = on_features(fitted[0], tmp_path / "b", learning_rate=1e38)
    with pytest.raises(ValueError, match="`learning_rate`: the loss is (nan|inf) after 1 steps"):
        judging.train()
    with pytest.raises(ValueError, match="`learning_rate`: head.weight is not finite any more"):
        judging.save_model()
    judging = on_features(fitted[0], tmp_path / "c", learning_rate=1e38, max_steps=1, lr_scheduler_type="constant")
    with torch.no_grad():
        judging.judge.head.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="`learning_rate`: "):
        judging.train()
    assert not list(tmp_path.glob("*/model.safetensors"))
    judging = on_features(fitted[0], tmp_path / "d")
    judging.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="`load_best_model_at_end`: no judge was evaluated and saved"):
        judging.train()


def test_a_launcher_cannot_shard_a_judge(fitted, tmp_path, monkeypatch):
    made = JudgeTrainer.create_accelerator_and_postprocess

    def sharded(self):
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(JudgeTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed would not be obeyed"):
        on_features(fitted[0], tmp_path)


def test_what_is_ahead_is_known_for_rounds_only(fitted, target, answers, tmp_path):
    known = "`states`: what is ahead of a candidate is known for rounds only"
    with pytest.raises(ValueError, match=known):
        on_features(fitted[0], tmp_path, states=[BEFORE, AHEAD])
    with pytest.raises(ValueError, match=known):
        through(target, answers, tmp_path, states=[BEFORE, AHEAD])


def test_labels_that_tell_nothing_are_refused(fitted, tmp_path):
    labels = load_labels(fitted[0])
    judge = new_judge(mining_of(load_labels(fitted[0])), config(tmp_path))
    same = np.flatnonzero(np.array(labels["changed"][:]) == 0)
    with pytest.raises(ValueError, match=r"`label`: it is 0 in all \d+ rows"):
        JudgeTrainer(judge, config(tmp_path), train_dataset=labels.select(same))
    with pytest.raises(ValueError, match="`labels` are empty"):
        JudgeTrainer(judge, config(tmp_path), train_dataset=labels.select([]))


def test_an_optimizer_must_be_of_what_is_trained(fitted, tmp_path):
    other = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers`: head.weight is to be trained"):
        on_features(fitted[0], tmp_path, own={"optimizers": (other, None)})
    args = config(tmp_path, max_steps=2)
    judge = new_judge(mining_of(load_labels(fitted[0])), args)
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.1)
    judging = JudgeTrainer(
        judge, args, train_dataset=load_labels(fitted[0]), optimizers=(optimizer, None), compute_metrics=len
    )
    judging.train()
    assert judge.head.weight.any()
    with pytest.raises(ValueError, match="`preprocess_logits_for_metrics` needs a `compute_metrics`"):
        on_features(fitted[0], tmp_path, own={"preprocess_logits_for_metrics": lambda odds, labels: odds.sigmoid()})


def test_what_is_undefined_is_left_out_and_is_not_the_best(fitted, tmp_path):
    labels = load_labels(fitted[0])
    same = labels.select(np.flatnonzero(np.array(labels["changed"][:]) == 0)[:20])
    options = STEPWISE | {"eval_on_start": True, "logging_first_step": True, "load_best_model_at_end": True}
    judging = on_features(fitted[0], tmp_path / "loss", own={"eval_dataset": same}, **options)
    judging.train()
    assert "eval_false_accept_rate" not in judging.state.log_history[0]  # a new judge accepts nothing
    for path in (tmp_path / "loss").glob("*/trainer_state.json"):
        assert "NaN" not in path.read_text()
    options["metric_for_best_model"] = "auroc"
    judging = on_features(fitted[0], tmp_path / "auroc", own={"eval_dataset": same}, **options)
    with pytest.raises(KeyError, match="'eval_auroc', which is not found in the evaluation metrics"):
        judging.train()


def test_the_best_judge_is_the_one_with_the_fewest_false_accepts(target, answers, tmp_path):
    """Head and adapter are those of the best step, also in the judge that is never saved."""
    options = {"max_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "eval_a_false_accept_rate"}
    evaluated = {"a": answers.select(range(18)), "b": answers.select(range(18, 36))}
    judging = through(target, answers, tmp_path, lora(), eval_dataset=evaluated, **STEPWISE | options)
    judging.train()
    rates = {e["step"]: e[name] for e in judging.state.log_history if (name := "eval_a_false_accept_rate") in e}
    best = min(rates, key=rates.get)
    assert best < 4  # not what it ended with
    saved = Judge.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(judging.judge.head.weight, saved.head.weight)
    assert judging.judge.info.adapter
    for name, value in saved.adapter.tensors.items():
        assert torch.equal(judging.judge.adapter.tensors[name], value), name


def test_training_goes_on_from_its_own_checkpoints_only(fitted, target, answers, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    on_features(fitted[0], tmp_path / "own", **options).train()
    on_features(fitted[0], tmp_path / "bare", save_only_model=True, **options).train()
    here, bare = tmp_path / "own/checkpoint-6", tmp_path / "bare/checkpoint-6"
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        on_features(fitted[0], tmp_path / "x").train(resume_from_checkpoint=True)
    for folder in (bare, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint`: .* has no optimizer.pt"):
            on_features(fitted[0], tmp_path / "x").train(resume_from_checkpoint=str(folder))
    other = on_features(fitted[0], tmp_path / "x", states=[AFTER, BEFORE])
    with pytest.raises(ValueError, match="of another judge, whose states is"):
        other.train(resume_from_checkpoint=str(here))
    through(target, answers, tmp_path / "lora", lora(lora_alpha=8), save_strategy="steps", save_steps=3).train()
    folder = str(tmp_path / "lora/checkpoint-3")
    with pytest.raises(ValueError, match="of another judge, whose adapter is True, not False"):
        through(build("llama", num_hidden_layers=3), answers, tmp_path / "x").train(resume_from_checkpoint=folder)
    other = through(build("llama", num_hidden_layers=3), answers, tmp_path / "x", lora(lora_alpha=4))
    with pytest.raises(ValueError, match="an adapter of another `peft_config`"):
        other.train(resume_from_checkpoint=folder)


@pytest.mark.parametrize(
    "options", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}], ids=str
)
def test_odds_are_those_of_all_rows_in_order(target, answers, tmp_path, options):
    chosen = through(target, answers, tmp_path, per_device_eval_batch_size=5, **options)
    chosen.train()
    plain = through(chosen.model, answers, tmp_path, per_device_eval_batch_size=5)
    np.testing.assert_allclose(chosen.odds(answers), plain.odds(answers), rtol=1e-5)


def test_odds_do_not_depend_on_what_evaluation_does(fitted, tmp_path):
    """Options about the measures do not change what the judge says."""
    options = {"prediction_loss_only": True, "eval_do_concat_batches": False, "per_device_eval_batch_size": 50}
    own = {"compute_metrics": len, "preprocess_logits_for_metrics": lambda odds, labels: odds.sigmoid()}
    chosen = on_features(fitted[0], tmp_path, own=own, **options)
    chosen.train()
    plain = on_features(fitted[0], tmp_path)
    plain.train()
    labels = load_labels(fitted[0])
    np.testing.assert_allclose(chosen.odds(labels), plain.odds(labels), rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_batch(answers, tmp_path):
    """Also where answers have a different number of labels."""
    uneven = answers.select([i for i in range(36) if i % 3 == 0 or i < 15])
    weights = []
    for size, steps in ((12, 1), (5, 3)):
        judging = through(
            build("llama", num_hidden_layers=3),
            uneven,
            tmp_path,
            lora(),
            **{"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "prior": 0.01},
            **{"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "logging_steps": 1},
        )
        judging.train()
        losses = [entry["loss"] for entry in judging.state.log_history if "loss" in entry]
        weights.append((torch.cat([p.detach().flatten() for p in judging.judge.head.parameters()]), losses))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_activations_are_computed_again(answers, tmp_path):
    """With `activation_checkpointing` a layer runs twice a step, and what comes out is the same."""
    heads, counts = [], []
    for chosen in (False, True):
        own, calls = build("llama", num_hidden_layers=3), []
        judging = through(own, answers, tmp_path, lora(), activation_checkpointing=chosen)
        own.model.layers[2].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        judging.train()
        heads.append(judging.judge.head.weight)
        counts.append(len(calls))
    assert counts == [6, 12]
    torch.testing.assert_close(*heads)


def test_a_trained_judge_has_its_adapter(target, answers, tmp_path):
    judging = through(target, answers, tmp_path, lora(), include_num_input_tokens_seen="all")
    judging.train()
    assert judging.judge.info.adapter
    assert any(value.any() for value in judging.judge.adapter.tensors.values())
    assert judging.state.num_input_tokens_seen > 0


def test_the_script_refuses_before_it_trains(fitted, tmp_path):
    folder = fitted[0]
    for options, message in (
        ({"eval_strategy": "steps"}, "`eval_strategy` needs labels to evaluate on"),
        ({"eval_on_start": True}, "`eval_on_start` needs labels to evaluate on"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "`save_strategy` needs labels"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 200},
            r"192 rows for batches of 200 .* \(Held out was part 1 of 5.\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            main(script(folder), config(tmp_path / "x", **options))
    for options, message in (
        ({"lora_r": 0}, "`lora_r` must be 1 or more, got 0"),
        ({"lora_batch": 0}, "`lora_batch` must be 1 or more, got 0"),
        ({"lora_epochs": 0}, "`lora_epochs` must be a number above 0, got 0"),
        ({"lora_learning_rate": -1.0}, "`lora_learning_rate` must be a number above 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            script(folder, **options)
    assert not (tmp_path / "x").exists()


def test_every_option_has_a_help_text():
    for kind in (JudgeConfig, ScriptArguments):
        assert all(kind.__dataclass_fields__[name].metadata["help"] for name in kind.__annotations__)


@pytest.mark.parametrize("option", ["--output", "--output_dir", "--output-dir"])
def test_the_folder_of_the_judge_has_the_name_of_other_commands(option):
    _, args = make_parser().parse_args_and_config(["--labels", "a", option, "my-judge", "--accept-share", "0.3"])
    assert args.output_dir == "my-judge"


def test_errors(fitted, target, answers, tmp_path):
    folder, _, _ = fitted
    with pytest.raises(ValueError, match="4 prompts are too few for 5 folds"):
        main(script(write_labels(tmp_path / "few", prompts=4)), config(tmp_path / "x"))
    other = write_labels(tmp_path / "other", target="tiny/other", seed=1)
    with pytest.raises(
        ValueError, match=r"`labels` are of different models or layers \(target: 'tiny/llama' and 'tiny/other'\)"
    ):
        main(script(folder, other), config(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=r"has no mining.json"):
        main(script(tmp_path), config(tmp_path / "x"))
    with pytest.raises(ValueError, match="`components` is 24, but there are 12 labels only"):
        main(script(write_labels(tmp_path / "rare", prompts=4), folds=2), config(tmp_path / "x", components=24))
    assert not (tmp_path / "x").exists()
    for options, message in (
        ({"label": "margin"}, "`label` must be one of changed,"),
        ({"label_threshold": 0.1}, "`label_threshold` is for the labels likelihood and confidence"),
        ({"scalars": ["rank"]}, r"`scalars` must be 'none' or a list of margin, .* got \['rank'\]"),
        ({"scalars": [], "states": []}, "both empty"),
        ({"scalars": "rank"}, "`scalars` must be 'none' or a list of margin, .* got 'rank'"),
        ({"scalars": None}, "`scalars` must be 'none' or a list of margin, .* got None"),
        ({"states": [1]}, r"`states` must be 'none' or a list of hidden_before, .* got \[1\]"),
        *(({"components": n}, f"`components` must be a whole number, 1 or more, got {n}") for n in (0, -1, 1.5, True)),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)
    with pytest.raises(ValueError, match="`resamples` must be 1 or more"):
        script(folder, resamples=0)
    with pytest.raises(ValueError, match="`prior` must be a variance above 0"):
        config(tmp_path, prior=0.0)
    judge = new_judge(mining_of(load_labels(folder)), config(tmp_path))
    with pytest.raises(ValueError, match="`judge` was made for another target"):
        TargetWithJudge(target, judge)
    target.lm_head = HalfLinear(HIDDEN, 64)
    with pytest.raises(ValueError, match="no gradient passes through packed half-precision weights"):
        through(target, answers, tmp_path)
    target.lm_head = torch.nn.Linear(HIDDEN, 64, device="meta")
    with pytest.raises(ValueError, match=r"`model`: the target is on several devices \(cpu, meta\)"):
        TargetWithJudge(target, judge)
    target.lm_head = torch.nn.Linear(HIDDEN, 64)
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset` of labels, got `NoneType`"):
        JudgeTrainer(judge, config(tmp_path))
    with pytest.raises(TypeError, match="`model` must be a `Judge`"):
        JudgeTrainer(torch.nn.Linear(1, 1), config(tmp_path), train_dataset=answers)
    with pytest.raises(ValueError, match="`peft_config` needs a target"):
        JudgeTrainer(judge, config(tmp_path), train_dataset=load_labels(folder), peft_config=lora())
    with pytest.raises(TypeError, match="`peft_config` must be a `peft.PeftConfig`, got `dict`"):
        through(target, answers, tmp_path, {"r": 4})
    adapted = through(target, answers, tmp_path, lora()).model
    with pytest.raises(ValueError, match="`model` has an adapter already"):
        through(adapted, answers, tmp_path, lora())


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in HUB_CARDS.glob("*/config.json")), ids=lambda path: path.name
)
def test_shipped_cards_are_what_the_command_writes(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert card_of(Judge.from_pretrained(copy), copy).read_text() == (folder / "README.md").read_text()


@pytest.mark.parametrize(("pair", "drafts"), SHIPPED)
def test_shipped_judges_are_of_their_pair_and_what_drafts(pair, drafts):
    info = Judge.from_pretrained(shipped_judge(pair, drafts)).info
    target, draft = parse_pair(pair)
    assert (info.target, info.draft) == (target, draft if drafts == DRAFT_MODEL else LOOKUP)
    with pytest.raises(FileNotFoundError, match="no judge is shipped for 'a,b' with"):
        shipped_judge("a,b", drafts)


def test_card(fitted, tmp_path):
    _, judge, _ = fitted
    judge.save_pretrained(tmp_path / "my-judge")
    text = card_of(Judge.from_pretrained(tmp_path / "my-judge"), tmp_path / "my-judge").read_text()
    assert text.startswith("---\nlibrary_name: hf_selfjudge\n") or "library_name: hf_selfjudge" in text.split("---")[1]
    assert "base_model:\n- tiny/llama" in text
    assert "# my-judge\n" in text
    assert "240 substitutions from 40 prompts have a label" in text
    assert "Measured in decoding" not in text
    assert "--prompts prompts.jsonl --limit 40 --max-new-tokens 8 --per-answer 6 --answer-batch 4" in text
    options = "--components 20 --learning_rate 0.03 --max_steps 200 --prior 1.0 --states hidden_before hidden_after"
    assert f"train --labels labels/1 --folds 5 --accept_share 0.5 {options} --output my-judge" in text
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    add_results(tmp_path / "my-judge", fingerprint(judge), tmp_path / "results.json")
    text = card_of(judge, tmp_path / "my-judge").read_text()
    assert "| judged | 2.00 | 2.00 [1.50, 2.50] | 2 | 1.00 | 10.0 % | 1.000 | 3 of 4 | 1.000 |" in text
    assert "draft length 5, threshold 0.300, float32" in text
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"threshold": "0.03/token"}))
    add_results(tmp_path / "my-judge", fingerprint(judge), tmp_path / "results.json")
    assert "threshold 0.03/token, float32" in card_of(judge, tmp_path / "my-judge").read_text()
    judge.info.training["mining"][0] |= {
        "prompts_options": {"system": "Don't ramble.", "limit": 40, "shuffle": 0},
        "written_by": "me/first judge, weights 0123, threshold 0.3",
    }
    text = card_of(judge, tmp_path / "my-judge").read_text()
    (command,) = (line for line in text.splitlines() if line.startswith("hf-selfjudge mine"))
    arguments = shlex.split(command)
    assert arguments[arguments.index("--system") + 1] == "Don't ramble."
    assert arguments[arguments.index("--judge") + 1] == "me/first judge"
    assert arguments.count("--limit") == arguments.count("--shuffle") == 1
    judge.info.training["mining"][0] |= {"rounds": 3, "round_length": 16}
    text = card_of(judge, tmp_path / "my-judge").read_text()
    assert "all mismatches of 3 rounds of 16 drafted tokens in each, seed 0" in text
    assert "labelled together with those before them in the same round" in text
    assert " --max-new-tokens 8 --rounds 3 --round-length 16 --" in text
    assert "--per-answer" not in text
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of `hf-selfjudge quickstart --json`"):
        add_results(tmp_path / "my-judge", fingerprint(judge), tmp_path / "results.json")
