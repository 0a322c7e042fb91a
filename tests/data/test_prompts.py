"""Prompts of any shape, from anywhere."""

import io
import json
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from hf_selfjudge import read_prompts
from hf_selfjudge.data.prompts import Prompt, TooLong, describe_left_out, encode, fingerprint_of, fitting
from hf_selfjudge.models.wheels import SourceError


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
        ({"prompt": "code", "tests": "def check(f): assert f()\ncheck(g)"}, "code", "tests"),
        ({"prompt": "code", "tests": "def check(f): return f()\nout = check(g)"}, "code", "tests"),
        ({"prompt": "code", "tests": "def check(f): ...", "check": "text"}, "code", "text"),
        ({"prompt": "p", "questions": ["Why?"], "reference": ["so"], "check": "questions"}, "p", "questions"),
        ({"prompt": "p", "questions": '["Why?"]', "check": "questions"}, "p", "questions"),
        ({"prompt": "p", "questions": 3}, "p", "text"),
        ({"prompt": "p", "functions": [], "id": None, "category": None}, "p", "text"),
        ({"messages": CHAT}, "Why?", "text"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "So."}]}, "Why?", "text"),
        ({"prompt": CHAT}, "Why?", "text"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "text"),
    ],
)
def test_shapes(tmp_path, row, text, check):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row))
    assert (prompt.text, prompt.check, prompt.category) == (text, check, "p")
    assert prompt.conversation[-1] == {"role": "user", "content": text}
    assert prompt.questions == (["Why?"] if check == "questions" else None)
    assert len(prompt.conversation) == (4 if "Be brief." in json.dumps(row) else 1)


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
    assert first == fingerprint_of(read_prompts(path, 2))
    others = [read_prompts(path, 1), read_prompts(path, shuffle=3), read_prompts(path, system="s")]
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
        ('{"prompt": "a", "check": "tests"}', "p.jsonl:1: `check` 'tests' needs `tests`, which the row lacks"),
        ('{"prompt": "a", "check": "tests", "tests": [""]}', "p.jsonl:1: `check` 'tests' needs `tests`"),
        ('{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}', "p.jsonl:2: the id '7' was used before, in p.jsonl:1"),
        ('{"turns": 5}', "p.jsonl:1: `turns` must be a list"),
        ('{"turns": [5]}', "p.jsonl:1: `turns` must begin with text"),
        ('{"turns": ["a"], "reference": "b"}', "p.jsonl:1: `reference` must be a list"),
        ('{"instruction": "a", "instances": ["b"]}', "p.jsonl:1: `instances` must be a list of objects"),
        ('{"instruction": "a", "input": 5}', "p.jsonl:1: `input` must be text, found 5"),
        ('{"messages": [{"role": "user"}]}', "expected text or chat messages"),
        ('{"messages": ["hello"]}', "expected text or chat messages"),
        ('{"messages": []}', "p.jsonl:1: needs one of"),
        ('{"messages": "hello"}', "p.jsonl:1: `messages` must be a list"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has no message of the user"),
        ('{"prompt": "a"}\n{"prompt": 5}', "p.jsonl:2: expected text or chat messages"),
        ('{"prompt": 0, "text": "a"}', "p.jsonl:1: expected text or chat messages"),
        ('{"prompt": true}', "p.jsonl:1: expected text or chat messages"),
        ('{"prompt": NaN}', "p.jsonl:1: expected text or chat messages"),
        ('{"prompt": {"a": 1}}', "p.jsonl:1: expected text or chat messages"),
        ('{"prompt": "a", "reference": {"a": 1}}', "p.jsonl:1: `reference` must be text or a number, found {'a': 1}"),
        ('{"prompt": "a", "reference": ["b", true]}', "p.jsonl:1: `reference` must be text or a number, found True"),
        ('{"prompt": "a", "tests": 5}', "p.jsonl:1: `tests` must be Python code, .* found 5"),
        ('{"prompt": "a", "tests": [5]}', "p.jsonl:1: `tests` must be Python code"),
        (
            '{"prompt": "a", "tests": "N = {}\\ndef check(f):\\n  assert f()"}',
            "p.jsonl:1: `tests` only define something",
        ),
        ('{"prompt": "a", "tests": "import re\\nclass T: pass"}', "p.jsonl:1: `tests` only define something"),
        ('{"prompt": "a", "functions": [{"name": "f"}]}', "p.jsonl:1: `functions` is an old form.* Write `tools`"),
        (
            '{"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}',
            "p.jsonl:1: a message has `function_call`, .* Write it as `tool_calls`",
        ),
        ('{"prompt": "a", "check": "call", "reference": "f(5)"}', "p.jsonl:1: a `reference` of a call must be JSON"),
        ('{"prompt": "a", "check": "call", "reference": "[1]"}', "p.jsonl:1: a `reference` of a call must be JSON"),
        (
            json.dumps({"prompt": "a", "check": "call", "reference": '[{"f": {"a": 1}}]'}),
            r"p.jsonl:1: a `reference` of a call must be JSON.*found '\[\{\"f\"",
        ),
        ('{"prompt": "a", "check": "questions"}', "p.jsonl:1: `check` 'questions' needs `questions`"),
        ('{"prompt": "a", "check": "questions", "questions": "Why?"}', "p.jsonl:1: `questions` must be a list"),
        ('{"prompt": "a", "check": "questions", "questions": [""]}', "p.jsonl:1: `questions` must be a list of texts"),
        (
            '{"prompt": "a", "check": "questions", "questions": ["Why?", "Who?"], "reference": "so"}',
            "p.jsonl:1: `reference` must have an answer to each of the 2 `questions`, found 1",
        ),
        ('{"prompt": "a", "check": ["number"]}', "p.jsonl:1: `check` must be one of"),
        ('{"prompt": "a", "check": 0}', "p.jsonl:1: `check` must be one of"),
        ('{"prompt": "a", "category": {}}', "p.jsonl:1: `category` must be text or a number, found {}"),
        ('{"prompt": "a", "id": [1]}', "p.jsonl:1: `id` must be text or a number, found \\[1\\]"),
        ('{"prompt": "a", "id": NaN}', "p.jsonl:1: `id` must be text or a number, found nan"),
        ('{"prompt": "a", "tools": "hammer"}', "p.jsonl:1: `tools` must be a list"),
        ('{"prompt": "a", "tools": ["hammer"]}', "p.jsonl:1: `tools` must be JSON schemas"),
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


def test_a_template_that_takes_no_system_message(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"does not take these messages \(system, user\): System role not supported"):
        encode(tokenizer, CHAT[:2], 99, 7)


def test_encode(tokenizer):
    assert encode(tokenizer, "abc", 10, 7).tolist() == [[2, 3, 4]]
    assert encode(tokenizer, Prompt("x", "c", messages=[*CHAT[:1], CHAT[1]]).conversation, 99, 7).shape == (1, 13)
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


def test_a_byte_order_mark_is_not_read(tmp_path, monkeypatch):
    """In a file, in the middle of joined ones, in a table, and on standard input, where a line may be a prompt."""
    rows = '\ufeff{"prompt": "a", "id": "x"}\r\n\ufeff{"prompt": "b\u2028c", "id": "y"}\r\n'
    tables = {"p.jsonl": rows, "p.csv": '\ufeffprompt,id\r\na,x\r\n"b\u2028c",y\r\n'}
    for name, content in tables.items():
        (tmp_path / name).write_bytes(content.encode())
        assert [(p.id, p.text) for p in read_prompts(tmp_path / name)] == [("x", "a"), ("y", "b\u2028c")]

    class Input:
        buffer = io.BytesIO(rows.encode())

    monkeypatch.setattr(sys, "stdin", Input)
    assert [(p.id, p.text) for p in read_prompts("-")] == [("x", "a"), ("y", "b\u2028c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n".encode("utf-16"), ":1: this is not UTF-8 text, but perhaps UTF-16. Save it as UTF-8."),
        (
            b'{"prompt": "a"}\n{"prompt": "\xe9"}\n',
            ":2: this is not UTF-8 text, but perhaps Latin-1. Save it as UTF-8.",
        ),
        (b"a\0b\n", ":1: this is not UTF-8 text"),
    ],
)
def test_other_encodings_are_refused_with_file_and_line(tmp_path, monkeypatch, content, message):
    for name in ("p.jsonl", "p.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name + message):
            read_prompts(tmp_path / name)

    class Input:
        buffer = io.BytesIO(content)

    monkeypatch.setattr(sys, "stdin", Input)
    with pytest.raises(ValueError, match="standard-input.jsonl" + message):
        read_prompts("-")


def test_cells_of_csv_are_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        'id,prompt,messages\n007,NA,\n8,"a, ""b""\nc",\n9,,"[{""role"": ""user"", ""content"": ""hi""}]"\n'
    )
    assert [(p.id, p.text) for p in read_prompts(path)] == [("007", "NA"), ("8", 'a, "b"\nc'), ("9", "hi")]
    for content, message in (
        ("prompt\na,b\n", "p.csv:1: has more cells than there are columns"),
        ('prompt\n"a\n', "p.csv, line 2: not CSV"),
        ("prompt,prompt\na,b\n", "several columns have the same name"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)


def test_endings_and_names_of_columns(tmp_path):
    (tmp_path / "p.CSV").write_text("prompt, id\na,x\n")
    datasets.Dataset.from_dict({"prompt": ["a"], "id": ["x"]}).to_parquet(tmp_path / "p.Parquet")
    for name in ("p.CSV", "p.Parquet"):
        assert [(p.id, p.text) for p in read_prompts(tmp_path / name)] == [("x", "a")]
    (tmp_path / "p.tsv").write_text("prompt\ta\n")
    with pytest.raises(ValueError, match=r"p.tsv:1: not a JSON object .* all others as JSON lines"):
        read_prompts(tmp_path / "p.tsv")


def test_a_table_that_is_broken(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR")
    with pytest.raises(SourceError, match="p.parquet could not be read: as a dataset it says Parquet file size is 3"):
        read_prompts(tmp_path / "p.parquet")
    # Other writers do not look at what they call text.
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xe9")])
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet:2: this is not UTF-8 text"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("text", {"prompt": "\ud800"}),
        ("id", {"prompt": "a", "id": "\udfff"}),
        ("category", {"prompt": "a", "category": "\ud800"}),
        ("tests", {"prompt": "a", "tests": "'\ud800'"}),
        ("references", {"prompt": "a", "reference": ["b", "\ud800"]}),
        ("answer", {"prompt": "a", "answer": "\ud800"}),
        ("messages", {"prompt": [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "a"}]}),
        ("tools", {"prompt": "a", "tools": [{"name": "\ud800"}]}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_row(tmp_path, field, row):
    path = write(tmp_path / "p.jsonl", {"prompt": "ok", "answer": "a"}, {"answer": "b", **row})
    with pytest.raises(ValueError, match=f"p.jsonl:2: `{field}` has half of a surrogate pair"):
        read_prompts(path, answer_column="answer")


def test_options_are_text(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"})
    for option in ("system", "column", "answer_column"):
        with pytest.raises(ValueError, match=f"`{option}` .* is not UTF-8 text"):
            read_prompts(path, **{option: "\udcff"})


CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WITH_CALL = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "1", "name": "add"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Sure?"},
]
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{% for m in messages %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.arguments | tojson }}){% endfor %};{% endfor %}"
)


def test_tool_calls(tmp_path, tokenizer, monkeypatch):
    """They are kept, with arguments as templates want them, and handed to the template, or refused."""
    text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}  # as OpenAI writes them
    bare = [WITH_CALL[0], {"role": "assistant", "tool_calls": [text]}, *WITH_CALL[2:]]
    rows = [{"messages": WITH_CALL}, {"messages": bare, "tools": TOOLS}, {"prompt": "a", "tools": json.dumps(TOOLS)}]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert [prompt.conversation for prompt in prompts][:2] == [WITH_CALL] * 2
    assert [prompt.tools for prompt in prompts] == [None, TOOLS, TOOLS]
    for prompt, missing in zip(prompts, ("tool_calls", "tools", "tools"), strict=True):
        with pytest.raises(
            ValueError, match=f"prompt '{prompt.id}': `prompt` has `{missing}`, which .* does not know"
        ):
            fitting(tokenizer, [prompt], 256, 1)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    kept, rows, _ = fitting(tokenizer, prompts, 256, 1)
    assert kept == list(prompts)
    conversation = ['One?;({"a": 1});1;One.;Sure?;', 'add;One?;({"a": 1});1;One.;Sure?;', "add;a;"]
    assert [row[0].tolist() for row in rows] == tokenizer(conversation)["input_ids"]


def test_tables_add_nothing_to_tools(tmp_path):
    """A column of objects has the keys of all rows, with null where a row has no such key."""
    rows = []
    for name in ("city", "day"):
        call = {**CALL, "function": {"name": name, "arguments": {name: "x"}}}
        tool = {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}},
        }
        conversation = [WITH_CALL[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *WITH_CALL[2:]]
        rows.append({"id": name, "messages": conversation, "tools": [tool]})
    expected = [(row["messages"], row["tools"]) for row in rows]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("p.parquet", "saved"):
        assert [(p.conversation, p.tools) for p in read_prompts(tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "null only next to `tool_calls`"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "null only next to `tool_calls`"),
        ({"role": "assistant", "content": None, "tool_calls": ["add"]}, "must have a `function` with a `name`"),
        (
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "1"}]},
            "`arguments` of add: expected a JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": [1]}]},
            "`arguments` of add must be an obj",
        ),
        ({"role": "assistant", "tool_calls": 5}, "`tool_calls` must be a list"),
        ({"role": "assistant", "content": 5}, "`content` of a message must be text, found 5"),
        ({"role": 5, "content": "a"}, "`role` of a message must be text, found 5"),
        ({"from": "human", "value": 5}, "`content` of a message must be text, found 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "may have parts of text only"),
    ],
)
def test_every_message_is_looked_at(tmp_path, tokenizer, message, words):
    conversation = [message, {"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="p.jsonl:1: .*" + words):
        read_prompts(write(tmp_path / "p.jsonl", {"messages": conversation}))
    with pytest.raises(ValueError, match="prompt 'x': `prompt`.*" + words):
        fitting(tokenizer, [Prompt("x", "a", messages=conversation)], 256, 1)


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": parts}]}))
    assert prompt.text == "ab"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}"])
def test_a_template_that_fails_names_the_prompt(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(
        ValueError, match=r"prompt 'x': `prompt`: the chat template does not take these messages \(user\)"
    ):
        fitting(tokenizer, [Prompt("x", "a")], 256, 1)


def test_prompts_that_are_too_long_are_named(tokenizer):
    prompts = [Prompt("a", "a" * 9), Prompt("b", "b" * 10), Prompt("c", "c")]
    kept, rows, left_out = fitting(tokenizer, prompts, 10, 1)
    assert [prompt.id for prompt in kept] == ["a", "c"]
    assert [row.shape for row in rows] == [(1, 9), (1, 1)]
    assert left_out == ["b"]
    assert fitting(tokenizer, prompts[1:2], 10, 1, may_be_empty=True) == ([], [], ["b"])
    with pytest.raises(TooLong, match="all 1 are too long: .*=1 each exceeds the context of 10 tokens"):
        fitting(tokenizer, prompts[1:2], 10, 1)
    assert describe_left_out(left_out) == "1 prompt too long and left out: b."
    assert describe_left_out([*"abcdefg"]) == "7 prompts too long and left out: a, b, c, d, e and 2 more."
