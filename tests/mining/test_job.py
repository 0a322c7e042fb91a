"""The mining job on tiny random models: shards, kills, processes, memory."""

import copy
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch

from hf_selfjudge import JudgedModel, MiningConfig, load_labels, mine, read_prompts
from hf_selfjudge.data.prompts import Prompt, TooLong, encode
from hf_selfjudge.mining import job as mining
from hf_selfjudge.mining.answers import read_answers, target_answers
from hf_selfjudge.mining.job import counts_of, judged_texts
from hf_selfjudge.mining.label_files import FORMAT, mining_of, mining_records
from hf_selfjudge.mining.report import score_predictions, short_columns
from hf_selfjudge.mining.substitutions import find_looked_up
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import Lossless, Rule
from hf_selfjudge.utils.names import public_mining
from tests.architectures import build as build_any
from tests.builders import MINING, PROMPTS, VOCAB, build, in_processes, perturbed, shortened, tiny_tokenizer


MANY = [Prompt(f"p{i}", "why " * (i % 5 + 1) + f"is {i} so?") for i in range(40)]


def same(first: datasets.Dataset, second: datasets.Dataset) -> bool:
    return first.remove_columns("source").to_dict() == second.remove_columns("source").to_dict()


def test_rows_and_what_is_kept_beside_them(llama, tokenizer, tmp_path):
    target, draft = llama
    rows = mine(Pair(target, draft, tokenizer), PROMPTS, MINING, tmp_path, "three.jsonl")
    assert len(rows) == 24
    assert {*rows["prompt_id"]} == {"a", "b", "c"}
    assert sum(changed is not None for changed in rows["changed"]) == 9
    made = json.loads((tmp_path / "mining.json").read_text())
    assert made["prompts_name"] == "three.jsonl"
    assert made["packed"] is True
    assert made["versions"].keys() == {"hf-selfjudge", "transformers", "torch"}
    counts = counts_of(tmp_path)
    assert (counts["prompts"], counts["too_long"], counts["substitutions"], counts["rewrites"]) == (3, 0, 24, 9)
    assert counts["target_tokens"] > counts["answer_tokens"] == 72
    assert {path.name for path in tmp_path.iterdir()} == {
        "mining.json",
        "cache",
        *(f"labels-0000{i}-of-00002.{ending}" for i in range(2) for ending in ("json", "parquet")),
        *(f"answers-0000{i}-of-00002.parquet" for i in range(2)),
    }


class Always(Rule):
    def keep(self, mismatches):
        return torch.ones_like(mismatches.tokens, dtype=torch.bool)


def test_prompt_lookup(llama, tokenizer, tmp_path):
    """The mismatches are those that lossless decoding meets, and there is no draft whose opinion could be noted."""
    target, _ = llama
    met = []

    class Noting(Rule):
        def keep(self, mismatches):
            met.append((int(mismatches.positions[0]), int(mismatches.tokens[0])))
            return torch.zeros_like(mismatches.tokens, dtype=torch.bool)

    config = replace(MINING, lookup=4, max_new_tokens=48, per_answer=200, rewrites=200)
    rows = mine(Pair(target, None, tokenizer), PROMPTS, config, tmp_path)
    judged = JudgedModel(target, Noting(), tokenizer=tokenizer)
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt.conversation, 256, 48)
        judged.generate(ids, prompt_lookup_num_tokens=4, max_new_tokens=48, do_sample=False)
        mine_rows = [row for row in rows if row["prompt_id"] == prompt.id]
        found = {(r["position"], r["substitute"]) for r in mine_rows if r["kind"] == "mismatch"}
        assert found == {*met}
        assert found
        assert any(row["kind"] == "alternative" for row in mine_rows)
        met.clear()
    # Along a text that has other tokens than the target's choices, what proposes these is a mismatch too.
    ids = encode(tokenizer, PROMPTS[0].conversation, 256, 48)
    all_judged = JudgedModel(target, Always(), tokenizer=tokenizer)
    text = all_judged.generate(ids, prompt_lookup_num_tokens=4, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    (read,) = read_answers(target, PROMPTS[:1], [ids], [text])
    decided = enumerate(zip(text.tolist(), all_judged.stats.sources, strict=True))
    accepted = {(place, token) for place, (token, source) in decided if source == "judged"}
    assert accepted
    assert accepted <= {(s.position, s.token) for s in find_looked_up(read, tokenizer.all_special_ids, 4)}
    assert {*rows["draft_logprob"], *rows["kl_target_draft"]} == {None}
    assert None not in rows["changed"]
    assert json.loads((tmp_path / "mining.json").read_text())["draft"] == "prompt lookup"
    found = score_predictions(short_columns(rows, tokenizer), resamples=5)
    assert next(r for r in found if "draft" in r["score"])["auc"] is None
    with pytest.raises(ValueError, match="drafts come from a model or, with `lookup`, from prompt lookup"):
        mine(Pair(target, None, tokenizer), PROMPTS, MINING, tmp_path / "x")


@pytest.mark.parametrize("change", [{"answers_at_once": 1}, {"forward_tokens": 400}, {"answer_batch": 1}])
def test_labels_do_not_depend_on_how_work_is_packed(llama, tokenizer, tmp_path, change):
    target, draft = llama
    columns = ("prompt_id", "position", "substitute", "answer_ids", "rewritten_suffix", "changed", "kind", "source")
    first = mine(Pair(target, draft, tokenizer), PROMPTS, MINING, tmp_path / "1").select_columns(columns)
    config = replace(MINING, **change)
    assert same(first, mine(Pair(target, draft, tokenizer), PROMPTS, config, tmp_path / "2").select_columns(columns))


def test_a_model_that_does_not_pack(tokenizer, tmp_path, capsys):
    target = build_any("dense", "bloom")
    rows = mine(Pair(target, perturbed(target), tokenizer), PROMPTS, MINING, tmp_path)
    assert len(rows) > 10
    assert json.loads((tmp_path / "mining.json").read_text())["packed"] is False
    assert "not packed" in capsys.readouterr().err


def test_a_draft_with_another_vocabulary(llama, tokenizer, tmp_path):
    target, draft = llama[0], perturbed(llama[0])
    draft.resize_token_embeddings(VOCAB - 8)
    with pytest.raises(ValueError, match=f"`draft` has a vocabulary of {VOCAB - 8} tokens, the target one of {VOCAB}"):
        mine(Pair(target, draft, tokenizer), PROMPTS, MINING, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_a_recurrent_target(tokenizer, tmp_path):
    target = build_any("recurrent", "mamba")
    with pytest.raises(ValueError, match="keeps a state that cannot go back"):
        mine(Pair(target, target, tokenizer), PROMPTS, MINING, tmp_path)


def test_killed_before_the_labels_of_a_shard(llama, tokenizer, tmp_path):
    """Its answers are there already: they are written again."""
    pair = Pair(*llama, tokenizer)
    whole = mine(pair, PROMPTS, MINING, tmp_path).to_dict()
    first, second = sorted(tmp_path.glob("labels-*.parquet"))
    kept = first.stat().st_mtime_ns
    second.rename(second.with_name(f"{second.stem}.incomplete.parquet"))
    assert {*load_labels(tmp_path)["prompt_id"]} == {"a", "b"}
    assert mine(pair, PROMPTS, MINING, tmp_path).to_dict() == whole
    assert first.stat().st_mtime_ns == kept


@pytest.mark.heavy
def test_killed_at_any_moment(llama, tokenizer, tmp_path):
    """Ten times kill -9, then on to the end: the labels of an undisturbed run, no prompt lost or done twice."""
    target, draft = llama

    def run(folder):
        # Processes share the lock of progress bars; one that is killed while it holds it would stop all others.
        datasets.utils.tqdm.set_lock(threading.RLock())
        mine(Pair(target, draft, tokenizer), MANY, MINING, folder)

    whole = mine(Pair(target, draft, tokenizer), MANY, MINING, tmp_path / "whole")
    seconds = counts_of(tmp_path / "whole")["seconds"]
    fork, rng, killed, halves = multiprocessing.get_context("fork"), random.Random(0), 0, set()
    for _ in range(10):
        process = fork.Process(target=run, args=(tmp_path / "killed",))
        process.start()
        time.sleep(rng.uniform(0.02, 0.15) * (seconds + 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        halves.add(len(list((tmp_path / "killed").glob("labels-*.parquet"))))
    assert killed > 4
    assert len(halves) > 1
    again = mine(Pair(target, draft, tokenizer), MANY, MINING, tmp_path / "killed")
    assert same(again, whole)
    assert len(set(again["prompt_id"])) == 40
    assert not list((tmp_path / "killed").glob("*.incomplete"))


def test_what_is_done_is_not_done_again(llama, tokenizer, tmp_path, monkeypatch):
    target, draft = llama
    mine(Pair(target, draft, tokenizer), PROMPTS, MINING, tmp_path)
    monkeypatch.setattr(mining, "_mine_shard", None)
    less_memory = replace(MINING, answer_batch=1, answers_at_once=1, forward_tokens=8)
    for config in (MINING, less_memory):
        assert len(mine(Pair(target, draft, tokenizer), PROMPTS, config, tmp_path)) == 24


def test_other_settings_are_refused(llama, tokenizer, tmp_path):
    target, draft = llama
    mine(Pair(target, draft, tokenizer), PROMPTS[:1], MINING, tmp_path)
    with pytest.raises(ValueError, match=r"made with other settings \(prompts: 1 there, 2 now"):
        mine(Pair(target, draft, tokenizer), PROMPTS[:2], MINING, tmp_path)
    with pytest.raises(ValueError, match=r"draft_fingerprint: .* there, .* now"):
        mine(Pair(target, target, tokenizer), PROMPTS[:1], MINING, tmp_path)
    with pytest.raises(ValueError, match=r"rewrites: 3 there, 4 now"):
        mine(Pair(target, draft, tokenizer), PROMPTS[:1], replace(MINING, rewrites=4), tmp_path)


def test_too_long_prompts_are_left_out_and_counted(llama, tokenizer, tmp_path):
    target, draft = llama
    long = [Prompt("long", "a" * 300), Prompt("longer", "a" * 400)]
    rows = mine(Pair(target, draft, tokenizer), [long[0], *PROMPTS, long[1]], MINING, tmp_path)
    assert {*rows["prompt_id"]} == {"a", "b", "c"}
    counts = counts_of(tmp_path)
    assert (counts["prompts"], counts["too_long"], counts["left_out"]) == (3, 2, ["long", "longer"])


def test_a_prompt_that_cannot_be_encoded_is_named(llama, tokenizer, tmp_path):
    target, draft = llama
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    asked = Prompt("with tools", "a", messages=[call, {"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="prompt 'with tools': `prompt` has `tool_calls`"):
        mine(Pair(target, draft, tokenizer), [*PROMPTS[:1], asked], MINING, tmp_path)


def test_only_too_long_prompts(llama, tokenizer, tmp_path):
    target, draft = llama
    with pytest.raises(TooLong, match="all 1 are too long: .* exceeds the context of 256 tokens"):
        mine(Pair(target, draft, tokenizer), [Prompt("long", "a" * 300)], MINING, tmp_path)


def test_a_folder_with_any_name(llama, tokenizer, tmp_path):
    """And what `datasets` makes to read the labels lies in it."""
    target, draft = llama
    assert len(mine(Pair(target, draft, tokenizer), PROMPTS[:1], MINING, tmp_path / "lab[1]*")) == 8
    assert (tmp_path / "lab[1]*" / "cache").is_dir()


def test_a_shard_that_fails(llama, tokenizer, tmp_path, monkeypatch):
    """What was done before stays, and is not done again."""
    target, draft = llama
    config, asked, judged = replace(MINING, shard=1), [], JudgedModel(target, Lossless())

    def texts(judged, draft, ids, config):
        asked.append(len(ids))
        if len(asked) == 2:
            raise OSError("no more ink")
        return judged_texts(judged, draft, ids, config)

    monkeypatch.setattr(mining, "judged_texts", texts)
    with pytest.raises(OSError, match="ink"):
        mine(Pair(target, draft, tokenizer), PROMPTS, config, tmp_path, judged=judged, judge_name="j")
    assert len(list(tmp_path.glob("labels-*.parquet"))) == 1
    rows = mine(Pair(target, draft, tokenizer), PROMPTS, config, tmp_path, judged=judged, judge_name="j")
    assert [*dict.fromkeys(rows["prompt_id"])] == ["a", "b", "c"]
    assert len(asked) == 4


def test_no_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no mining.json"):
        load_labels(tmp_path)
    (tmp_path / "mining.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(FileNotFoundError, match=r"no labels-\*.parquet in"):
        load_labels(tmp_path)
    (tmp_path / "mining.json").write_text(json.dumps({"target": "t"}))
    with pytest.raises(ValueError, match="has the format of another version. Mine the labels again"):
        load_labels(tmp_path)


def test_labels_know_how_they_were_mined(llama, tokenizer, tmp_path):
    """Whatever is done to the dataset, and of several folders."""
    pair = Pair(*llama, tokenizer)
    first = mine(pair, PROMPTS, MINING, tmp_path / "a", "a.jsonl")
    mine(pair, PROMPTS, replace(MINING, seed=1), tmp_path / "b", "b.jsonl")
    both = load_labels([tmp_path / "a", tmp_path / "b"])
    first.save_to_disk(tmp_path / "saved")
    for labels in (
        first.select([3, 1]),
        first.train_test_split(0.5)["test"],
        datasets.load_from_disk(tmp_path / "saved"),
    ):
        assert mining_of(labels) == mining_of(first)
    assert mining_of(first)["prompts_name"] == "a.jsonl"
    for labels in (both, datasets.concatenate_datasets([first, load_labels(tmp_path / "b")]).shuffle(seed=0)):
        assert [record["prompts_name"] for record in mining_records(labels)] == ["a.jsonl", "b.jsonl"]
        found = mining_of(labels)
        assert (found["target"], found["layer"], found["window"]) == ("tiny/llama", None, 5)
        assert not {"seed", "prompts_name", "source"} & found.keys()
        assert {*labels["source"]} == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert "source" not in public_mining(mining_records(first)[0])
    with pytest.raises(ValueError, match="`dataset` does not say how it was mined"):
        mining_of(datasets.Dataset.from_dict({"kind": ["mismatch"]}))


def test_an_answer_is_stored_once(llama, tokenizer, tmp_path):
    rows = mine(Pair(*llama, tokenizer), PROMPTS, MINING, tmp_path)
    files = {
        kind: [pyarrow.parquet.read_table(p) for p in sorted(tmp_path.glob(f"{kind}-*.parquet"))]
        for kind in ("labels", "answers")
    }
    assert [len(table) for table in files["answers"]] == [2, 1]
    assert not any({"prompt_ids", "answer_ids"} & {*table.column_names} for table in files["labels"])
    texts = {row["answer"]: row for table in files["answers"] for row in table.to_pylist()}
    numbers = [number for table in files["labels"] for number in table["answer"].to_pylist()]
    for row, number in zip(rows, numbers, strict=True):
        assert all(row[name] == value for name, value in texts[number].items() if name != "answer")


def test_options_out_of_range():
    with pytest.raises(ValueError, match="`top` must be between 1 and inf, got 0"):
        MiningConfig(top=0)
    with pytest.raises(ValueError, match="`floor` must be between 0 and 1, got 2"):
        MiningConfig(floor=2)


def test_answers_from_elsewhere(llama, tokenizer, tmp_path):
    """Those that came with the prompts, and those of a judged model, each along its own text."""
    target, draft = llama
    given, judged = (
        [Prompt("a", "why?", answer="so it is, and it is."), Prompt("b", "how?")],
        JudgedModel(target, Always()),
    )
    rows = mine(Pair(target, draft, tokenizer), given, MINING, tmp_path, judged=judged, judge_name="someone")
    assert {*rows["own"]} == {False}
    texts = {row["prompt_id"]: row["answer_ids"] for row in rows if row["changed"] is None}
    assert tokenizer.decode(texts["a"]) == given[0].answer
    (text,) = judged_texts(judged, draft, [encode(tokenizer, given[1].conversation, 256, 24)], MINING)
    assert texts["b"] == text.tolist()
    assert json.loads((tmp_path / "mining.json").read_text())["written_by"] == "someone"


SMALL = ["--max-new-tokens", "12", "--per-answer", "4", "--rewrites", "2", "--window", "4", "--shard", "10"]


@pytest.mark.heavy
def test_two_processes_are_one(pair_folders, prompts_file, tmp_path):
    command = ["mine", "--pair", pair_folders, "--prompts", prompts_file, "--shard", "3"]
    command += [*SMALL[:-2], "--dtype", "float32", "--output"]
    for name, count in ("one", 1), ("two", 2):
        done = in_processes(count, [*command, tmp_path / name])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("substitutions") == 1
        assert all(f"process {index} of {count}" in done.stdout for index in range(count))
    first, second = (load_labels(tmp_path / name) for name in ("one", "two"))
    assert same(first, second)
    assert len(first) == 48


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from tests.mining.test_job import peak
print(peak(int(sys.argv[1]), sys.argv[2]))
"""


def peak(count: int, folder: str) -> int:
    """Peak memory of mining `count` prompts, kB. What is kept of a prompt by mistake is some 300 kB: caches, hidden
    states and logits of a model that is wide for its depth."""
    target = build("llama", hidden_size=768)
    path = f"{folder}/{count}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"prompt": f"why is {i} so?"}) + "\n" for i in range(count))
    config = MiningConfig(max_new_tokens=12, per_answer=4, rewrites=2, window=4, shard=10, answers_at_once=2)
    mine(Pair(target, perturbed(target), tiny_tokenizer()), read_prompts(path), config, f"{folder}/{count}")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.heavy
def test_memory_does_not_grow_with_prompts(tmp_path):
    peaks = {}
    for count in (100, 400):
        run = [sys.executable, "-c", MEASURE, str(count), str(tmp_path)]
        done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.split()[-1])
    assert peaks[400] < 1.05 * peaks[100], peaks


@pytest.mark.parametrize(
    "own",
    [
        {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5, 6, 7]}, {"sequence_bias": [[[9], 9.0]]}, {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"guidance_scale": 2.0},
        {"return_dict_in_generate": True}, {"stop_strings": ["a"]}, {"do_sample": True, "temperature": 2.0},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_answers_are_greedy_whatever_the_models_own_config_says(llama, tokenizer, own):
    target, draft = copy.copy(llama[0]), llama[1]
    target.generation_config = copy.deepcopy(target.generation_config)
    target.generation_config.update(**own)
    ids = [encode(tokenizer, prompt.conversation, 256, 24) for prompt in PROMPTS]
    answers = target_answers(target, PROMPTS, ids, 24)
    for answer, row in zip(answers, ids, strict=True):
        assert torch.equal(answer.ids[None], llama[0].generate(row, max_new_tokens=24))
        assert torch.equal(answer.choices[:, 0], answer.tokens)
    written = judged_texts(JudgedModel(target, Lossless()), draft, ids, MiningConfig(max_new_tokens=24))
    assert all(torch.equal(one, answer.tokens) for one, answer in zip(written, answers, strict=True))


def test_a_draft_with_a_short_context(tokenizer, tmp_path):
    """Nothing is mined where the draft could not have drafted."""
    target = build("gpt2")
    draft = perturbed(target, noise=0.05)
    config = MiningConfig(max_new_tokens=24, rewrites=2, per_answer=24)
    prompts = [Prompt("short", "why?"), Prompt("middle", "why is it so, " * 2), Prompt("long", "why is it so, " * 5)]
    found = {}
    for name, model in (("whole", draft), ("short", shortened(draft, 32))):
        labels = mine(Pair(target, model, tokenizer), prompts, config, tmp_path / name)
        found[name] = [(row["prompt_id"], row["position"], row["substitute"]) for row in labels]
    lengths = {prompt.id: len(prompt.text) for prompt in prompts}
    within = [row for row in found["whole"] if lengths[row[0]] + row[1] <= 32]
    assert found["short"] == within
    assert {row[0] for row in within} == {"short", "middle"}
    assert len(within) < len(found["whole"])
