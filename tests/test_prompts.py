"""Prompts of any shape, from anywhere."""

import io
import json
import sys

import datasets
import pytest

from hf_selfjudge import Prompt, SourceError, read_prompts
from hf_selfjudge.prompts import TooLong, encode, fingerprint_of


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "text", "check"),
    [
        ({"prompt": "p"}, "p", "text"),
        ({"prompt": "p", "check": "number"}, "p", "number"),
        ({"question": "q", "answer": "so\n#### 4"}, "q", "number"),
        ({"instruction": "do", "input": "this"}, "do\n\nthis", "text"),
        ({"instruction": "do", "instances": [{"input": "", "output": "o"}]}, "do", "text"),
        ({"question_id": 7, "turns": ["first", "second"]}, "first", "text"),
        ({"text": "t"}, "t", "text"),
        ({"prompt": "code", "tests": "assert 1"}, "code", "tests"),
        ({"prompt": "code", "tests": ["assert 1", "assert 2"]}, "code", "tests"),
        ({"prompt": "p", "id": None, "category": None}, "p", "text"),
        ({"messages": CHAT}, "Why?", "text"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "So."}]}, "Why?", "text"),
        ({"prompt": CHAT}, "Why?", "text"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "text"),
    ],
)
def test_shapes(tmp_path, row, text, check):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row))
    assert (prompt.text, prompt.check, prompt.category) == (text, check, "p")
    assert prompt.said[-1] == {"role": "user", "content": text}
    assert len(prompt.said) == (4 if "Be brief." in json.dumps(row) else 1)


def test_options(tmp_path):
    rows = [{"ask": f"a{i}", "prompt": "other", "reply": f"r{i}", "id": i, "category": "c"} for i in range(9)]
    path = write(tmp_path / "p.jsonl", *rows)
    prompts = read_prompts(path, 2, column="ask", answer_column="reply", system="Be brief.")
    assert prompts[0] == Prompt(
        "0", "a0", "c", messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a0"}],
        answer="r0",
    )  # fmt: skip
    assert [prompt.id for prompt in prompts] == ["0", "1"]
    assert prompts.options == {"column": "ask", "answer_column": "reply", "system": "Be brief.", "limit": 2}
    shuffled = [prompt.id for prompt in read_prompts(path, shuffle=1)]
    assert shuffled == [prompt.id for prompt in read_prompts(path, shuffle=1)] != [str(i) for i in range(9)]
    assert sorted(shuffled) == [str(i) for i in range(9)]
    assert [prompt.id for prompt in read_prompts(path)[3:5]] == ["3", "4"]


def test_tables_and_datasets(tmp_path):
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "category": ["x", None]})
    table.to_csv(tmp_path / "p.csv")
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("p.csv", "p.parquet", "saved", "folder"):
        prompts = read_prompts(tmp_path / name)
        assert [(p.text, p.category) for p in prompts] == [("a", "x"), ("b", name.partition(".")[0])]


def test_standard_input(monkeypatch):
    class Input:
        buffer = io.BytesIO(b'plain text\n\n{"prompt": "json", "id": "x"}\n')

    monkeypatch.setattr(sys, "stdin", Input)
    assert [(p.id, p.text) for p in read_prompts("-")] == [("standard-input-1", "plain text"), ("x", "json")]


def test_fingerprints(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"})
    first = fingerprint_of(read_prompts(path))
    assert first == fingerprint_of(read_prompts(path))
    others = [read_prompts(path, 1), read_prompts(path, shuffle=0), read_prompts(path, system="s")]
    write(path, {"prompt": "a"}, {"prompt": "c"})
    changed = read_prompts(path)
    assert changed[1].text == "c"
    assert len({first, *map(fingerprint_of, [*others, changed])}) == 5
    assert fingerprint_of([Prompt("a", "b")]) != fingerprint_of([Prompt("a", "c")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "p.jsonl are empty"),
        ("no json", "p.jsonl:1: not a JSON object"),
        ('{"prompt": "a"}\n[1]', "p.jsonl:2: expected a JSON object, got list"),
        ('{"body": "a"}', "p.jsonl:1: needs one of `messages`"),
        ('{"prompt": " "}', "p.jsonl:1: the prompt is empty"),
        ('{"prompt": "a", "check": "vibes"}', "`check` must be one of"),
        ('{"prompt": "a", "check": "tests"}', "`check` must be one of"),
        ('{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}', "p.jsonl:2: the id '7' was used before, in p.jsonl:1"),
        ('{"turns": 5}', "p.jsonl:1: no prompt of a known shape"),
        ('{"instruction": "a", "instances": ["b"]}', "p.jsonl:1: no prompt of a known shape"),
        ('{"messages": [{"role": "user"}]}', "expected text or chat messages"),
        ('{"messages": ["hello"]}', "expected text or chat messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has no message of the user"),
    ],
)
def test_errors(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_missing(tmp_path):
    with pytest.raises(SourceError, match=r"none.jsonl could not be read: there is no such file"):
        read_prompts(tmp_path / "none.jsonl")
    path = write(tmp_path / "p.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match="p.jsonl:1: has no column `ask`, found \\['prompt'\\]"):
        read_prompts(path, column="ask")


def test_missing_values(tmp_path):
    """An id that is missing is made up, and an answer that is missing is the target's to write."""
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "id": None, "answer": None}, {"prompt": "b", "answer": "x"})
    first, second = read_prompts(path, answer_column="answer")
    assert (first.id, first.answer) == ("p-1", None)
    assert (second.id, second.answer) == ("p-2", "x")


def test_what_is_cached_is_as_good_as_the_code(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"})
    assert read_prompts(path)[0].text == "a"
    edited = tmp_path / "edited.py"
    edited.write_text("another version of the parser")
    monkeypatch.setattr("hf_selfjudge.prompts.__file__", str(edited))
    monkeypatch.setattr("hf_selfjudge.prompts.COLUMNS", ("id", "prompt"))
    write(path, {"prompt": "a"})
    assert read_prompts(path)[0].text == "a"
    monkeypatch.setattr("hf_selfjudge.prompts._messages", lambda said, where: [{"role": "user", "content": "other"}])
    edited.write_text("and another")
    assert read_prompts(path)[0].text == "other"


def test_a_template_that_takes_no_system_message(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"does not take these messages \(system, user\): System role not supported"):
        encode(tokenizer, CHAT[:2], 99, 7)


def test_encode(tokenizer):
    assert encode(tokenizer, "abc", 10, 7).tolist() == [[2, 3, 4]]
    assert encode(tokenizer, Prompt("x", "c", messages=[*CHAT[:1], CHAT[1]]).said, 99, 7).shape == (1, 13)
    with pytest.raises(ValueError, match="`prompt` is empty"):
        encode(tokenizer, "  ", 10, 1)
    with pytest.raises(
        TooLong, match=r"`prompt` has 3 tokens; with `max_new_tokens`=8 it exceeds the target's context of 10"
    ):
        encode(tokenizer, "abc", 10, 8)


@pytest.mark.parametrize(
    ("row", "references", "category"),
    [
        ({"question": "q", "answer": "so\n#### 4"}, ["so\n#### 4"], "file"),
        ({"question": "q", "answer": "no reference"}, None, "file"),
        ({"prompt": "p", "reference": "one", "category": "math"}, ["one"], "math"),
        ({"prompt": "p", "reference": ["one", "other"]}, ["one", "other"], "file"),
        ({"turns": ["p", "q"], "reference": ["of p", "of q"], "category": "math"}, ["of p"], "mt_bench"),
        ({"turns": ["p"], "reference": [["one", "other"]], "category": "rag"}, ["one", "other"], "rag"),
        ({"turns": ["p"], "reference": ["", ""], "category": "stem"}, None, "mt_bench"),
    ],
)
def test_references(tmp_path, row, references, category):
    (prompt,) = read_prompts(write(tmp_path / "file.jsonl", row))
    assert (prompt.references, prompt.category) == (references, category)
