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

import datasets
import pytest
import torch

from hf_selfjudge import JudgedModel, MiningConfig, load_labels, mine, read_prompts
from hf_selfjudge.data.prompts import Prompt, TooLong, encode
from hf_selfjudge.mining import job as mining
from hf_selfjudge.mining.answers import read_answers, target_answers
from hf_selfjudge.mining.job import counts_of, judged_writer
from hf_selfjudge.mining.labels import features_of
from hf_selfjudge.mining.report import Labels, predictors
from hf_selfjudge.mining.substitutions import find_looked_up
from hf_selfjudge.rules import Lossless, Rule
from hf_selfjudge.training.evaluation import HeldOutConfig
from tests.architectures import build as build_any
from tests.builders import VOCAB, build, perturbed, shortened, tiny_tokenizer


CONFIG = MiningConfig(
    max_new_tokens=24, top=2, floor=0.0, per_answer=8, rewrites=3, window=5, shard=2, answer_batch=2,
    answers_at_once=2, forward_tokens=16,
)  # fmt: skip
PROMPTS = [Prompt("a", "why is it so?"), Prompt("b", "how many?", check="number"), Prompt("c", "x + y = z, is it?")]
MANY = [Prompt(f"p{i}", "why " * (i % 5 + 1) + f"is {i} so?") for i in range(40)]


def same(first: datasets.Dataset, second: datasets.Dataset) -> bool:
    return first.to_dict() == second.to_dict()


def test_rows_and_what_is_kept_beside_them(llama, tokenizer, tmp_path):
    target, draft = llama
    rows = mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path, "three.jsonl")
    assert len(rows) == 24
    assert rows.features == features_of(32)
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
    }


def test_prompt_lookup(llama, tokenizer, tmp_path):
    """The mismatches are those that lossless decoding meets, and there is no draft whose opinion could be noted."""
    target, _ = llama
    met = []

    class Noting(Rule):
        def accept(self, candidate):
            met.append((candidate.position, candidate.token))
            return False

    class Always(Rule):
        def accept(self, candidate):
            return True

    config = replace(CONFIG, lookup=4, max_new_tokens=48, per_answer=200, rewrites=200)
    rows = mine(target, None, tokenizer, PROMPTS, config, tmp_path)
    judged = JudgedModel(target, Noting(), tokenizer=tokenizer)
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt.said, 256, 48)
        judged.generate(ids, prompt_lookup_num_tokens=4, max_new_tokens=48, do_sample=False)
        mine_rows = [row for row in rows if row["prompt_id"] == prompt.id]
        found = {(r["position"], r["substitute"]) for r in mine_rows if r["kind"] == "mismatch"}
        assert found == {*met}
        assert found
        assert any(row["kind"] == "alternative" for row in mine_rows)
        met.clear()
    # Along a text that has other tokens than the target's choices, what proposes these is a mismatch too.
    ids = encode(tokenizer, PROMPTS[0].said, 256, 48)
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
    found = Labels.of(rows, tokenizer)
    assert next(r for r in predictors(found, HeldOutConfig(resamples=5)) if "draft" in r["score"])["auc"] is None
    with pytest.raises(ValueError, match="drafts come from a model or, with `lookup`, from prompt lookup"):
        mine(target, None, tokenizer, PROMPTS, CONFIG, tmp_path / "x")


@pytest.mark.parametrize("change", [{"answers_at_once": 1}, {"forward_tokens": 400}, {"answer_batch": 1}])
def test_labels_do_not_depend_on_how_work_is_packed(llama, tokenizer, tmp_path, change):
    target, draft = llama
    columns = ("prompt_id", "position", "substitute", "answer_ids", "rewritten_ids", "changed", "kind")
    first = mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path / "1").select_columns(columns)
    config = replace(CONFIG, **change)
    assert same(first, mine(target, draft, tokenizer, PROMPTS, config, tmp_path / "2").select_columns(columns))


def test_a_model_that_does_not_pack(tokenizer, tmp_path, capsys):
    target = build_any("dense", "bloom")
    rows = mine(target, perturbed(target), tokenizer, PROMPTS, CONFIG, tmp_path)
    assert len(rows) > 10
    assert json.loads((tmp_path / "mining.json").read_text())["packed"] is False
    assert "not packed" in capsys.readouterr().out


def test_a_draft_with_another_vocabulary(llama, tokenizer, tmp_path):
    target, draft = llama[0], perturbed(llama[0])
    draft.resize_token_embeddings(VOCAB - 8)
    with pytest.raises(ValueError, match=f"`draft` has a vocabulary of {VOCAB - 8} tokens, the target one of {VOCAB}"):
        mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_a_recurrent_target(tokenizer, tmp_path):
    target = build_any("recurrent", "mamba")
    with pytest.raises(ValueError, match="keeps a state that cannot go back"):
        mine(target, target, tokenizer, PROMPTS, CONFIG, tmp_path)


def test_killed_at_any_moment(llama, tokenizer, tmp_path):
    """Ten times kill -9, then on to the end: the labels of an undisturbed run, no prompt lost or done twice."""
    target, draft = llama

    def run(folder):
        # Processes share the lock of progress bars; one that is killed while it holds it would stop all others.
        datasets.utils.tqdm.set_lock(threading.RLock())
        mine(target, draft, tokenizer, MANY, CONFIG, folder)

    whole = mine(target, draft, tokenizer, MANY, CONFIG, tmp_path / "whole")
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
    again = mine(target, draft, tokenizer, MANY, CONFIG, tmp_path / "killed")
    assert same(again, whole)
    assert len(set(again["prompt_id"])) == 40
    assert not list((tmp_path / "killed").glob("*.incomplete"))


def test_what_is_done_is_not_done_again(llama, tokenizer, tmp_path, monkeypatch):
    target, draft = llama
    mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path)
    monkeypatch.setattr(mining, "_mine_shard", None)
    less_memory = replace(CONFIG, answer_batch=1, answers_at_once=1, forward_tokens=8)
    for config in (CONFIG, less_memory):
        assert len(mine(target, draft, tokenizer, PROMPTS, config, tmp_path)) == 24


def test_other_settings_are_refused(llama, tokenizer, tmp_path):
    target, draft = llama
    mine(target, draft, tokenizer, PROMPTS[:1], CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"made with other settings \(prompts: 1 there, 2 now"):
        mine(target, draft, tokenizer, PROMPTS[:2], CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"draft_fingerprint: .* there, .* now"):
        mine(target, target, tokenizer, PROMPTS[:1], CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"rewrites: 3 there, 4 now"):
        mine(target, draft, tokenizer, PROMPTS[:1], replace(CONFIG, rewrites=4), tmp_path)


def test_too_long_prompts_are_left_out_and_counted(llama, tokenizer, tmp_path):
    target, draft = llama
    long = [Prompt("long", "a" * 300), Prompt("longer", "a" * 400)]
    rows = mine(target, draft, tokenizer, [long[0], *PROMPTS, long[1]], CONFIG, tmp_path)
    assert {*rows["prompt_id"]} == {"a", "b", "c"}
    counts = counts_of(tmp_path)
    assert (counts["prompts"], counts["too_long"], counts["left_out"]) == (3, 2, ["long", "longer"])
    shard = tmp_path / "labels-00000-of-00003.json"  # as earlier versions wrote it
    shard.write_text(
        json.dumps({name: value for name, value in json.loads(shard.read_text()).items() if name != "left_out"})
    )
    counts = counts_of(tmp_path)
    assert (counts["too_long"], counts["left_out"]) == (2, ["longer"])


def test_a_prompt_that_cannot_be_encoded_is_named(llama, tokenizer, tmp_path):
    target, draft = llama
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    asked = Prompt("with tools", "a", messages=[call, {"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="prompt 'with tools': `prompt` has `tool_calls`"):
        mine(target, draft, tokenizer, [*PROMPTS[:1], asked], CONFIG, tmp_path)


def test_only_too_long_prompts(llama, tokenizer, tmp_path):
    target, draft = llama
    with pytest.raises(TooLong, match="all 1 are too long: .* exceeds the context of 256 tokens"):
        mine(target, draft, tokenizer, [Prompt("long", "a" * 300)], CONFIG, tmp_path)


def test_a_folder_with_any_name(llama, tokenizer, tmp_path):
    """And what `datasets` makes to read the labels lies in it."""
    target, draft = llama
    assert len(mine(target, draft, tokenizer, PROMPTS[:1], CONFIG, tmp_path / "lab[1]*")) == 8
    assert (tmp_path / "lab[1]*" / "cache").is_dir()


def test_a_writer_that_fails(llama, tokenizer, tmp_path):
    """What was done before stays, and is not done again."""
    target, draft = llama
    config, asked = replace(CONFIG, shard=1), []

    def writer(prompts, limit):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise OSError("no more ink")
        return [torch.tensor([5, 6, 7, 8, 9] * 4)[:limit] for _ in prompts]

    with pytest.raises(OSError, match="ink"):
        mine(target, draft, tokenizer, PROMPTS, config, tmp_path, writer=writer, writer_name="w")
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    rows = mine(target, draft, tokenizer, PROMPTS, config, tmp_path, writer=writer, writer_name="w")
    assert [*dict.fromkeys(rows["prompt_id"])] == ["a", "b", "c"]
    assert len(asked) == 4


def test_no_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no labels"):
        load_labels(tmp_path)


def test_answers_from_elsewhere(llama, tokenizer, tmp_path):
    """Those that came with the prompts, and those of a writer, each along its own text."""
    target, draft = llama
    given = [Prompt("a", "why?", answer="so it is, and it is."), Prompt("b", "how?")]

    def writer(prompts, limit):
        assert [row.shape[0] for row in prompts] == [1]
        return [torch.tensor([5, 6, 7, 8, 9] * 4)[:limit]]

    rows = mine(target, draft, tokenizer, given, CONFIG, tmp_path, writer=writer, writer_name="someone")
    assert {*rows["own"]} == {False}
    texts = {row["prompt_id"]: row["answer_ids"] for row in rows if row["changed"] is None}
    assert tokenizer.decode(texts["a"]) == given[0].answer
    assert texts["b"] == [5, 6, 7, 8, 9] * 4
    assert json.loads((tmp_path / "mining.json").read_text())["written_by"] == "someone"


SMALL = ["--max-new-tokens", "12", "--per-answer", "4", "--rewrites", "2", "--window", "4", "--shard", "10"]


# What the command does, and which process did it.
COMMAND = """
from accelerate import PartialState
from hf_selfjudge.cli.app import main
try:
    main()
finally:
    print("process", PartialState().process_index, "of", PartialState().num_processes)
"""


def test_two_processes_are_one(pair_folders, prompts_file, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(COMMAND)
    command = [script, "mine", "--pair", pair_folders, "--prompts", prompts_file, "--shard", "3"]
    command += [*SMALL[:-2], "--dtype", "float32", "--output"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    for launch, name, count in ([sys.executable], "one", 1), (two, "two", 2):
        run = [*launch, *command, tmp_path / name]
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
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
    mine(target, perturbed(target), tiny_tokenizer(), read_prompts(path), config, f"{folder}/{count}")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_does_not_grow_with_prompts(tmp_path):
    peaks = {}
    for count in (100, 400):
        run = [sys.executable, "-c", MEASURE, str(count), str(tmp_path)]
        done = subprocess.run(run, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__)))
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
    ids = [encode(tokenizer, prompt.said, 256, 24) for prompt in PROMPTS]
    answers = target_answers(target, PROMPTS, ids, 24)
    for answer, row in zip(answers, ids, strict=True):
        assert torch.equal(answer.ids[None], llama[0].generate(row, max_new_tokens=24))
        assert torch.equal(answer.choices[:, 0], answer.tokens)
    written = judged_writer(JudgedModel(target, Lossless()), draft, 0)(ids, 24)
    assert all(torch.equal(one, answer.tokens) for one, answer in zip(written, answers, strict=True))


def test_a_draft_with_a_short_context(tokenizer, tmp_path):
    """Nothing is mined where the draft could not have drafted."""
    target = build("gpt2")
    draft = perturbed(target, noise=0.05)
    config = MiningConfig(max_new_tokens=24, rewrites=2, per_answer=24)
    prompts = [Prompt("short", "why?"), Prompt("middle", "why is it so, " * 2), Prompt("long", "why is it so, " * 5)]
    found = {}
    for name, model in (("whole", draft), ("short", shortened(draft, 32))):
        labels = mine(target, model, tokenizer, prompts, config, tmp_path / name)
        found[name] = [(row["prompt_id"], row["position"], row["substitute"]) for row in labels]
    lengths = {prompt.id: len(prompt.text) for prompt in prompts}
    within = [row for row in found["whole"] if lengths[row[0]] + row[1] <= 32]
    assert found["short"] == within
    assert {row[0] for row in within} == {"short", "middle"}
    assert len(within) < len(found["whole"])
