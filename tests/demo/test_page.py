"""The page, on the tiny pair: it streams what `generate` gives, and visitors do not get in each other's way."""

import copy
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gradio_client import Client

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.demo.answer import (
    RecordingRule,
    Token,
    coloured_parts,
    judged_rows,
    marked_differences,
    measured_line,
    plot_rounds,
    stream_answer,
)
from hf_selfjudge.demo.page import RULES, WAITING, build, rule_of
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import KLGate, Lossless, Margin
from tests.builders import Pace, perturbed, random_judge


@pytest.fixture
def parts(llama, tokenizer):
    target, draft = llama
    return Pair(target, draft, tokenizer), random_judge(target)


def test_streamed_text_is_what_generate_gives(parts, prompt):
    pair, judge = parts
    for rule in (JudgeRule(judge, 0.5), Margin(1.0), Lossless()):
        judged = JudgedModel(pair.target, rule, tokenizer=pair.tokenizer)
        expected = judged.generate(prompt, assistant_model=pair.draft, max_new_tokens=40, do_sample=False)
        seen = [(len(answer.tokens), sum(answer.rounds)) for answer in stream_answer(pair, rule, prompt, 40)]
        *_, last = stream_answer(pair, rule, prompt, 40)
        assert len(seen) == judged.stats.rounds == len(last.rounds)
        assert all(tokens == rounds for tokens, rounds in seen)
        assert [token.id for token in last.tokens] == expected[0, prompt.shape[1] :].tolist()
        assert [token.source for token in last.tokens] == judged.stats.sources
        for token in last.judged:
            assert token.choice != token.id
            assert 0 <= token.cost <= (0.5 if isinstance(rule, JudgeRule) else 1.0)


def test_who_decided_is_told_where_the_end_of_the_text_cuts_a_draft(parts, prompt):
    own = parts[0].target
    target, draft = copy.copy(own), perturbed(own, noise=0.0)
    pair = Pair(target, draft, parts[0].tokenizer)
    free = target.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    for end in dict.fromkeys(free):
        target.generation_config = copy.deepcopy(own.generation_config)
        target.generation_config.eos_token_id = end
        *_, last = stream_answer(pair, Lossless(), prompt, 20)
        judged = JudgedModel(target, Lossless(), tokenizer=pair.tokenizer)
        judged.generate(prompt, assistant_model=draft, max_new_tokens=20)
        assert [token.source for token in last.tokens] == judged.stats.sources
        assert [token.id for token in last.tokens] == free[: free.index(end) + 1]


def test_whoever_stops_listening_stops_it(parts, prompt):
    pair, judge = parts
    before = threading.active_count()
    going = stream_answer(pair, JudgeRule(judge, 0.5), prompt, 200)
    assert len(next(going).tokens) < 20
    going.close()
    assert threading.active_count() == before


def test_an_error_in_decoding_arrives(parts, prompt):
    pair, _ = parts

    class Broken(Lossless):
        def accept(self, candidate):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(stream_answer(pair, Broken(), prompt, 40))


def test_sampling_follows_its_seed(parts, prompt):
    pair, judge = parts
    runs = [list(stream_answer(pair, JudgeRule(judge, 0.5), prompt, 30, 1.0, seed)) for seed in (1, 1, 2)]
    texts = [[token.id for token in run[-1].tokens] for run in runs]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_shown(parts, prompt):
    pair, judge = parts
    *_, last = stream_answer(pair, JudgeRule(judge, 0.6), prompt, 40)
    shown = coloured_parts(pair.tokenizer, last.tokens)
    whole = pair.tokenizer.decode([token.id for token in last.tokens], skip_special_tokens=True)
    assert "".join(text for text, _ in shown) == whole
    assert {name for _, name in shown} <= {"draft, matched", "draft, judged", "target"}
    assert len(judged_rows(pair.tokenizer, last.tokens)) == len(last.judged) > 0
    assert f"**{40 / len(last.rounds):.2f} tokens a round**" in measured_line(last)
    first, second = (
        [Token(i, "matched") for i in pair.tokenizer(text)["input_ids"]] for text in ("sky is", "sky as on")
    )
    left, right = marked_differences(pair.tokenizer, first, second)
    assert left == [("sky ", None), ("i", "differs"), ("s", None)]
    assert right == [("sky ", None), ("a", "differs"), ("s", None), (" on", "differs")]
    assert len(plot_rounds({"lossless": [3, 4], "judge": [5]}).axes) == 2
    made = {type(rule_of(name, 0.5, judge)) for name in RULES}
    assert rule_of("judge per token", 0.03, judge).threshold == Threshold(0.03, per_token=True)
    assert made == {JudgeRule, KLGate, Lossless, Margin}
    with pytest.raises(ValueError, match="`rule` must be one of judge, judge per token, lossless"):
        rule_of("luck", 0.5, judge)
    assert RecordingRule(JudgeRule(judge)).special_tokens == judge.info.special_tokens


def shown_tokens(tokenizer, text, judged=None):
    ids = tokenizer(text)["input_ids"]
    choice = tokenizer("x")["input_ids"][-1]
    sources = ["judged" if place == judged else ("matched", "target")[place % 2] for place in range(len(ids))]
    return [
        Token(i, source, *([choice, 0.1] if source == "judged" else []))
        for i, source in zip(ids, sources, strict=True)
    ]


def test_what_is_shown_are_pieces_of_the_answer(byte_decoder):
    text = "the sky looks 😀 blue because ä"
    tokens = shown_tokens(byte_decoder, text, judged=5)
    assert "".join(part for part, _ in coloured_parts(byte_decoder, tokens)) == text
    shown = ""
    for end in range(len(tokens) + 1):
        now = "".join(part for part, _ in coloured_parts(byte_decoder, tokens[:end], growing=True))
        assert now.startswith(shown)
        assert "\ufffd" not in now
        shown = now
    other = "the sky is 😁 blue but ä"
    left, right = marked_differences(byte_decoder, tokens, shown_tokens(byte_decoder, other))
    assert ["".join(part for part, _ in side) for side in (left, right)] == [text, other]
    assert ("😀" in "".join(part for part, mark in left if mark), left[0][1]) == (True, None)


def test_a_judged_token_stands_beside_the_choice_as_both_are_in_the_text(byte_decoder):
    text = "the sky 😀"
    sky, smile = len(byte_decoder("the ")["input_ids"]), len(byte_decoder(text)["input_ids"]) - 1
    for place, shown in ((sky, "'s'"), (smile, "'😀'")):
        ((at, token, choice, cost),) = judged_rows(byte_decoder, shown_tokens(byte_decoder, text, judged=place))
        assert (at, token, choice, cost) == (place + 1, shown, "'x'", 0.1)
    ((_, part, *_),) = judged_rows(byte_decoder, shown_tokens(byte_decoder, text, judged=smile - 1))
    assert "\ufffd" not in part


@pytest.fixture
def page(parts, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pair, judge = parts
    made = build(pair, judge, "me/tiny-judge")
    made.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
    yield made
    made.close()


@pytest.mark.heavy
def test_eight_clients_at_once(parts, page):
    pair, judge = parts
    prompts = [f"why is {i} not {i + 1}?" for i in range(8)]

    def ask(prompt):
        client = Client(page.local_url, verbose=False)
        job = client.submit(prompt, "judge", 0.5, 0, 24, api_name="/generate")
        shown, line, _ = job.result(timeout=120)
        assert "tokens a round" in line
        assert len(job.outputs()) > 1
        return "".join(part["token"] for part in shown)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = pair.tokenizer(prompt, return_tensors="pt")["input_ids"]
        judged = JudgedModel(pair.target, JudgeRule(judge, 0.5), tokenizer=pair.tokenizer)
        output = judged.generate(ids, assistant_model=pair.draft, max_new_tokens=24, do_sample=False)
        assert text == pair.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_who_comes_when_the_queue_is_full_is_told(parts, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pair, judge = parts
    pace = Pace(pair.target)
    made = build(Pair(pace.model, pair.draft, pair.tokenizer), judge, "me/tiny-judge")
    made.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
    pace.hold_from(1)
    ask = {
        "prompt": "why?",
        "rule": "judge",
        "threshold": 0.5,
        "temperature": 0,
        "length": 24,
        "api_name": "/generate",
    }
    client = Client(made.local_url, verbose=False)
    end = time.monotonic() + 60

    def until(condition):
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    try:
        jobs = [client.submit(**ask)]
        until(lambda: pace.calls)  # decoding has begun, and waits
        jobs += [client.submit(**ask) for _ in range(WAITING)]
        until(lambda: len(made._queue) == WAITING)
        with pytest.raises(Exception, match="Queue is full"):
            client.predict(**ask)
        pace.gate.set()
        assert len({str(job.result(timeout=120)[0]) for job in jobs}) == 1
    finally:
        pace.gate.set()
        made.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "judge", 0.5, 0, 24), "Write a prompt first"),
        (("x" * 5000, "judge", 0.5, 0, 24), "Shorten it"),
        (("x" * 300, "judge", 0.5, 0, 24), "longer than the model can read"),
        (("x", "margin", -1, 0, 24), "less than minimum"),
        (("x", "judge", 0.5, 0, 100000), "greater than maximum"),
        (("x", "judge", 3, 0, 24), r"`threshold` must be in \[0, 1\]"),
        (("x", "luck", 0.5, 0, 24), "luck"),
    ],
)
def test_mistakes_are_told_in_words(page, arguments, message):
    client = Client(page.local_url, verbose=False)
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name="/generate")


def test_what_a_mistake_tells_of_the_prompt_is_text(parts, monkeypatch):
    """Errors are shown as HTML."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pair, judge = parts
    strict = copy.deepcopy(pair.tokenizer)
    strict.chat_template = "{{ raise_exception(messages[0].content) }}"
    made = build(Pair(pair.target, pair.draft, strict), judge, "me/tiny-judge")
    made.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
    try:
        with pytest.raises(Exception, match="the chat template does not take .*&lt;img src=x&gt;"):
            Client(made.local_url, verbose=False).predict("<img src=x>", "judge", 0.5, 0, 24, api_name="/generate")
    finally:
        made.close()


def test_the_code_to_copy_tells_nothing_of_this_machine(parts, tmp_path):
    pair, judge = parts
    made = build(pair, judge, f'{tmp_path}/my "judge"')
    code = next(function.fn for function in made.fns.values() if function.name == "code")
    text = code("judge", 0.5, 0, 24)
    assert str(tmp_path) not in text
    assert 'from_pretrained(target, "./my \\"judge\\"", threshold=0.5)' in text
    assert 'threshold="0.03/token")' in code("judge per token", 0.03, 0, 24)
    for rule in RULES:
        text = code(rule, 5, 0.7, 24)
        compile(text, rule, "exec")
        assert ("tokenizer=tokenizer" in text) == (not rule.startswith("judge"))
    assert "from hf_selfjudge.rules import Margin\n" in code("margin", 5, 0.7, 24)


def test_compare(page):
    client = Client(page.local_url, verbose=False)
    first, second, bars, told = client.predict("why is it so?", "judge", 0.6, 24, api_name="/compare")
    assert "".join(part["token"] for part in first)
    assert "".join(part["token"] for part in second)
    assert bars["type"] == "matplotlib"
    assert "**lossless**" in told
    assert "**with judge**" in told


@pytest.mark.heavy
def test_memory_does_not_grow(parts, prompt):
    pair, judge = parts

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    list(stream_answer(pair, JudgeRule(judge, 0.5), prompt, 8))
    before = tensors()
    for _ in range(100):
        list(stream_answer(pair, JudgeRule(judge, 0.5), prompt, 8))
    assert tensors() <= before + 5
