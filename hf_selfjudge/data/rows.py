"""Rows of JSON lines, CSV or a table, in any common shape -> [`Prompt`]s, or an error that names the row."""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from ..utils.files import is_text, json_object, lines_of
from ..utils.text import parse_python
from .chat import json_list, message_of


# How answers can be checked, and the column that a prompt then needs. `scoring/checks.py` has an entry for each.
CHECK_COLUMNS = {
    **dict.fromkeys(("number", "choice", "span", "value", "call")),
    **{"tests": "tests", "questions": "questions"},
    "text": None,
}
# Columns that may hold the prompt. The first one that has a value is used.
COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "turns", "text")
# Categories of MT-Bench, which Spec-Bench counts as one.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
LONGEST_CELL = 2**31 - 1  # of CSV, characters


@dataclass(frozen=True)
class Prompt:
    """
    One prompt.

    Args:
        id (`str`): Unique in its file.
        text (`str`): The last message of the user.
        category (`str`): The row of result tables in which it is counted.
        check (`str`): How answers are checked, by their final answer: `"number"`; `"choice"` (a letter, or a word such
            as "yes"); `"span"` (a few words); `"value"` (a Python or JSON literal); or `"call"` (of a function, in
            JSON). Or `"tests"` (code that passes `tests`), `"questions"` (a text from which the target answers
            `questions`), or `"text"` (no final answer).
        subcategory (`str`, *optional*): The row's own category, if `category` joins several (MT-Bench).
        messages (`list[dict]`, *optional*): The conversation, if it is more than `text`.
        tests (`str`, *optional*): Python code that is run after the answer's code. It must raise if that is wrong,
            call the tests that it defines, and not end the process (as `unittest.main()` does).
        questions (`list[str]`, *optional*): What the target is asked about an answer.
        references (`list[str]`, *optional*): Right answers, to score answers by. One of them is enough; with
            `questions`, there is one for each of them.
        answer (`str`, *optional*): An answer to use instead of the target's own.
        tools (`list[dict]`, *optional*): JSON schemas of tools, for the chat template.
    """

    id: str
    text: str
    category: str = "-"
    check: str = "text"
    subcategory: str | None = None
    messages: list[dict] | None = None
    tests: str | None = None
    references: list[str] | None = None
    answer: str | None = None
    tools: list[dict] | None = None
    questions: list[str] | None = None

    @property
    def conversation(self) -> list[dict]:
        """All messages, the last of which is `text`."""
        return self.messages or [{"role": "user", "content": self.text}]


def prompts_of(path: Path, table: datasets.Dataset | None, plain: bool, **options: str | None) -> Iterator[Prompt]:
    """
    The prompts in the rows of a file or table.

    Args:
        path (`Path`): The file. Its name is used for default ids and categories, and in errors.
        table (`datasets.Dataset`, *optional*): The rows, if they are not to be read from `path`.
        plain (`bool`): Whether a line that is not JSON is a prompt itself.
        options: `column`, `answer_column` and `system` of [`read_prompts`].

    Raises:
        ValueError: If a row is not a prompt, or there is none.
    """
    places: dict[str, str] = {}
    for number, row in enumerate(_rows(path, table, plain), start=1):
        if row is None:
            continue
        where = f"{path.name}:{number}"
        try:
            prompt = _prompt(row, f"{path.stem}-{number}", **options)
            for name, value in vars(prompt).items():
                if not is_text(json.dumps(value, ensure_ascii=False)):
                    pair = "half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
                    raise ValueError(f"`{name}` has {pair}. Remove it.")
            if prompt.id in places:
                raise ValueError(f"the id {prompt.id!r} was used before, in {places[prompt.id]}.")
        except (TypeError, ValueError) as error:  # TypeError: a table holds something that JSON does not have
            raise ValueError(f"{where}: {error}") from error
        places[prompt.id] = where
        yield prompt
    if not places:
        raise ValueError(f"The prompts {path.name} are empty. Write one JSON object with `prompt` a line.")


def _rows(path: Path, table: datasets.Dataset | None, plain: bool) -> Iterator[dict | None]:
    """Rows as they are; `None` for an empty line."""
    if table is None:
        yield from _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path, plain)
        return
    count = 0
    try:
        for row in table:
            yield {name: _without_nulls(value) for name, value in row.items()}
            count += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}:{count + 1}: this is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _without_nulls(value: object) -> object:
    """A cell without the null values in it: in a table, each object has the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_rows(path: Path, plain: bool) -> Iterator[dict | None]:
    for number, line in enumerate(lines_of(path, path.name), start=1):
        if not line.strip():
            yield None
        elif plain and not line.lstrip().startswith("{"):
            yield {"prompt": line.strip()}
        else:
            try:
                yield json_object(line, f"{path.name}:{number}")
            except ValueError as error:
                hint = "Files that end in .csv, .parquet or .arrow are read as such, all others as JSON lines."
                raise ValueError(f"{error} {hint}") from error


def _csv_rows(path: Path) -> Iterator[dict]:
    """Every cell is text, or `None` if it is empty."""
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


def _prompt(row: dict, default_id: str, column: str | None, answer_column: str | None, system: str | None) -> Prompt:
    for needed in filter(None, (column, answer_column)):
        if needed not in row:
            raise ValueError(f"has no column `{needed}`, found {sorted(row)}.")
    column = column or next((name for name in COLUMNS if row.get(name) not in (None, "", [])), None)
    if column is None:
        raise ValueError(f"needs one of `{'`, `'.join(COLUMNS)}`, found {sorted(row)} (or they are empty).")
    if row.get("functions"):
        raise ValueError("`functions` is an old form that chat templates do not know. Write `tools`.")
    messages = [{"role": "system", "content": system}] if system else []
    messages += _messages(row, column)
    text = messages[-1]["content"]
    if not text.strip():
        raise ValueError("the prompt is empty. Remove the row or give it text.")
    tools = json_list(row.get("tools") or [], "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"`tools` must be JSON schemas, found {tools!r:.200}.")
    references, tests = _references(row, column), _tests(row)
    check = _check(row | {"tests": tests}, references)
    category = _word(row.get("category"), "category") or default_id.rpartition("-")[0]
    merged = column == "turns" and category in MT_BENCH
    ids = *(_word(row.get(name), name) for name in ("id", "question_id")), default_id
    return Prompt(
        id=next(value for value in ids if value is not None),
        text=text,
        category="mt_bench" if merged else category,
        subcategory=category if merged else None,
        check=check,
        messages=None if messages == [{"role": "user", "content": text}] else messages,
        tests=tests,
        references=references or None,
        answer=answer_column and _word(row[answer_column], answer_column),
        tools=tools or None,
        questions=_questions(row["questions"], references) if check == "questions" else None,
    )


def _check(row: dict, references: list[str]) -> str:
    """How answers are checked: as the row says, otherwise as its tests and references suggest."""
    check = row.get("check")
    if check in (None, ""):
        is_gsm8k = any("####" in reference for reference in references)
        check = "tests" if row["tests"] else "number" if is_gsm8k else "text"
    if not isinstance(check, str) or check not in CHECK_COLUMNS:
        raise ValueError(f"`check` must be one of {', '.join(CHECK_COLUMNS)}; found {check!r}.")
    needed = CHECK_COLUMNS[check]
    if needed is not None and not row.get(needed):
        raise ValueError(f"`check` {check!r} needs `{needed}`, which the row lacks.")
    if check == "tests" and _only_defines(row["tests"]):
        raise ValueError("`tests` only define something: any answer would pass. Call it, as in check(f).")
    if check == "call" and (wrong := [reference for reference in references if not _is_call(reference)]):
        raise ValueError(
            'a `reference` of a call must be JSON: {"name": …, "arguments": {…}}, or a list with '
            f'{{"NAME": {{"ARGUMENT": [allowed values]}}}} for each call; found {wrong[0]!r:.200}.'
        )
    return check


def _is_call(reference: str) -> bool:
    """Whether a reference is a call in JSON, or a list of the allowed values of calls."""
    try:
        found = json.loads(reference)
    except (ValueError, RecursionError):
        return False
    if isinstance(found, dict):
        return isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict)
    calls = [call for each in found for call in each.values()] if _all(found, dict) else [None]
    return all(isinstance(call, dict) and _all([*call.values()], list) for call in calls)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _tests(row: dict) -> str | None:
    tests = row.get("tests")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str | None):
        raise ValueError(f"`tests` must be Python code, as text or a list of texts, found {tests!r:.200}.")
    return tests or None


def _questions(value: object, references: list[str]) -> list[str]:
    questions = json_list(value, "questions")
    if not all(isinstance(question, str) and question.strip() for question in questions):
        raise ValueError(f"`questions` must be a list of texts, found {questions!r:.200}.")
    if references and len(references) != len(questions):
        raise ValueError(
            f"`reference` must have an answer to each of the {len(questions)} `questions`, found {len(references)}."
        )
    return questions


def _only_defines(code: str) -> bool:
    """Whether code tests nothing when it is run; `False` if it cannot be parsed."""
    if (tree := parse_python(code)) is None:
        return False
    statements = [statement for statement in tree.body if not isinstance(statement, DEFINITIONS)]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    return not any(isinstance(node, ast.Call | ast.Assert | ast.Raise) for node in nodes)


def _word(value: object, name: str) -> str | None:
    """Text or a number in the column `name`, as text."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not number and not isinstance(value, str):
        raise ValueError(f"`{name}` must be text or a number, found {value!r:.200}.")
    return None if value is None else str(value)


def _references(row: dict, column: str) -> list[str]:
    """The right answers of a row, in the shapes of Spec-Bench and GSM8K."""
    right = row.get("reference")
    if column == "turns" and right is not None:
        right = next(iter(json_list(right, "reference")), None)
    answer = row.get("answer")
    if right is None and isinstance(answer, str) and "####" in answer:
        right = answer
    values = right if isinstance(right, list) else [right]
    return [text for value in values if (text := _word(value, "reference"))]


def _messages(row: dict, column: str) -> list[dict]:
    """The conversation in a prompt's column, up to the last message of the user."""
    content = row[column]
    if column == "turns":
        content = next(iter(json_list(content, "turns")), None)
        if not isinstance(content, str):
            raise ValueError(f"`turns` must begin with text, found {content!r:.200}.")
    elif column == "instruction":
        instances = row.get("instances") or [{}]
        if not isinstance(instances, list) or not isinstance(instances[0], dict):
            raise ValueError(f"`instances` must be a list of objects with `input`, found {instances!r:.200}.")
        task_input = row.get("input") or instances[0].get("input")
        if task_input and not isinstance(task_input, str):
            raise ValueError(f"`input` must be text, found {task_input!r:.200}.")
        if task_input and isinstance(content, str):
            content = f"{content}\n\n{task_input}"
    elif column in ("messages", "conversations") and isinstance(content, str):
        content = json_list(content, column)
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    messages = [message_of(message) for message in (content if isinstance(content, list) else [content])]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError("the conversation has no message of the user.")
    return messages
