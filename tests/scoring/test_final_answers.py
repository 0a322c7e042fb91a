"""Final answers: how they are read from a text, compared, and scored."""

import json

import pytest

from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.scoring.checks import CHECKS, CheckedAnswer
from hf_selfjudge.scoring.final_answers import calls_of, final_call, final_choice, final_span, final_value, normalised


LETTERS = "Which one?\nI. this\nA. old\nB. list\nOptions:\nA. a cat\nB. 1\nC. -1\n(D) the dog\nE. a cat"
WORDS = "Is it?\nOptions:\n- Yes\n- No \n- not valid"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Answer: B", "B"),
        ("Because it is one.\n\n**Answer:** B", "B"),
        ("**Answer: (B)**", "B"),
        ("Answer:\n\n B. 1", "B"),
        ("answer: [C], since it is less", "C"),
        ("Answer: A is wrong.\nAnswer: `B`", "B"),
        (r"Answer: \boxed{B}", "B"),
        (r"So we get $\boxed{\text{C}}$.", "C"),
        ("The answer is **D**.", "D"),
        ("Answer: The correct option is (D) the dog", "D"),
        ("Answer: The dog", "D"),
        ("Answer: -1", "C"),
        ("Answer: 'B'", "B"),
        ("Answer: Option B", "B"),
        ("**Option B** is wrong. The right choice is: option C.", "C"),
        (r"$\boxed{\text{Option B}}$", "B"),
        ("**Final Answer:**\n\\[\n\\boxed{B}\n\\]", "B"),
        ("Answer:\n```\nB\n```", "B"),
        ("Answer: (b)", "B"),
        ("Answer：b", "B"),
        ("Answer: B because it is one", "B"),
        ("Answer: B\nNote: my answer: it fits.", "B"),
        ("Answer: A kilogram", None),  # an article
        ("Answer: I think so", None),
        ("Answer: I", None),  # of a list before the options
        ("Answer: A and B", None),
        ("Answer: A or (B)", None),
        ("Answer: A, B", None),
        ("Answer: A B", None),
        ("Answer: B. -1", None),  # the letter of one, the text of another
        ("Answer: D. a dog", "D"),
        ("Answer: B. the dog", None),
        ("Answer: A is the right option", "A"),
        ("Answer: E. a cat", "E"),
        ("Answer: a cat", None),  # two options have this text
        ("Answer: F", None),
        ("Answer: Apple", None),
        ("Answer: none of them", None),
        ("Answer:", None),
        ("B", None),
        ("", None),
    ],
)
def test_letters(text, choice):
    assert final_choice(text, LETTERS) == choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Answer: yes", "yes"),
        ("Answer: **No**.", "no"),
        ("Answer: Yes, you return to the start", "yes"),
        ("Answer: not valid", "not valid"),
        ("The statement is not valid", "not valid"),
        ("Answer: Yes or No", None),
        ("Answer: a clear yes", "yes"),
        ("Answer: nobody", None),
        ("Answer: True", None),
    ],
)
def test_words(text, choice):
    assert final_choice(text, WORDS) == choice


def test_the_last_list_of_a_question_has_its_options():
    facts = "- Tom is tall\n- Bob is short"
    assert final_choice("Answer: B", f"{facts}\nWho is?\nA. Tom\nB. Bob") == "B"
    assert final_choice("Answer: B", f"A. Tom\nB. Bob\nSay:\n{facts}") is None


def test_a_question_without_options():
    assert [final_choice(f"Answer: {said}", "Well?") for said in ("True", "(C)", "maybe")] == ["true", "C", None]


def test_spans():
    assert final_span('It says "…".\nAnswer: The Laboratory Schools.\nI hope this helps.') == "laboratory schools"
    assert final_span("Answer: **1983**") == final_span("The answer is: 1983") == "1983"
    assert final_span("Answer: The") == "the"
    assert final_span("1983") is final_span("Answer: ") is None
    assert normalised("The  U.S. a b") == "us b"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("$1.50", "$150"),
        ("1/2", "12"),
        ("19-20", "1920"),
        ("C++", "C"),
        ("x < 5", "x > 5"),
        ("10:30", "1030"),
    ],
)
def test_spans_that_differ_in_punctuation_alone(one, other):
    assert len({final_span(f"Answer: {said}") for said in (one, other)}) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [("1,345,596", "1345596"), ("19–20", "19-20"), ("about 27%.", "about 27 %"), ("−5", "-5"), ("co-op", "coop")],
)
def test_spans_that_do_not(one, other):
    assert final_span(f"Answer: {one}") == final_span(f"Answer: {other}") is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("`'a b'`", "a b"),
        ("'it''s.'.", "its."),
        ("**[1, 2]**", [1, 2]),
        ("```python\n{'a': (1, 2)}\n```", {"a": (1, 2)}),
        ("\n\n{1: False}", {1: False}),
        ("5.0", 5),  # equal in Python
        ("true", True),
        ("hello", "hello"),
        ("None", None),
        ("[\n 1,\n 2\n]", [1, 2]),
        ("`[1, 2]`, since it is a list", [1, 2]),
        ("`abc`.", "abc"),
        ("`'abc'`.", "abc"),
        ("f('x') = 'abc'", "abc"),
        (r"\[1, 2\]", [1, 2]),
        (r"\[ 5 \]", 5),
        (r"$\boxed{\{'a': 1\}}$", {"a": 1}),
        (r"$\boxed{7}$", 7),
    ],
)
def test_values(text, value):
    assert final_value(f"Step by step.\nAnswer: {text}") == final_value(f"Answer: {value!r}") is not None


@pytest.mark.parametrize(
    "text",
    ["[1, 2", "two words", "```python\nOrderedDict(a=1)\n```", "f(3)", "'open", "", "[" * 20_000, "__import__('os')"],
)
def test_values_that_cannot_be_read(text):
    assert final_value(f"Answer: {text}") is None


def test_what_is_not_a_number_equals_itself():
    assert final_value("Answer: NaN") == final_value("Answer: `NaN`") is not None


def test_values_that_differ():
    values = ["[1, 2]", "(1, 2)", "{1, 2}", "'[1, 2]'", "{1: 2}", "1", "'1'", "None", "''", "'None'"]
    assert len({final_value(f"Answer: {value}") for value in values}) == len(values)


CALL = {"name": "geo.route", "arguments": {"start": "New York", "km": 5, "avoid": ["tolls"]}}


def test_calls():
    text = f"It fits.\n\n```json\n{json.dumps(CALL)}\n```\nDone."
    found = final_call(text)
    assert found is not None
    assert calls_of(text) == [CALL]
    for same in (
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        json.dumps([CALL]),
        json.dumps({"tool": CALL}),
        json.dumps({"name": "call", "call": CALL}),
        json.dumps(CALL | {"arguments": json.dumps(CALL["arguments"])}),
        json.dumps({"name": CALL["name"], "parameters": CALL["arguments"]}),
        json.dumps(CALL).replace("New York", "new-york").replace("5", "5.0"),
        f"```json\n{json.dumps(CALL | {'name': 'other'})}\n```\nBetter:\n{text}",  # the last block counts
    ):
        assert final_call(same) == found
    for other in (
        json.dumps(CALL | {"name": "geo.way"}),
        json.dumps(CALL).replace("5", "6"),
        json.dumps(CALL).replace('["tolls"]', '"tolls"'),
        json.dumps([CALL, CALL | {"name": "more"}]),
        json.dumps([CALL, CALL]),
    ):
        assert final_call(other) not in (None, found)
    for nothing in (
        "geo.route(5)",
        "{",
        '{"name": "x"}',
        '{"name": "x", "arguments": "{"}',
        "{" * 5000,
        json.dumps(CALL | {"arguments": {"a": json.loads("[" * 900 + "]" * 900)}}),
        '{"name": "x", "parameters": {"type": "dict", "properties": {}}}',  # a schema
        json.dumps(CALL)[:-2],
    ):
        assert final_call(nothing) is None


def test_calls_are_scored_by_their_allowed_values():
    allowed = [
        {"geo.route": {"start": ["New York", "NYC"], "km": [5], "avoid": [["tolls"], ["tolls", "ferries"], ""]}}
    ]
    prompt = Prompt("a", "Route?", check="call", references=[json.dumps(allowed)])

    def score(**changes):
        arguments = {name: value for name, value in (CALL["arguments"] | changes).items() if value is not None}
        return CHECKS["call"].score(prompt, CheckedAnswer(json.dumps(CALL | {"arguments": arguments}), True))

    assert score() == score(start="nyc") == score(avoid=None) == score(avoid=["tolls", "ferries"]) == 1
    assert score(km=None) == score(start="Boston") == score(more=1) == score(avoid=["ferries", "tolls"]) == 0
    assert CHECKS["call"].score(prompt, CheckedAnswer("no call", True)) == 0
    nested = Prompt("a", "?", check="call", references=['[{"f": {"body": [{"mode": ["A"], "fan": ["", 2]}]}}]'])
    for body, right in (({"mode": "a"}, 1), ({"mode": "a", "fan": 2}, 1), ({"fan": 2}, 0), ({"mode": "a", "x": 1}, 0)):
        text = json.dumps({"name": "f", "arguments": {"body": body}})
        assert CHECKS["call"].score(nested, CheckedAnswer(text, True)) == right
    several = [{"f": {"a": [1]}}, {"f": {"a": [1, 2]}}]
    for right in (several, several[::-1]):
        prompt = Prompt("a", "?", check="call", references=[json.dumps(right)])
        text = json.dumps([{"name": "f", "arguments": {"a": number}} for number in (1, 2)])
        assert CHECKS["call"].score(prompt, CheckedAnswer(text, True)) == 1
        assert CHECKS["call"].score(prompt, CheckedAnswer(text.replace("1", "2"), True)) == 0
    plain = Prompt("a", "?", check="call", references=[json.dumps(CALL)])
    assert CHECKS["call"].score(plain, CheckedAnswer(json.dumps(CALL), True)) == 1


@pytest.mark.parametrize(
    ("check", "reference", "right", "wrong"),
    [
        ("choice", "B", "Answer: (B)", "Answer: A"),
        ("span", ["the Rhine", "Rhine"], "Answer: Rhine", "Answer: the river Rhine"),
        ("value", "'5'", "Answer: '5'", "Answer: 5"),
        ("number", "#### 5", "So it is 5", "So it is 6"),
    ],
)
def test_checks(check, reference, right, wrong):
    references = reference if isinstance(reference, list) else [reference]
    prompt, kind = Prompt("a", LETTERS, check=check, references=references), CHECKS[check]
    right, wrong, unknown = (CheckedAnswer(text, True) for text in (right, wrong, "I cannot tell."))
    cut_off = right._replace(finished=False)
    assert [kind.score(prompt, each) for each in (right, wrong, unknown, cut_off)] == [1, 0, 0, 0]
    assert kind.same(prompt, right, right) is True
    assert kind.same(prompt, right, wrong) is False
    assert kind.same(prompt, right, unknown) is kind.same(prompt, cut_off, right) is None
    assert [kind.unchanged(prompt, right, each) for each in (right, wrong, unknown)] == [True, False, False]
    assert kind.unchanged(prompt, unknown, right) is None
    assert kind.score(Prompt("a", LETTERS, check=check), right) is None


def test_code_that_passed_is_changed_if_it_fails():
    prompt = Prompt("a", "?", check="tests", tests="assert f() == 1")
    right, wrong, other = (CheckedAnswer(f"def f(): return {n}", True) for n in (1, 2, 3))
    assert CHECKS["tests"].unchanged(prompt, right, right) is True
    assert CHECKS["tests"].unchanged(prompt, right, wrong) is False
    assert CHECKS["tests"].unchanged(prompt, wrong, right) is False
    assert CHECKS["tests"].unchanged(prompt, wrong, wrong) is True  # it fails as before
    assert CHECKS["tests"].unchanged(prompt, wrong, other) is False
