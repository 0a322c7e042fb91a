"""The command line from end to end on the tiny pair: mine, train, quickstart, card."""

import copy
import io
import json
import shutil
import string
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hf_selfjudge.bench.quick import Run, print_answer, ratio_of_seconds, results_table
from rich.console import Console

from hf_selfjudge import Judge, Prompt, Stats, load_labels
from hf_selfjudge.cli import app as cli
from hf_selfjudge.hub.results import public_file
from hf_selfjudge.models.load import fingerprint
from tests.builders import build, random_judge, tiny_tokenizer
from tests.training.test_trainer import RESULTS


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the console script; returns exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-selfjudge", *map(str, arguments)])
        monkeypatch.setattr(cli.torch, "set_num_threads", lambda threads: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


MINE = ("--dtype", "float32", "--max-new-tokens", 24, "--per-answer", 4, "--answer-batch", 6)


@pytest.fixture
def judge(run, pair_folders, prompts_file, tmp_path):
    code, out, err = run("mine", "--pair", pair_folders, "--prompts", prompts_file, "--output", tmp_path / "l", *MINE)
    assert code == 0, err
    assert f"{len(load_labels(tmp_path / 'l'))} substitutions (48 rewritten) of 12 prompts" in out.replace("\n", " ")
    code, out, err = run("train", "--labels", tmp_path / "l", "--output_dir", tmp_path / "j", "--components", 8)
    assert code == 0, err
    assert "held out" in out
    return tmp_path / "j"


def test_labels_in_tables_and_in_context(run, judge, tmp_path):
    code, out, err = run(
        "labels", tmp_path / "l", "--examples", 2, "--plot", tmp_path / "p.png", "--json", tmp_path / "t.json"
    )
    assert code == 0, err
    assert "48 substitutions (48 rewritten) of 12 prompts" in out
    for words in ("by category", "by token replaced", "rank correlation of scores", "held-out prompts", "harmless"):
        assert words in out
    assert "target " in out
    assert (tmp_path / "p.png").stat().st_size > 10_000
    tables = json.loads((tmp_path / "t.json").read_text())
    assert sum(row["substitutions"] for row in tables["rates"]["kind"]) == 48
    assert {row["score"] for row in tables["predictors"]} >= {"margin", "likelihood", "confidence"}
    assert not list(tmp_path.glob("*.incomplete*"))


def test_reread(run, judge, tmp_path):
    code, out, err = run("reread", tmp_path / "l", "--layer", 1, "--output", tmp_path / "midway")
    assert code == 0, err
    assert json.loads((tmp_path / "midway" / "mining.json").read_text())["reread_dtype"] == "float32"  # as mined
    assert "with what enters layer 1" in out
    assert {*load_labels(tmp_path / "midway")["layer"]} == {1}
    code, out, err = run("reread", tmp_path / "l", "--layer", 9, "--output", tmp_path / "other")
    assert code == 1
    assert "`layer` must be above 0 and below 2" in err


def test_mining_along_judged_text(run, judge, pair_folders, prompts_file, tmp_path):
    code, out, err = run(
        *("mine", "--pair", pair_folders, "--prompts", prompts_file, "--limit", 3, "--output", tmp_path / "on"),
        *("--judge", judge, "--shuffle", "--ask", *MINE),
    )
    assert code == 0, err
    rows = load_labels(tmp_path / "on")
    assert {*rows["own"]} == {False}
    made = json.loads((tmp_path / "on" / "mining.json").read_text())
    assert made["written_by"].startswith(f"{judge}, weights ")
    assert made["prompts"] == 3
    assert made["prompts_options"] == {"limit": 3, "shuffle": 0}


def test_without_rewrites(run, pair_folders, prompts_file, tmp_path):
    """Labels can be looked at; there is nothing to train on."""
    code, _, err = run(
        *("mine", "--pair", pair_folders, "--prompts", prompts_file, "--output", tmp_path / "l"), *MINE,
        *("--rewrites", 0),
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run("labels", tmp_path / "l", "--json", tmp_path / "t.json")
    assert code == 0, err
    assert json.loads((tmp_path / "t.json").read_text())["predictors"] == []
    code, _, err = run("train", "--labels", tmp_path / "l", "--output_dir", tmp_path / "j")
    assert code == 1
    assert "`labels`: 'changed' is known of no row" in err


def test_standard_input_is_for_one_process(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "this_process", lambda: SimpleNamespace(num_processes=2))
    code, _, err = run("mine", "--prompts", "-", "--output", tmp_path / "l")
    assert code == 1
    assert "several processes cannot share standard input" in err


def test_mine_train_quickstart_card(run, judge, pair_folders, prompts_file, tmp_path):
    figures = tmp_path / "figures.json"
    code, out, err = run(
        *("quickstart", "--pair", pair_folders, "--judge", judge, "--prompts", prompts_file, "--limit", 3),
        *("--max-new-tokens", 24, "--threshold", 1, "--json", figures),
    )
    assert code == 0, err
    assert "tokens/round" in out
    assert "draft, judged" in out
    results = json.loads(figures.read_text())
    assert results["pair"] == pair_folders
    assert results["prompts"] == 3
    runs = {run["decoding"]: run for run in results["runs"]}
    assert list(runs) == ["greedy", "assisted", "judged"]
    assert runs["greedy"]["tokens_per_round"] == 1
    assert runs["judged"]["tokens_per_round"] > runs["assisted"]["tokens_per_round"] > 1
    assert runs["greedy"]["agreement"] == runs["assisted"]["agreement"] == 1 > runs["judged"]["agreement"]
    assert runs["greedy"]["judged_share"] == runs["assisted"]["judged_share"] == 0 < runs["judged"]["judged_share"]
    assert runs["judged"]["logprob_per_token"] < runs["greedy"]["logprob_per_token"] < 0
    assert all(run["tokens_per_second"] > 0 and run["seconds_per_answer"] > 0 for run in results["runs"])
    code, _, err = run("card", judge, "--results", figures)
    assert code == 0, err
    assert "Measured in decoding" in (judge / "README.md").read_text()


def test_int8_draft_and_auto_length(run, judge, pair_folders, prompts_file, tmp_path):
    figures = tmp_path / "figures.json"
    code, out, err = run(
        *("quickstart", "--pair", pair_folders, "--judge", judge, "--prompts", prompts_file, "--limit", 2),
        *("--max-new-tokens", 24, "--threshold", 0, "--int8-draft", "--draft-length", "auto", "--json", figures),
        *("--dtype", "float32"),
    )
    assert code == 0, err
    assert "judged, int8 draft: " in out
    assert "times as fast as assisted" in out
    results = json.loads(figures.read_text())
    runs = {run["decoding"]: run for run in results["runs"]}
    assert list(runs) == ["greedy", "assisted", "judged", "judged, int8 draft"]
    for name in ("judged", "judged, int8 draft"):
        assert runs[name]["agreement"] == 1  # lossless
        assert 0 < sum(runs[name][f"{part}_share"] for part in ("draft", "verify", "rule")) < 1
        ratio, low, high = results["speed_against_assisted"][name]
        assert low <= ratio <= high
    assert results["speed_against_assisted"]["assisted"] == [1, 1, 1]


def test_answers_are_printed_as_they_are(byte_decoder):
    """In pieces that join to the answer, and never as markup."""
    text = "the [/INST] sky :smile: 😀 looks blue \x1b[31m"
    ids = byte_decoder(text)["input_ids"]
    stats = Stats(sources=[("target", "matched", "judged")[i % 3] for i in range(len(ids))])
    made = Run("judged", Prompt("[b]", "[red]why :smile:"), ids, 1.0, 1, -1.0, 1.0, stats)
    for options in ({}, {"markup": False, "emoji": False}):
        console = Console(file=io.StringIO(), width=200, **options)
        print_answer(console, made, byte_decoder)
        shown = console.file.getvalue()
        assert text.replace("\x1b", "␛") + "\n" in shown
        assert "[red]why :smile:" in shown
        console.print(results_table([], "[bold] :smile:"))
        assert "[bold] :smile:" in console.file.getvalue()


def test_what_a_command_names_is_text(run, tmp_path):
    name = "[/INST] :smile: [red]x"
    code, out, err = run("labels", tmp_path / name)
    assert (code, f"{tmp_path / name} has no mining.json" in err) == (1, True)
    random_judge(build("llama")).save_pretrained(tmp_path / name / "judge")
    code, out, err = run("card", tmp_path / name / "judge")
    assert code == 0, err
    assert out.strip() == f"Card written to {tmp_path / name / 'judge' / 'README.md'}"


def test_ratio_of_seconds():
    seconds = {"a": (2.0, 4.0), "b": (1.0, 4.0)}
    runs = [
        Run(name, Prompt(str(i), "?"), [1], s, 1, -1.0, 1.0, Stats())
        for name, each in seconds.items()
        for i, s in enumerate(each)
    ]
    assert ratio_of_seconds(runs, "a", "b") == pytest.approx((1.2, 1.0, 2.0))


def test_quickstart_trains(run, pair_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "QUICK_MINING", cli.MiningConfig(max_new_tokens=16, per_answer=3, answer_batch=12))
    output = tmp_path / "out"
    arguments = ("quickstart", "--pair", pair_folders, "--train", "--output", output, "--max-new-tokens", 16)
    monkeypatch.setattr(cli, "PROMPTS", tmp_path)
    for name, count in (("quickstart", 2), ("train", 12)):
        rows = [json.dumps({"prompt": f"what is {i} {name}?"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    code, out, err = run(*arguments)
    assert code == 0, err
    assert Judge.from_pretrained(output / "judge").info.target == "./target"
    assert (output / "judge" / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quickstart", "--prompts", "none.jsonl"), "none.jsonl could not be read"),
        (("quickstart", "--pair", "a,b", "--limit", "1"), "no judge is shipped for 'a,b'"),
        (("quickstart", "--train", "--judge", "x"), "Use one of the two"),
        (("mine", "--prompts", "none.jsonl", "--output", "labels"), "none.jsonl could not be read"),
        (("train", "--labels", "labels", "--output_dir", "judge"), "no mining.json"),
        (("quickstart", "--draft-length", "0"), "`draft-length` must be a number of tokens, 1 or more, or 'auto'"),
        (("quickstart", "--dtype", "int4"), "`dtype` must be one of bfloat16, float16, float32, got 'int4'"),
        (("train", "--labels", "labels", "--output_dir", "judge", "--config"), "`config`: no file is named"),
        (("train", "--config=none.yaml", "--output_dir", "judge"), "none.yaml"),
        (("card", "nothing/here"), "nothing/here is neither a folder nor in the cache"),
        (("quickstart", "--pair", "a/b,c/d", "--judge", "e/f", "--limit", "1"), "No source has the model `a/b`"),
    ],
)
def test_mistakes_end_in_a_sentence(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in out + err


def test_unwritable_paths_fail_before_the_work(run, prompts_file, tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for arguments in (
        ("mine", "--prompts", prompts_file, "--output", below),
        ("train", "--labels", tmp_path, "--output_dir", below),
        ("labels", tmp_path, "--plot", below / "p.png"),
        ("labels", tmp_path, "--json", below / "t.json"),
        ("quickstart", "--prompts", prompts_file, "--json", below / "f.json"),
        ("quickstart", "--prompts", prompts_file, "--train", "--output", below),
    ):
        code, _, err = run(*arguments)
        assert code == 1
        assert f"cannot write to {below}" in err


@pytest.fixture
def untrained(pair_folders, llama, tmp_path):
    """A folder of a judge for the pair."""
    judge = random_judge(llama[0])
    judge.info = replace(judge.info, target=pair_folders.split(",")[0])
    judge.save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"


def test_empty_and_long_prompts(run, untrained, pair_folders, tmp_path):
    path = tmp_path / "p.jsonl"
    for content, message in (("", "are empty"), (json.dumps({"prompt": "a" * 250}), "exceeds the context of 256")):
        path.write_text(content)
        for command in (
            ("quickstart", "--judge", untrained),
            ("bench", "--rule", "stock", "--output", tmp_path / "b"),
        ):
            code, _, err = run(*command, "--pair", pair_folders, "--prompts", path)
            assert code == 1
            assert message in err


def test_prompts_that_are_too_long_are_named(run, untrained, pair_folders, tmp_path):
    """In every command, and what is counted is what was answered."""
    path, figures, bench = tmp_path / "p.jsonl", tmp_path / "figures.json", tmp_path / "b"
    rows = [{"id": i, "prompt": "a" * (240 if i % 2 else 5)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on = ("--pair", pair_folders, "--prompts", path, "--max-new-tokens", 24, "--dtype", "float32")
    told = "2 prompts too long and left out: 1, 3."
    code, out, err = run("quickstart", *on, "--judge", untrained, "--json", figures)
    assert code == 0, err
    assert told in out
    assert "[2/2] 2: " in out
    assert {key: json.loads(figures.read_text())[key] for key in ("prompts", "left_out")} == {
        "prompts": 2, "left_out": ["1", "3"],
    }  # fmt: skip
    code, out, err = run("mine", *on, "--output", tmp_path / "l", "--per-answer", 4, "--rewrites", 0)
    assert code == 0, err
    assert "of 2 prompts in" in out
    assert told in out
    for mode, more in (("quality", ()), ("timing", ()), ("timing", ())):  # and started again
        code, out, err = run("bench", *on, "--rule", "stock", "--mode", mode, "--output", bench, *more)
        assert code == 0, err
        assert told in out
        found = json.loads((bench / f"{mode}-results.json").read_text())[mode]
        assert (found["prompts"], found["left_out"]) == (2, ["1", "3"])
        assert "to 2 prompts of p.jsonl (2 more were too long)" in found["heading"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "\\ud800"}', "p.jsonl:2: `text` has half of a surrogate pair"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "p.jsonl:2: expected text or chat messages"),
        (b'{"prompt": "\xe9"}', "p.jsonl:2: this is not UTF-8 text"),
    ],
)
def test_rows_are_refused_before_models_load(run, tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(cli, "load_pair", None)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + row + b"\n")
    for command in (
        ("quickstart", "--judge", "x"),
        ("mine", "--output", tmp_path / "l"),
        ("bench", "--rule", "stock", "--output", tmp_path / "b"),
    ):
        code, out, err = run(*command, "--pair", "no,models", "--prompts", path)
        assert code == 1
        assert message in err
        assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufefflabels: [nowhere]".encode(), "nowhere has no mining.json"),
        ("labels: [nowhere]".encode("utf-16"), "judge.yaml:1: this is not UTF-8 text, but perhaps UTF-16"),
        (b"folds: 2\nlabels: [\xe9]", "judge.yaml:2: this is not UTF-8 text, but perhaps Latin-1"),
        (b"labels: [nowhere", "`config`: "),
        (b"labels: [nowhere]\nscalars: null", "`scalars` must be a list of names, or 'none', got None"),
        (b"labels: [nowhere]\nscalars: margin\nstates: none", "nowhere has no mining.json"),
        (b"labels: [nowhere]\ndo_eval: true", "`do_eval` asks for labels to evaluate on"),
        (b"labels: [nowhere]\ndo_predict: true", "`do_predict` asks for labels to evaluate on"),
    ],
)
def test_the_config_of_training_is_read_as_text(run, tmp_path, content, message):
    (tmp_path / "judge.yaml").write_bytes(content)
    code, out, err = run("train", "--config", tmp_path / "judge.yaml", "--output_dir", tmp_path / "j")
    assert code == 1
    assert message in err
    assert "Traceback" not in out + err


def test_results_that_an_editor_has_saved(run, untrained, tmp_path):
    (tmp_path / "figures.json").write_bytes(json.dumps(RESULTS).encode("utf-8-sig"))
    code, _, err = run("card", untrained, "--results", tmp_path / "figures.json")
    assert code == 0, err
    (tmp_path / "figures.json").write_bytes(json.dumps(RESULTS).encode("utf-16"))
    code, _, err = run("card", untrained, "--results", tmp_path / "figures.json")
    assert code == 1
    assert "figures.json:1: this is not UTF-8 text, but perhaps UTF-16. Save it as UTF-8." in err


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


def test_bench(run, judge, pair_folders, questions, tmp_path):
    bench = ("bench", "--pair", pair_folders, "--prompts", questions, "--output", tmp_path / "b", "--dtype", "float32")
    bench += ("--max-new-tokens", 24, "--per-category", 2)
    rules = ["greedy", "stock", "draft", "margin=0.5,2", "coin=0.5:1", "coin", f"judge:{judge}=0.3,0.6,0.2/token"]
    options = [part for rule in rules for part in ("--rule", rule)]
    code, out, err = run(*bench, *options, "--ask")
    assert code == 0, err
    quality = json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"]
    assert quality["prompts"] == 6
    # Random models get nothing right that could be lost.
    by = {name: row["retention_by"] for name, row in quality["categories"].items()}
    assert by == dict.fromkeys(("math_reasoning", "mt_bench", "rag"), "same")
    rows = {row["setting"]: row for row in quality["settings"]}
    assert len(rows) == 13
    assert rows["lossless"]["speed"] == [1, 1, 1]
    assert rows["greedy"]["tokens_per_round"] == [1, 1, 1]
    assert rows["draft"]["tokens_per_round"] is None
    assert rows["judge:j=0.6"]["judged_share"] > 0
    assert quality["thresholds"] == {"judge:j=0.3": 0.3, "judge:j=0.6": 0.6, "judge:j=0.2/token": "0.2/token"}
    assert {(row["first"], row["second"]) for row in quality["comparisons"]} == {
        ("judge:j", "margin"), ("judge:j", "coin"), ("judge:j", "coin like judge:j"),
    }  # fmt: skip
    assert (rows["lossless"]["numbers"] is None) == ("unchanged" not in rows["lossless"]["measures"])
    tables = (tmp_path / "b" / "quality-results.md").read_text()
    assert "answers of at most 24 tokens to 6 prompts of questions.jsonl" in tables
    assert "| coin like judge:j=0.3 |" in tables
    assert "| judge:j (3) ÷ margin (2) |" in tables
    assert "| × lossless / retention | math_reasoning | mt_bench | rag |" in tables
    assert "| lossless | 1.00 / 1.000 | 1.00 / 1.000 | 1.00 / 1.000 |" in tables
    assert (tmp_path / "b" / "curve.png").stat().st_size > 10_000
    assert quality["heading"] in tables
    assert quality["judges"] == {"judge:j": fingerprint(Judge.from_pretrained(judge))}
    other = copy.deepcopy(quality)
    for row in other["settings"]:
        row["retention"] = [0.98] * 3
        row["speed"] = [2.0 if row["setting"].endswith("/token") else 1.5] * 3
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "quality-results.json").write_text(json.dumps({"quality": other}))
    code, out, err = run("calibrate", judge, "--bench", tmp_path / "c")
    assert code == 0, err
    assert "balanced: threshold " in out
    assert "No threshold keeps enough for strict" in out
    info = Judge.from_pretrained(judge).info
    assert [*info.operating_points] == ["balanced", "fast"]
    assert info.threshold == info.operating_points["balanced"]["threshold"] == "0.2/token"
    card = (judge / "README.md").read_text()
    assert "| `balanced` | 0.2/token |" in card
    assert "`judged.threshold` is 0.2/token, that of an operating point; 0 is lossless" in card
    code, _, err = run(*bench, "--rule", f"judge:{judge}=strict")
    assert code == 1
    assert "'strict' is none of the judge's operating points (balanced, fast)" in err
    code, _, err = run("calibrate", judge, "--bench", tmp_path)
    assert code == 1
    assert "has no quality-results.json" in err
    asked = (tmp_path / "b" / "views.jsonl").read_text()
    code, out, err = run(*bench, *options, "--ask")  # again: nothing is decoded and nobody is asked
    assert code == 0, err
    assert (tmp_path / "b" / "views.jsonl").read_text() == asked
    assert json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"] == quality
    code, out, err = run(*bench, *options, "--mode", "timing", "--repeats", 2, "--spec-bench")
    assert code == 0, err
    timing = json.loads((tmp_path / "b" / "timing-results.json").read_text())["timing"]
    assert (timing["prompts"], timing["repeats"], len(timing["settings"])) == (6, 2, 13)
    stock = next(row for row in timing["settings"] if row["setting"] == "stock")
    assert stock["speed_over_stock"] == [1, 1, 1]
    assert {*stock["speed_over_greedy_by_category"]} == {"math_reasoning", "mt_bench", "rag"}
    assert "seconds of stock ÷ its own" in (tmp_path / "b" / "timing-results.md").read_text()
    assert not list((tmp_path / "b").glob("*.incomplete*"))
    answers = [json.loads(x) for x in (tmp_path / "b" / "spec-bench" / "lossless.jsonl").open()]
    assert [(a["question_id"], a["category"]) for a in answers[:3]] == [
        (0, "math_reasoning"), (1, "rag"), (2, "writing"),
    ]  # fmt: skip
    for choice in (choice for answer in answers for choice in answer["choices"]):
        assert sum(choice["accept_lengths"]) == choice["new_tokens"][0]
        assert choice["wall_time"][0] > 0
    assert [[choice["index"] for choice in a["choices"]] for a in answers] == [[0, 1]] * 6


def test_bench_with_prompt_lookup(run, pair_folders, questions, tmp_path):
    code, out, err = run(
        *("bench", "--pair", pair_folders, "--prompts", questions, "--output", tmp_path / "b", "--dtype", "float32"),
        *("--max-new-tokens", 24, "--lookup", "--limit", 3),
    )
    assert code == 0, err
    rows = json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"]["settings"]
    families = {row["family"] for row in rows}
    assert families == {"lossless", "greedy", "stock", "top-k", "margin", "look-ahead", "coin"}
    assert {row["draft_forwards"] for row in rows} == {0}


@pytest.mark.parametrize(
    ("options", "judge"),
    [((), "qwen2.5-coder-1.5b-selfjudge"), (("--lookup",), "qwen2.5-coder-1.5b-lookup-selfjudge")],
)
def test_a_bench_takes_the_judge_that_is_shipped_for_what_drafts(
    run, questions, tmp_path, monkeypatch, options, judge
):
    asked = []

    def refuse(folder):
        asked.append(Path(folder).name)
        raise ValueError("enough")

    monkeypatch.setattr(cli.Judge, "from_pretrained", refuse)
    code, _, err = run("bench", "--prompts", questions, "--output", tmp_path / "b", "--rule", "judge=0.3", *options)
    assert (code, asked) == (1, [judge]), err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--rule", "margins=1"), "`rule` must be"),
        (("--rule", "judge=0.3"), "no judge is shipped"),
        (("--rule", "judge:nowhere=0.3"), "nowhere"),
        (("--rule", "kl=1", "--lookup"), "with prompt lookup there is none"),
        (("--mode", "fast"), "`mode` must be one of"),
        (("--spec-bench",), "`mode` timing"),
        (("--draft-length", "auto"), "goes by the clock"),
        (("--prompts", "nowhere.jsonl"), "could not be read"),
    ],
)
def test_a_bench_that_cannot_be_is_refused_before_models_load(run, questions, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(cli, "load_pair", None)
    code, _, err = run(
        *("bench", "--pair", "no,models", "--prompts", questions, "--output", tmp_path / "b", "--rule", "margin=1"),
        *wrong,
    )
    assert code == 1
    assert message in err


def test_pairs_whose_embeddings_are_padded_differently(run, llama, tokenizer, prompts_file, tmp_path):
    """One tokenizer, 64 and 72 rows of embeddings, as in one family; and another tokenizer, which is refused."""
    target, draft = llama[0], copy.deepcopy(llama[1])
    draft.resize_token_embeddings(72, mean_resizing=False)
    other = tiny_tokenizer("zyx" + string.digits)
    for name, model, words in (("target", target, tokenizer), ("draft", draft, tokenizer), ("other", draft, other)):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    pair = f"{tmp_path / 'target'},{tmp_path / 'draft'}"
    code, out, err = run("mine", "--pair", pair, "--prompts", prompts_file, "--output", tmp_path / "l", *MINE)
    assert code == 0, err
    assert len(load_labels(tmp_path / "l")) > 0
    code, out, err = run(
        "bench", "--pair", pair, "--prompts", prompts_file, "--output", tmp_path / "b", "--dtype", "float32",
        "--max-new-tokens", 16, "--rule", "margin=1", "--rule", "greedy", "--rule", "draft", "--limit", 3,
    )  # fmt: skip
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "b" / "quality.jsonl").read_text().splitlines()]
    tokens = {(line["setting"], line["prompt"]): line["tokens"] for line in lines}
    prompts = {prompt for _, prompt in tokens}
    assert all(tokens["greedy", prompt] == tokens["lossless", prompt] for prompt in prompts)
    code, out, err = run(
        "mine", "--pair", f"{tmp_path / 'target'},{tmp_path / 'other'}", "--prompts", prompts_file,
        "--output", tmp_path / "l2", *MINE,
    )  # fmt: skip
    assert code == 1
    assert "has another tokenizer than" in err.replace("\n", " ")


def test_folders_of_relative_paths_mean_the_same_elsewhere(
    run, judge, pair_folders, prompts_file, tmp_path, monkeypatch
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
        code, _, err = run(*command)
        assert code == 0, err
    monkeypatch.chdir(elsewhere)
    for command in (
        ("labels", tmp_path / "labels"),
        ("reread", tmp_path / "labels", "--layer", 1, "--output", tmp_path / "midway"),
        ("train", "--labels", tmp_path / "labels", "--output_dir", tmp_path / "new", "--components", 4),
        ("card", judge, "--results", tmp_path / "q.json", "--bench", tmp_path / "bench"),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    assert Judge.from_pretrained(tmp_path / "new").info.target == "./target"
    for folder in (tmp_path / "new", judge):
        for file in ("README.md", "config.json", "results.json"):
            assert not (folder / file).is_file() or "kim" not in (folder / file).read_text()
    assert "kim" not in public_file(tmp_path / "bench" / "quality-results.json")


def test_an_option_that_needs_another_package(run, judge, tmp_path, monkeypatch):
    def missing(*arguments):
        raise ImportError("Please install it.")

    monkeypatch.setattr("transformers.Trainer.create_optimizer", missing)
    code, out, err = run("train", "--labels", tmp_path / "l", "--output_dir", tmp_path / "other")
    assert code == 1
    assert "hf-selfjudge: Please install it." in err
    assert "Traceback" not in out + err
