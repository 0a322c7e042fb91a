"""Reads text that must be UTF-8, and writes files so that an interrupted run leaves each of them whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path


def shipped(name: str) -> Path:
    """A folder that comes with the package: inside it if it is installed, next to it in a checkout."""
    return next(folder / name for folder in Path(__file__).resolve().parents[1:3] if (folder / name).is_dir())


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` if nothing fails, and else removed."""
    path = Path(path)
    incomplete = path.with_name(f"{path.stem}.incomplete{path.suffix}")
    try:
        yield incomplete
        incomplete.replace(path)
    finally:
        incomplete.unlink(missing_ok=True)


def lines_of(path: str | os.PathLike, name: str | None = None) -> Iterator[str]:
    """
    The lines of a text file, without byte order marks.

    Args:
        name (`str`, *optional*): What to call the file in errors.

    Raises:
        ValueError: If a line is not UTF-8. It names the line.
    """
    # Bytes that are not UTF-8 become surrogates, so that their line is known.
    with Path(path).open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if "\0" in line or not is_text(line):
                likely = "UTF-16" if "\0" in line or line[:2] in ("\udcff\udcfe", "\udcfe\udcff") else "Latin-1"
                raise ValueError(
                    f"{name or path}:{number}: this is not UTF-8 text, but perhaps {likely}. Save it as UTF-8."
                )
            yield line.lstrip("\ufeff")  # in any line, since the file may be several files joined


def is_text(text: str) -> bool:
    """Whether text can be written in UTF-8, which half of a surrogate pair cannot."""
    return re.search("[\ud800-\udfff]", text) is None


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, see [`lines_of`]."""
    return "".join(lines_of(path))


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file; see [`lines_of`] and [`json_object`]."""
    return json_object(read_text(path), str(path))


def json_object(text: str, where: str) -> dict:
    """The JSON object in `text`. A `ValueError` says `where` it is if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}.")
    return found


def json_text(content: dict) -> str:
    """The text of a JSON file. NaN is refused, since other readers of JSON do not accept it."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write all of `text`, or nothing."""
    with atomic_write(path) as incomplete:
        incomplete.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write all of [`json_text`], or nothing."""
    write_text(path, json_text(content))


def check_writable(folder: Path) -> None:
    """Create `folder`. An `OSError` if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"`output`: cannot write to {folder} ({error.strerror or error}). Choose another path."
        ) from error


def check_or_write_settings(path: Path, settings: dict, notes: dict, free: Collection[str] = ()) -> None:
    """
    Write the settings of a run to `path`, or compare them with those that are there.

    Args:
        settings (`dict`): What must be the same when a run is continued, except for the keys in `free`.
        notes (`dict`): What is also written when a run begins.

    Raises:
        ValueError: If the folder of `path` was begun with other settings.
    """
    if not path.is_file():
        write_json(path, settings | notes)
        return
    before = read_json(path)
    if other := [
        f"{key}: {before.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if key not in free and before.get(key) != value
    ]:
        raise ValueError(
            f"`output` {path.parent} was made with other settings ({'; '.join(other)}). Choose another folder or "
            "remove it."
        )


class JsonlLog:
    """The JSON lines of a file, which is created when the first line is added. A last line that was cut off is removed
    from an existing file."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.is_file():
            content = path.read_bytes()
            complete = islice(lines_of(path), content.count(b"\n"))
            self.rows = [json_object(line, f"{path}:{number}") for number, line in enumerate(complete, start=1)]
            if (end := content.rfind(b"\n") + 1) < len(content):
                os.truncate(path, end)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def add(self, row: dict) -> None:
        """Add a line in one write, so that several processes can share a file."""
        line = f"{json.dumps(row, allow_nan=False)}\n".encode()
        with self.path.open("ab", buffering=0) as file:
            if (written := file.write(line)) < len(line):
                raise OSError(
                    f"`output`: {written} of {len(line)} bytes could be added to {self.path}. Free some space."
                )
        self.rows.append(row)
