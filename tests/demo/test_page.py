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
    Accepted,
    RecordingRule,
    StreamedAnswer,
    coloured_parts,
    judged_rows,
    marked_differences,
    measured_line,
    stream_answer,
)
from hf_selfjudge.demo.page import RULES, WAITING, build
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import Lossless
from tests.builders import Pace, perturbed, random_judge


@pytest.fixture
def parts(llama, tokenizer):
    target, draft = llama
    return Pair(target, draft, tokenizer), random_judge(target)


def test_streamed_text_is_what_generate_gives(parts, prompt):
    pair, judge = parts
    for threshold in (0.5, "0.2/token", 0):
        judged = JudgedModel(pair.target, JudgeRule(judge, threshold), tokenizer=pair.tokenizer)
        expected = judged.generate(prompt, assistant_model=pair.draft, max_new_tokens=40, do_sample=False)
        seen = [len(answer.ids) for answer in stream_answer(pair, RecordingRule(judge, threshold), prompt, 40)]
        *_, last = stream_answer(pair, RecordingRule(judge, threshold), prompt, 40)
        assert seen == sorted({*seen})
        assert len(seen) == judged.stats.rounds == last.rounds
        assert last.ids == expected[0, prompt.shape[1] :].tolist()
        assert last.sources == judged.stats.sources
        assert bool(last.judged) == (threshold != 0)
        for place, (token, choice, cost) in last.judged.items():
            assert token == last.ids[place] != choice
            assert 0 <= cost <= 1 if threshold == "0.2/token" else 0 <= cost <= threshold


def test_sources_are_right_where_the_end_of_the_text_cuts_a_draft(parts, prompt):
    own, judge = parts[0].target, parts[1]
    target, draft = copy.copy(own), perturbed(own, noise=0.0)
    pair = Pair(target, draft, parts[0].tokenizer)
    free = target.generate(prompt, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    for end in dict.fromkeys(free):
        target.generation_config = copy.deepcopy(own.generation_config)
        target.generation_config.eos_token_id = end
        *_, last = stream_answer(pair, RecordingRule(judge, 0), prompt, 20)
        judged = JudgedModel(target, Lossless(), tokenizer=pair.tokenizer)
        judged.generate(prompt, assistant_model=draft, max_new_tokens=20)
        assert last.sources == judged.stats.sources
        assert last.ids == free[: free.index(end) + 1]


def test_closing_the_iterator_stops_decoding(parts, prompt):
    pair, judge = parts
    before = threading.active_count()
    going = stream_answer(pair, RecordingRule(judge, 0.5), prompt, 200)
    assert len(next(going).ids) < 20
    going.close()
    assert threading.active_count() == before


def test_an_error_in_decoding_arrives(parts, prompt):
    pair, judge = parts

    class Broken(RecordingRule):
        def keep(self, mismatches):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(stream_answer(pair, Broken(judge), prompt, 40))


def test_the_same_settings_sample_the_same_text(parts, prompt):
    pair, judge = parts
    runs = [list(stream_answer(pair, RecordingRule(judge, 0.5), prompt, 30, t)) for t in (1.0, 1.0, 0.0)]
    texts = [run[-1].ids for run in runs]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_shown(parts, prompt):
    pair, judge = parts
    *_, last = stream_answer(pair, RecordingRule(judge, 0.6), prompt, 40)
    shown = coloured_parts(pair.tokenizer, last)
    assert "".join(text for text, _ in shown) == pair.tokenizer.decode(last.ids, skip_special_tokens=True)
    assert {name for _, name in shown} <= {"draft, matched", "draft, judged", "target"}
    assert len(judged_rows(pair.tokenizer, last)) == len(last.judged) > 0
    assert f"**{40 / last.rounds:.2f} tokens a round**" in measured_line(last)
    first, second = (pair.tokenizer(text)["input_ids"] for text in ("sky is", "sky as on"))
    left, right = marked_differences(pair.tokenizer, first, second)
    assert left == [("sky ", None), ("i", "differs"), ("s", None)]
    assert right == [("sky ", None), ("a", "differs"), ("s", None), (" on", "differs")]


def shown_answer(tokenizer, text, judged=None, end=None):
    """The first `end` tokens of a text, one of them judged."""
    ids = tokenizer(text)["input_ids"][:end]
    sources = ["judged" if place == judged else ("matched", "target")[place % 2] for place in range(len(ids))]
    return StreamedAnswer(
        ids,
        sources,
        {judged: Accepted(ids[judged], tokenizer("x")["input_ids"][-1], 0.1)} if "judged" in sources else {},
    )


def test_what_is_shown_are_pieces_of_the_answer(byte_decoder):
    text = "the sky looks 😀 blue because ä"
    answer = shown_answer(byte_decoder, text, judged=5)
    assert "".join(part for part, _ in coloured_parts(byte_decoder, answer)) == text
    shown = ""
    for end in range(len(answer.ids) + 1):
        beginning = shown_answer(byte_decoder, text, 5, end)
        now = "".join(part for part, _ in coloured_parts(byte_decoder, beginning, growing=True))
        assert now.startswith(shown)
        assert "\ufffd" not in now
        shown = now
    other = "the sky is 😁 blue but ä"
    left, right = marked_differences(byte_decoder, answer.ids, byte_decoder(other)["input_ids"])
    assert ["".join(part for part, _ in side) for side in (left, right)] == [text, other]
    assert ("😀" in "".join(part for part, mark in left if mark), left[0][1]) == (True, None)


def test_judged_rows_show_both_tokens_as_they_are_in_the_text(byte_decoder):
    text = "the sky 😀"
    sky, smile = len(byte_decoder("the ")["input_ids"]), len(byte_decoder(text)["input_ids"]) - 1
    for place, shown in ((sky, "'s'"), (smile, "'😀'")):
        ((at, token, choice, cost),) = judged_rows(byte_decoder, shown_answer(byte_decoder, text, judged=place))
        assert (at, token, choice, cost) == (place + 1, shown, "'x'", 0.1)
    ((_, part, *_),) = judged_rows(byte_decoder, shown_answer(byte_decoder, text, judged=smile - 1))
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
        job = client.submit(prompt, "judge", 0, 0, 24, api_name="/generate")
        shown, line, _ = job.result(timeout=120)
        assert "tokens a round" in line
        assert len(job.outputs()) > 1
        return "".join(part["token"] for part in shown)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = pair.tokenizer(prompt, return_tensors="pt")["input_ids"]
        judged = JudgedModel(pair.target, JudgeRule(judge, 0), tokenizer=pair.tokenizer)
        output = judged.generate(ids, assistant_model=pair.draft, max_new_tokens=24, do_sample=False)
        assert text == pair.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_visitor_is_told_that_the_queue_is_full(parts, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pair, judge = parts
    pace = Pace(pair.target)
    made = build(Pair(pace.model, pair.draft, pair.tokenizer), judge, "me/tiny-judge")
    made.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
    pace.hold_from(1)
    ask = {
        "prompt": "why?",
        "rule": "judge",
        "threshold": 0,  # the text of a judge may depend on measured times
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
        texts = ["".join(part["token"] for part in job.result(timeout=120)[0]) for job in jobs]
        assert len({*texts}) == 1
    finally:
        pace.gate.set()
        made.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "judge", 0.5, 0, 24), "Write a prompt first"),
        (("x" * 5000, "judge", 0.5, 0, 24), "Shorten it"),
        (("x" * 300, "judge", 0.5, 0, 24), "exceeds the target's context"),
        (("x", "judge", -1, 0, 24), "less than minimum"),
        (("x", "judge", 3, 0, 24), "greater than maximum"),
        (("x", "judge", 0.5, 9, 24), "greater than maximum"),
        (("x", "judge", 0.5, 0, 100000), "greater than maximum"),
        (("x", "luck", 0.5, 0, 24), "luck"),
    ],
)
def test_mistakes_end_in_a_sentence(page, arguments, message):
    client = Client(page.local_url, verbose=False)
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name="/generate")


def test_the_prompt_in_an_error_is_text(parts, monkeypatch):
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


def test_the_code_to_copy_has_no_path_of_this_machine(parts, tmp_path):
    pair, judge = parts
    made = build(pair, judge, f'{tmp_path}/my "judge"')
    code = next(function.fn for function in made.fns.values() if function.name == "code")
    text = code("judge", 0.5, 0, 24)
    assert str(tmp_path) not in text
    assert 'from_pretrained(target, "./my \\"judge\\"", threshold=0.5)' in text
    assert 'threshold="0.03/token")' in code("judge per token", 0.03, 0, 24)
    for rule in RULES:
        compile(code(rule, 0.5, 0.7, 24), rule, "exec")


def test_compare(page):
    client = Client(page.local_url, verbose=False)
    first, second, told = client.predict("why is it so?", "judge", 0.6, 24, api_name="/compare")
    assert "".join(part["token"] for part in first)
    assert "".join(part["token"] for part in second)
    assert "**lossless**" in told
    assert "**with judge**" in told


@pytest.mark.heavy
def test_memory_does_not_grow(parts, prompt):
    pair, judge = parts

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    list(stream_answer(pair, RecordingRule(judge, 0.5), prompt, 8))
    before = tensors()
    for _ in range(100):
        list(stream_answer(pair, RecordingRule(judge, 0.5), prompt, 8))
    assert tensors() <= before + 5
