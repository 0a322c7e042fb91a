"""Files that survive."""

import json

import pytest

from hf_selfjudge.files import Lines, claim, whole, write_json


def test_half_a_file_is_no_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(TypeError), whole(tmp_path / "a.json") as incomplete:
        incomplete.write_text(b"{")
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_claim(tmp_path):
    path = tmp_path / "about.json"
    claim(path, {"model": "a", "batch": 1}, {"version": "1"}, ["batch"])
    claim(path, {"model": "a", "batch": 2}, {"version": "2"}, ["batch"])
    assert json.loads(path.read_text()) == {"model": "a", "batch": 1, "version": "1"}
    with pytest.raises(ValueError, match="made with other settings \\(model: 'a' there, 'b' now\\)"):
        claim(path, {"model": "b", "batch": 1}, {}, ["batch"])


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    assert list(lines) == []
    lines.add({"n": 1})
    lines.add({"n": 2})
    with path.open("a") as file:
        file.write('{"n": 3')
    again = Lines(path)
    again.add({"n": 4})
    assert list(again) == list(Lines(path)) == [{"n": 1}, {"n": 2}, {"n": 4}]
