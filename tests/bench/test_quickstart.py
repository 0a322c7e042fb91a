"""The quickstart: three decodings of the same prompts, and how they are shown."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from hf_selfjudge.bench.answers import AnswerRecord
from hf_selfjudge.bench.quickstart import (
    Prices,
    coloured_answer,
    conclusions,
    figures,
    quickstart_table,
    run_quickstart,
    visible_threshold,
)
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.decoding.stats import Stats
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.models.pair import Pair
from tests.builders import perturbed, random_judge


PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["why is it so?", "what is this", "a"])]


def test_decodings_side_by_side(llama, tokenizer):
    target, draft = llama
    pair, judge = Pair(target, draft, tokenizer), random_judge(target)
    records = run_quickstart(pair, PROMPTS, judge, 1, 5, 24)
    names = ["greedy", "assisted", "lossless", "judged"]
    assert [record.method for record in records] == names * 3
    results = figures(records, PROMPTS, tokenizer)
    runs = {run["decoding"]: run for run in results["runs"]}
    assert runs["greedy"]["tokens_per_round"] == 1
    assert runs["judged"]["tokens_per_round"] > runs["assisted"]["tokens_per_round"] > 1
    for name in ("greedy", "assisted", "lossless"):
        assert runs[name]["agreement"] == 1 > runs["judged"]["agreement"]
        assert runs[name]["judged_share"] == 0 < runs["judged"]["judged_share"]
        assert 0 > runs[name]["logprob_per_token"] == runs["greedy"]["logprob_per_token"]
    assert runs["judged"]["logprob_per_token"] < runs["greedy"]["logprob_per_token"]
    assert 0 < sum(runs["judged"][f"{part}_share"] for part in ("draft", "verify", "rule")) < 1
    assert "draft_share" not in runs["assisted"]


def test_a_faster_draft_is_for_lossless_and_judged_decoding(llama, tokenizer):
    """The quickstart uses one with low-bit weights; this one proposes other tokens."""
    target, draft = llama
    pair, judge = Pair(target, draft, tokenizer), random_judge(target)
    other = perturbed(target, 0.5)
    records = run_quickstart(pair, PROMPTS[:2], judge, 0, 4, 24, fast_draft=other)
    runs = {run["decoding"]: run for run in figures(records, PROMPTS[:2], tokenizer)["runs"]}
    assert {run["agreement"] for run in runs.values()} == {1}  # the threshold is 0
    assert runs["assisted"]["tokens_per_round"] > runs["lossless"]["tokens_per_round"]
    assert runs["lossless"]["tokens_per_round"] == runs["judged"]["tokens_per_round"]


def record(name, prompt, seconds, tokens=(5,)):
    return AnswerRecord(name, prompt, 0, None, [*tokens], True, seconds, -1.0, [1], 0)


def test_ratios_of_seconds_and_final_answers(tokenizer):
    prompts = [Prompt("0", "how many?", check="number"), Prompt("1", "how many?", check="number"), Prompt("2", "why?")]
    answers = {"greedy": ("it is 4", "it is 5", "so"), "lossless": ("it is 4", "it is 5", "so")}
    answers |= {"assisted": ("it is 4", "it is 5", "so"), "judged": ("it is 6", "it is 5.0", "or")}
    seconds = {"greedy": (2.0, 2.0, 2.0), "assisted": (4.0, 4.0, 4.0), "lossless": (1.0, 1.0, 2.0)}
    seconds |= {"judged": (1.0, 1.0, 1.0)}
    records = [
        record(name, str(i), seconds[name][i], tokenizer(answers[name][i])["input_ids"])
        for i in range(3)
        for name in answers
    ]
    results = figures(records, prompts, tokenizer)
    runs = {run["decoding"]: run for run in results["runs"]}
    assert runs["assisted"]["speed_against_greedy"] == (0.5, 0.5, 0.5)
    assert runs["judged"]["speed_against_greedy"] == (2, 2, 2)
    assert results["judged_against_lossless"] == pytest.approx((4 / 3, 1, 2))
    assert runs["greedy"]["final_answers"] == runs["lossless"]["final_answers"] == [2, 2]
    assert runs["judged"]["final_answers"] == [1, 2]
    first, second, _ = conclusions(results)
    assert first == "The fastest here: judged decoding, 2.00 [2.00, 2.00] times as fast as greedy."
    assert "1.33 [1.00, 2.00] times the speed of lossless decoding (too few prompts to tell). It kept 1 of 2" in second
    for row in runs.values():
        row["final_answers"] = [0, 0]
    results |= {"answers": 5, "judged_against_lossless": (1.3, 1.1, 1.5)}
    assert "(a clear difference). It kept " in conclusions(results)[1]
    assert "final answers" not in conclusions(results)[1]
    results["judged_against_lossless"] = (1.3, 0.9, 1.5)
    assert "(no clear difference)" in conclusions(results)[1]


def test_what_prices_mean():
    dear = Prices(step=1.0, verification=1.0, draft=0.02)
    assert dear.speed(0) == 1
    assert dear.speed(4) == pytest.approx((1 - 0.8**5) / 0.2 / 1.08)
    assert "drafts of 11 tokens are the fastest: about 3.8 times as fast as greedy." in dear.sentences()
    assert Prices(step=1.0, verification=0.9, draft=0.01).speed(16) < 5  # a verification that seems cheaper is noise
    assert "80% of drafted tokens are kept, greedy decoding is the fastest." in Prices(1.0, 6.0, 0.9).sentences()
    sentences = Prices(step=0.112, verification=0.15, draft=0.03).sentences()
    assert sentences.startswith(
        "One token costs the target 112 ms. Checking 5 drafted tokens costs 1.34 times as much"
    )


def test_prices_are_measured(llama):
    prices = Prices.measure(*llama)
    assert min(prices.step, prices.verification, prices.draft) > 0


def test_the_threshold_that_shows_something(llama):
    judge = random_judge(llama[0])
    assert visible_threshold(judge) == judge.info.threshold
    bins = [{"probability": probability} for probability in (0.1, 0.3, 0.4567, 0.8)]
    judge.info = replace(judge.info, training={"held_out": {"reliability": bins}})
    assert visible_threshold(judge) == Threshold(0.457)
    bins[2]["probability"] = 0.00012345
    assert visible_threshold(judge) == Threshold(0.000123)


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
