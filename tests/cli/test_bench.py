"""`bench` and `calibrate`."""

import copy
import json
from pathlib import Path

import pytest

from hf_selfjudge import Judge
from hf_selfjudge.cli import options
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.scoring.asking import Asked
from hf_selfjudge.scoring.checks import CheckedAnswer


RULES = ("greedy", "stock", "draft", "margin=0.5,2", "coin=0.5:1", "coin", "judge:{judge}=0.3,0.6,0.2/token")


@pytest.fixture
def bench(pair_folders, questions, judge, tmp_path):
    """The words of a bench in the folder `b`, and those of all its rules."""
    on = ("--pair", pair_folders, "--prompts", questions, "--output", tmp_path / "b", "--dtype", "float32")
    rules = [part for rule in RULES for part in ("--rule", rule.format(judge=judge))]
    return ("bench", *on, "--max-new-tokens", 24, "--per-category", 2), rules


def test_bench_and_calibrate(succeed, fail, judge, bench, tmp_path):
    command, rules = bench
    succeed(*command, *rules, "--ask")
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
    thresholds = {name: row["threshold"] for name, row in rows.items() if row["threshold"] is not None}
    assert thresholds == {"judge:j=0.3": 0.3, "judge:j=0.6": 0.6, "judge:j=0.2/token": "0.2/token"}
    assert {(row["first"], row["second"]) for row in quality["comparisons"]} == {
        ("judge:j", "margin"), ("judge:j", "coin"), ("judge:j", "coin like judge:j"),
    }  # fmt: skip
    assert (rows["lossless"]["final_answers"] is None) == ("unchanged" not in rows["lossless"]["measures"])
    tables = (tmp_path / "b" / "quality-results.md").read_text()
    assert "answers of at most 24 tokens to 6 prompts of questions.jsonl" in tables
    assert "| coin like judge:j=0.3 |" in tables
    assert "| judge:j (3) ÷ margin (2) |" in tables
    for category in ("math_reasoning", "mt_bench", "rag"):
        assert f"\n| {category} | × lossless | retention |" in tables
    assert tables.count("| lossless | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |") == 3
    assert (tmp_path / "b" / "curve.png").stat().st_size > 10_000
    assert quality["heading"] in tables
    assert quality["judges"] == {"judge:j": fingerprint(Judge.from_pretrained(judge))}
    other = copy.deepcopy(quality)
    other["changes"] = {"by": "same", "answers": 30}
    for row in other["settings"]:
        speed = 2.0 if row["setting"].endswith("/token") else 1.5
        row["changes"] = {"changed": [0.05] * 3, "speed": [speed] * 3, "tokens_per_round": [4 * speed] * 3}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "quality-results.json").write_text(json.dumps({"quality": other}))
    out = succeed("calibrate", judge, "--bench", tmp_path / "c")
    assert "changes_10: threshold 0.2/token, 2.00 [2.00, 2.00] times the tokens a round of lossless decoding" in out
    assert "No threshold is both careful enough for these risks and faster than a more careful one: 0.05, 0.2." in out
    info = Judge.from_pretrained(judge).info
    assert [*info.operating_points] == ["changes_10"]
    assert info.threshold == info.thresholds["changes_10"] == Threshold(0.2, per_token=True)
    card = (judge / "README.md").read_text()
    assert "| `changes_10` | 10 % of the answers | 0.2/token |" in card
    assert "the target, when asked, says that it does not say the same" in card
    assert "`judged.threshold` is 0.2/token, that of an operating point; 0 is lossless" in card
    message = fail(*command, "--rule", f"judge:{judge}=changes_5")
    assert "'changes_5' is none of the judge's operating points (changes_10)" in message
    succeed("calibrate", judge, "--bench", tmp_path / "c", "--risk", 0.5)
    assert [*Judge.from_pretrained(judge).info.operating_points] == ["changes_50"]
    message = fail("calibrate", judge, "--bench", tmp_path / "c", "--risk", 0.02)
    assert "`risk` 0.02: no threshold in" in message
    assert "changed so few of 30 answers that this can be promised. At least 49 answers are needed." in message
    message = fail("calibrate", judge, "--bench", tmp_path / "c", "--risk", 0.06)
    assert "Measure lower thresholds. Or allow a higher risk." in message
    assert "has no quality-results.json" in fail("calibrate", judge, "--bench", tmp_path)
    views = (tmp_path / "b" / "views.jsonl").read_text()
    succeed(*command, *rules, "--ask")  # again: nothing is decoded and nobody is asked
    assert (tmp_path / "b" / "views.jsonl").read_text() == views
    assert json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"] == quality


def test_bench_with_questions_about_the_answers(succeed, pair_folders, tmp_path, monkeypatch):
    """What the target replies is the result of an answer. It is not asked again about the same text."""
    rows = [{"prompt": f"what is {i}?", "check": "questions", "questions": ["Why?"]} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Asked, "_reply", lambda self, ids: (f"Answer: {int(ids[0].sum()) % 7}",))
    monkeypatch.setattr("hf_selfjudge.scoring.asking.context_of", lambda model: None)
    monkeypatch.setattr(CheckedAnswer, "__new__", lambda cls, text, finished: tuple.__new__(cls, (text, True)))
    command = ("bench", "--pair", pair_folders, "--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "b")
    command += ("--dtype", "float32", "--max-new-tokens", 12, "--rule", "margin=99")
    succeed(*command)
    rows = [json.loads(line) for line in (tmp_path / "b" / "views.jsonl").read_text().splitlines()]
    assert {row["measure"] for row in rows} == {"replies"}
    quality = json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"]
    finals = {row["setting"]: row["final_answers"] for row in quality["settings"]}
    assert finals["lossless"]["unchanged"] == [1, 1, 1]
    assert finals["margin=99"]["unchanged"][0] < 1
    monkeypatch.setattr(Asked, "_reply", None)
    succeed(*command)


@pytest.mark.heavy
def test_bench_of_timing(succeed, bench, tmp_path):
    command, rules = bench
    succeed(*command, *rules, "--max-new-tokens", 8)  # how often coins accept
    succeed(*command, *rules, "--max-new-tokens", 8, "--mode", "timing", "--repeats", 2, "--spec-bench")
    timing = json.loads((tmp_path / "b" / "timing-results.json").read_text())["timing"]
    assert (timing["prompts"], timing["repeats"], len(timing["settings"])) == (6, 2, 13)
    stock = next(row for row in timing["settings"] if row["setting"] == "stock")
    assert stock["speed_over_stock"] == [1, 1, 1]
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


def test_bench_with_prompt_lookup(succeed, pair_folders, questions, tmp_path):
    succeed(
        *("bench", "--pair", pair_folders, "--prompts", questions, "--output", tmp_path / "b", "--dtype", "float32"),
        *("--max-new-tokens", 24, "--lookup", 4, "--limit", 3),
    )
    rows = json.loads((tmp_path / "b" / "quality-results.json").read_text())["quality"]["settings"]
    families = {row["family"] for row in rows}
    assert families == {"lossless", "greedy", "stock", "top-k", "margin", "look-ahead", "coin"}
    assert {row["draft_forwards"] for row in rows} == {0}
    assert json.loads((tmp_path / "b" / "quality.json").read_text())["draft_length"] == 4


@pytest.mark.parametrize(
    ("options", "judge"),
    [((), "qwen2.5-coder-1.5b-selfjudge"), (("--lookup", "10"), "qwen2.5-coder-1.5b-lookup-selfjudge")],
)
def test_a_bench_takes_the_judge_that_is_shipped_for_what_drafts(
    fail, questions, tmp_path, monkeypatch, options, judge
):
    loaded = []

    def refuse(folder):
        loaded.append(Path(folder).name)
        raise ValueError("enough")

    monkeypatch.setattr(Judge, "from_pretrained", refuse)
    fail("bench", "--prompts", questions, "--output", tmp_path / "b", "--rule", "judge=0.3", *options)
    assert loaded == [judge]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--rule", "margins=1"), "`rule` must be"),
        (("--rule", "judge=0.3"), "no judge is shipped"),
        (("--rule", "judge:nowhere=0.3"), "nowhere"),
        (("--rule", "kl=1", "--lookup", 3), "with prompt lookup there is none"),
        (("--mode", "fast"), "`mode` must be one of"),
        (("--spec-bench",), "`mode` timing"),
        (("--compile-draft",), "`mode` timing"),
        (("--compile-draft", "--mode", "timing", "--lookup", "4"), "without `lookup`"),
        (("--draft-length", "auto"), "goes by the clock"),
        (("--draft-length", "8", "--lookup", "4"), "with `--lookup N` it is N"),
        (("--prompts", "nowhere.jsonl"), "could not be read"),
    ],
)
def test_a_bench_that_cannot_be_is_refused_before_models_load(fail, questions, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(options, "load_pair", None)
    on = ("--pair", "no,models", "--prompts", questions, "--output", tmp_path / "b", "--rule", "margin=1")
    assert message in fail("bench", *on, *wrong)
