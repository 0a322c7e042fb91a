"""Rows of any shape that is in use -> the columns of [`Prompt`], or an error that names the row.

In: a file of JSON lines or CSV, a table, or plain lines. `where` is always the row's place, for errors.
"""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import datasets

from ..utils.files import is_text, json_object, lines_of
from .chat import json_list, message_of, tools_of


# The ways to check an answer, and the column that a prompt needs for each; `scoring/checks.py` says how each works.
CHECKS = {"number": None, "tests": "tests", "text": None}
# Columns that may hold the prompt; the first that is there counts.
COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "turns", "text")
# Spec-Bench has these categories of MT-Bench as one.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
JSON = (".jsonl", ".json", ".ndjson")
# Statements of Python that test nothing by themselves.
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)
LONGEST_CELL = 2**31 - 1  # of CSV, characters


def normalised(path: Path, table: datasets.Dataset | None, plain: bool, reading_options: dict) -> Iterator[dict]:
    """
    Rows of any shape as rows of [`Prompt`], with lists as JSON. A `ValueError` names the row that is no prompt.

    Args:
        path (`Path`): The file; its name is the rows' default id and category.
        table (`datasets.Dataset`, *optional*): The rows, if they are not to be read from `path`.
        plain (`bool`): Whether a line may be a prompt itself.
        reading_options (`dict`): `column`, `answer_column` and `system`, see [`read_prompts`].
    """
    places: dict[str, str] = {}
    for number, row in enumerate(_rows(path, table, plain), start=1):
        if row is None:
            continue
        where = f"{path.name}:{number}"
        try:
            prompt = _prompt_row(row, where, f"{path.stem}-{number}", **reading_options)
        except TypeError as error:  # in the arguments of a tool call, say
            raise ValueError(f"{where}: has something that JSON cannot hold ({error}).") from error
        for name, value in prompt.items():
            if value is not None and not is_text(value):
                pair = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
                raise ValueError(f"{where}: `{name}` has {pair}. Remove it.")
        if prompt["id"] in places:
            raise ValueError(f"{where}: the id {prompt['id']!r} was used before, in {places[prompt['id']]}.")
        places[prompt["id"]] = where
        yield prompt
    if not places:
        raise ValueError(f"The prompts {path.name} are empty. Write one JSON object with `prompt` a line.")


def _rows(path: Path, table: datasets.Dataset | None, plain: bool) -> Iterator[dict | None]:
    """Rows as they are; `None` for an empty line."""
    if table is None:
        yield from _cells(path) if path.suffix.lower() == ".csv" else _lines(path, plain)
        return
    count = 0
    try:
        for row in table:
            yield {name: _without_nulls(value) for name, value in row.items()}
            count += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}:{count + 1}: this is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _without_nulls(value: object) -> object:
    """A cell without the keys that a table adds: its objects have the keys of all rows, null where they had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _lines(path: Path, plain: bool) -> Iterator[dict | None]:
    for number, line in enumerate(lines_of(path, path.name), start=1):
        if not line.strip():
            yield None
        elif plain and not line.lstrip().startswith("{"):
            yield {"prompt": line.strip()}
        else:
            try:
                yield json_object(line, f"{path.name}:{number}")
            except ValueError as error:
                if path.suffix.lower() in JSON:
                    raise
                raise ValueError(
                    f"{error} Files that end in .csv, .parquet or .arrow are read as such, all others as JSON lines."
                ) from error


def _cells(path: Path) -> Iterator[dict]:
    """Rows of CSV. Every cell is text, or `None` where it is empty."""
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.DictReader(lines_of(path, path.name), restkey="", strict=True)
    try:
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        names = list(filter(None, rows.fieldnames))
        if len(set(names)) < len(names):
            raise ValueError(f"{path.name}: several columns have the same name, found {names}. Rename them.")
        for number, row in enumerate(rows, start=1):
            if isinstance(row.get(""), list):
                raise ValueError(f"{path.name}:{number}: has more cells than there are columns. Put text in quotes.")
            yield {name: row[name] or None for name in names}
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {rows.reader.line_num}: not CSV ({error}).") from error


def _prompt_row(
    row: dict, where: str, default_id: str, column: str | None, answer_column: str | None, system: str | None
) -> dict:
    for needed in filter(None, (column, answer_column)):
        if needed not in row:
            raise ValueError(f"{where}: has no column `{needed}`, found {sorted(row)}.")
    column = column or next((name for name in COLUMNS if row.get(name) not in (None, "", [])), None)
    if column is None:
        raise ValueError(f"{where}: needs one of `{'`, `'.join(COLUMNS)}`, found {sorted(row)} (or they are empty).")
    if row.get("functions"):
        raise ValueError(f"{where}: `functions` is the older form, which chat templates do not know. Write `tools`.")
    messages = _messages(_prompt_of(row, column, where), where)
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    text = messages[-1]["content"]
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty. Remove the row or give it text.")
    references, tests = _references(row, column, where), _tests(row, where)
    category = _word(row, "category", where) or default_id.rpartition("-")[0]
    merged = column == "turns" and category in MT_BENCH
    ids = [_word(row, name, where) for name in ("id", "question_id")]
    lists = {
        "messages": None if messages == [{"role": "user", "content": text}] else messages,
        "tools": tools_of(row.get("tools") or [], where),
        "references": references,
    }
    return {
        "id": next((value for value in ids if value is not None), default_id),
        "text": text,
        "category": "mt_bench" if merged else category,
        "subcategory": category if merged else None,
        "check": _check(row | {"tests": tests}, references, where),
        "tests": tests,
        "answer": answer_column and _word(row, answer_column, where),
        # Not escaped, so that half of a surrogate pair is found in them too.
        **{name: json.dumps(value, ensure_ascii=False) if value else None for name, value in lists.items()},
    }


def _check(row: dict, references: list[str], where: str) -> str:
    """How answers are checked: as the row says, else by what it comes with."""
    check = row.get("check")
    if check in (None, ""):
        gsm8k = any("####" in reference for reference in references)
        check = "tests" if row["tests"] else "number" if gsm8k else "text"
    if not isinstance(check, str) or check not in CHECKS:
        raise ValueError(f"{where}: `check` must be one of {', '.join(CHECKS)}; found {check!r}.")
    if CHECKS[check] is not None and not row.get(CHECKS[check]):
        raise ValueError(f"{where}: `check` {check!r} needs `{CHECKS[check]}`, which the row lacks.")
    if check == "tests" and _only_defines(row["tests"]):
        raise ValueError(f"{where}: `tests` only define something: any answer would pass. Call it, as in check(f).")
    return check


def _tests(row: dict, where: str) -> str | None:
    tests = row.get("tests")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str | None):
        raise ValueError(f"{where}: `tests` must be Python code, as text or a list of texts, found {tests!r:.200}.")
    return tests or None


def _only_defines(code: str) -> bool:
    """Whether code does nothing by itself. Unknown, so `False`, of code that cannot be parsed here."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(
        isinstance(statement, DEFINITIONS)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ASSIGNMENTS) and not any(isinstance(node, ast.Call) for node in ast.walk(statement)))
        for statement in body
    )


def _word(row: dict, name: str, where: str) -> str | None:
    """A column that holds text or a number, as text."""
    value = row.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not number and not isinstance(value, str):
        raise ValueError(f"{where}: `{name}` must be text or a number, found {value!r:.200}.")
    return None if value is None else str(value)


def _references(row: dict, column: str, where: str) -> list[str]:
    """The right answers of a row, in the shapes of Spec-Bench and GSM8K."""
    right = row.get("reference")
    if column == "turns" and right is not None:
        right = next(iter(json_list(right, "reference", where)), None)
    answer = row.get("answer")
    if right is None and isinstance(answer, str) and "####" in answer:
        right = answer
    values = right if isinstance(right, list) else [right]
    return [text for text in (_word({"reference": value}, "reference", where) for value in values) if text]


def _prompt_of(row: dict, column: str, where: str) -> str | list:
    """The content of a prompt's column, with what belongs to it: text or chat messages."""
    content = row[column]
    if column == "turns":
        content = next(iter(json_list(content, "turns", where)), None)
        if not isinstance(content, str):
            raise ValueError(f"{where}: `turns` must begin with text, found {content!r:.200}.")
    elif column == "instruction":
        instances = row.get("instances") or [{}]
        if not isinstance(instances, list) or not isinstance(instances[0], dict):
            raise ValueError(f"{where}: `instances` must be a list of objects with `input`, found {instances!r:.200}.")
        task_input = row.get("input") or instances[0].get("input")
        if task_input and not isinstance(task_input, str):
            raise ValueError(f"{where}: `input` must be text, found {task_input!r:.200}.")
        if task_input and isinstance(content, str):
            content = f"{content}\n\n{task_input}"
    elif column in ("messages", "conversations") and isinstance(content, str):
        content = json_list(content, column, where)
    return content


def _messages(prompt: str | list | dict, where: str) -> list[dict]:
    """Chat messages up to the last one of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = [message_of(message, where) for message in (prompt if isinstance(prompt, list) else [prompt])]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: the conversation has no message of the user.")
    return messages
