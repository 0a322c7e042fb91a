"""Files that survive."""

import json

import pytest

from hf_selfjudge.utils.files import JsonlLog, atomic_write, check_or_write_settings, lines_of, read_json, write_json


def test_half_a_file_is_no_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(TypeError), atomic_write(tmp_path / "a.json") as incomplete:
        incomplete.write_text(b"{")  # creates the file first
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_claim(tmp_path):
    path = tmp_path / "about.json"
    check_or_write_settings(path, {"model": "a", "batch": 1}, {"version": "1"}, ["batch"])
    check_or_write_settings(path, {"model": "a", "batch": 2}, {"version": "2"}, ["batch"])
    assert json.loads(path.read_text()) == {"model": "a", "batch": 1, "version": "1"}
    with pytest.raises(ValueError, match="made with other settings \\(model: 'a' there, 'b' now\\)"):
        check_or_write_settings(path, {"model": "b", "batch": 1}, {}, ["batch"])


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = JsonlLog(path)
    assert list(lines) == []
    lines.add({"n": 1})
    lines.add({"n": 2})
    with path.open("a") as file:
        file.write('{"n": 3')
    again = JsonlLog(path)
    again.add({"n": 4})
    assert list(again) == list(JsonlLog(path)) == [{"n": 1}, {"n": 2}, {"n": 4}]


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_not_read(tmp_path):
    """As an editor may have left it: in JSON, in JSON lines, in what a run compares its settings with."""
    path = tmp_path / "a.json"
    path.write_bytes(BOM + b'{"x":\r\n1}')
    assert read_json(path) == {"x": 1}
    check_or_write_settings(path, {"x": 1}, {})
    (tmp_path / "a.jsonl").write_bytes(BOM + b'{"n": "\xe2\x80\xa8"}\r\n{"n": 2}\r\n')
    assert list(JsonlLog(tmp_path / "a.jsonl")) == [{"n": "\u2028"}, {"n": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": 1}'.encode("utf-16"), ":1: this is not UTF-8 text, but perhaps UTF-16"),
        ('{"x": 1}'.encode("utf-16-le"), ":1: this is not UTF-8 text, but perhaps UTF-16"),
        (b'{"x":\n"\xe4"}', ":2: this is not UTF-8 text, but perhaps Latin-1"),
        (b"\xed\xa0\x80", ":1: this is not UTF-8 text"),  # half of a surrogate pair, written all the same
        (b"{", ": not a JSON object"),
        (b"[" * 100_000, ": not a JSON object"),
        (b"[1]", ": expected a JSON object, got list"),
    ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for read in (read_json, lambda path: check_or_write_settings(path, {}, {})):
        with pytest.raises(ValueError, match=f"a.json{message}"):
            read(path)


def test_lines_of_another_encoding_stay_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    content = '{"n": 1}\n'.encode("utf-16")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.jsonl:1: this is not UTF-8 text"):
        JsonlLog(path)
    assert path.read_bytes() == content
    path.write_bytes(b'{"n": 1}\n{"n"\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not a JSON object"):
        JsonlLog(path)


def test_lines_are_read_as_they_are_needed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\n")
    lines = lines_of(tmp_path / "a.txt", "my file")
    assert next(lines) == "a\n"
    with pytest.raises(ValueError, match="my file:2: "):
        next(lines)
