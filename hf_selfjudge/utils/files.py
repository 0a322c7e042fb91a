"""Text that is read as UTF-8 or refused, and files that survive: whole or not there, and never of two runs.

Knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path


def shipped(name: str) -> Path:
    """A folder that comes with the package: inside it in a wheel, beside it in a checkout."""
    return next(folder / name for folder in Path(__file__).resolve().parents[1:3] if (folder / name).is_dir())


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` if nothing fails."""
    path = Path(path)
    incomplete = path.with_name(f"{path.stem}.incomplete{path.suffix}")
    yield incomplete
    incomplete.replace(path)


def lines_of(path: str | os.PathLike, name: str | None = None) -> Iterator[str]:
    """
    The lines of a text file. A byte order mark, which some editors put in front, is skipped.

    Args:
        name (`str`, *optional*): What to call the file in errors.

    Raises:
        ValueError: If a line is not UTF-8; names it.
    """
    # Bytes that are not UTF-8 become surrogates, so that the line they are in is known.
    with Path(path).open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if "\0" in line or not is_text(line):
                likely = "UTF-16" if "\0" in line or line[:2] in ("\udcff\udcfe", "\udcfe\udcff") else "Latin-1"
                raise ValueError(
                    f"{name or path}:{number}: this is not UTF-8 text, but perhaps {likely}. Save it as UTF-8."
                )
            yield line.lstrip("\ufeff")  # in any line: files are joined too


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: not if it has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | os.PathLike) -> str:
    """All [`lines_of`] a file."""
    return "".join(lines_of(path))


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file; see [`lines_of`] and [`json_object`]."""
    return json_object(read_text(path), str(path))


def json_object(text: str, where: str) -> dict:
    """
    Args:
        where (`str`): Where `text` was found, for errors.

    Raises:
        ValueError: If `text` is not a JSON object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}.")
    return found


def write_text(path: str | os.PathLike, text: str) -> None:
    """All of it, or nothing."""
    with atomic_write(path) as incomplete:
        incomplete.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: dict) -> None:
    """The same. NaN is refused: other readers of JSON do not take it."""
    write_text(path, json_text(content))


def json_text(content: dict) -> str:
    """What [`write_json`] writes."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def check_writable(folder: Path) -> None:
    """
    Fail before the work, not after it.

    Raises:
        OSError: If no file can be made in `folder`.
    """
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
    Write how the files of a folder are made, or compare with what is there.

    Args:
        path (`Path`): A file in that folder.
        settings (`dict`): What must be the same when a run goes on.
        notes (`dict`): What is noted when it begins.
        free (`Collection[str]`): Those of `settings` that may differ.

    Raises:
        ValueError: If the folder was begun with other settings.
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
    """
    A file of JSON lines that grows while a run goes on. A line that a kill cut off is dropped when it is opened.

    Args:
        path (`Path`): Made with the first line.
    """

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
        """At once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows.append(row)
