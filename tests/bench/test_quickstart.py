"""The quickstart: three decodings of the same prompts, and how they are shown."""

import io

import pytest
from rich.console import Console

from hf_selfjudge.bench.answers import AnswerRecord
from hf_selfjudge.bench.quickstart import coloured_answer, figures, quickstart_table, run_quickstart, speed_lines
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.decoding.stats import Stats
from hf_selfjudge.models.pair import Pair
from tests.builders import perturbed, random_judge


PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["why is it so?", "what is this", "a"])]


def test_decodings_side_by_side(llama, tokenizer):
    target, draft = llama
    pair, judge = Pair(target, draft, tokenizer), random_judge(target)
    records = run_quickstart(pair, PROMPTS, judge, 1, 5, 24)
    names = ["greedy", "assisted", "judged"]
    assert [record.method for record in records] == names * 3
    results = figures(records)
    runs = {run["decoding"]: run for run in results["runs"]}
    assert runs["greedy"]["tokens_per_round"] == 1
    assert runs["judged"]["tokens_per_round"] > runs["assisted"]["tokens_per_round"] > 1
    assert runs["greedy"]["agreement"] == runs["assisted"]["agreement"] == 1 > runs["judged"]["agreement"]
    assert runs["greedy"]["judged_share"] == runs["assisted"]["judged_share"] == 0 < runs["judged"]["judged_share"]
    assert runs["judged"]["logprob_per_token"] < runs["greedy"]["logprob_per_token"] < 0
    assert runs["greedy"]["logprob_per_token"] == runs["assisted"]["logprob_per_token"]
    assert 0 < sum(runs["judged"][f"{part}_share"] for part in ("draft", "verify", "rule")) < 1
    assert "draft_share" not in runs["assisted"]


def test_a_second_draft(llama, tokenizer):
    """The quickstart uses one with int8 weights; this one proposes other tokens."""
    target, draft = llama
    pair, judge = Pair(target, draft, tokenizer), random_judge(target)
    records = run_quickstart(pair, PROMPTS[:2], judge, 0, "auto", 24, int8_draft=perturbed(target, 0.1))
    results = figures(records)
    assert [run["decoding"] for run in results["runs"]] == ["greedy", "assisted", "judged", "judged, int8 draft"]
    assert {run["agreement"] for run in results["runs"]} == {1}  # the threshold is 0
    assert [line.partition(":")[0] for line in speed_lines(results)] == ["judged", "judged, int8 draft"]
    assert results["speed_against_assisted"]["assisted"] == (1, 1, 1)


def test_ratio_of_seconds():
    seconds = {"greedy": (1.0, 4.0), "assisted": (2.0, 4.0)}
    records = [
        AnswerRecord(name, str(i), 0, None, [1], True, value, -1.0, [1], 0)
        for name, values in seconds.items()
        for i, value in enumerate(values)
    ]
    assert figures(records)["speed_against_assisted"]["greedy"] == pytest.approx((1.2, 1.0, 2.0))


def test_answers_are_printed_as_they_are(byte_decoder):
    """The pieces join to the answer and are never read as markup."""
    text = "the [/INST] sky :smile: 😀 looks blue \x1b[31m"
    ids = byte_decoder(text)["input_ids"]
    stats = Stats(sources=[("target", "matched", "judged")[i % 3] for i in range(len(ids))])
    record = AnswerRecord("judged", "[b]", 0, None, ids, True, 1.0, -1.0, [1], 1, stats)
    for options in ({}, {"markup": False, "emoji": False}):
        console = Console(file=io.StringIO(), width=200, **options)
        console.print(coloured_answer(record, Prompt("[b]", "[red]why :smile:"), byte_decoder))
        shown = console.file.getvalue()
        assert text.replace("\x1b", "␛") + "\n" in shown
        assert "[red]why :smile:" in shown
        console.print(quickstart_table({"runs": []}, "[bold] :smile:"))
        assert "[bold] :smile:" in console.file.getvalue()
