"""In: answers, as text or tokens. Out: whether the code of one passes tests, or how far two share their wording or
their meaning."""

from __future__ import annotations

import ast
import secrets
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path

from ..models.load import resolve_model
from . import sandbox
from .codeblocks import code_of, imports_of


GRAM = 4  # tokens

# The tests of [`computes_the_same`], for the cells of two answers and the steps of their tests.
COMPARISON = """
import contextlib, re

spaces = {{"__name__": "answer"}}, {{"__name__": "answer"}}


def run(code):
    for space in spaces:
        with contextlib.suppress(Exception, SystemExit):
            exec(code, space)


def value(expression, space):
    try:
        return eval(expression, space)
    except (Exception, SystemExit) as error:
        return type(error)


def compare(expression, parts):
    one, other = (value(expression, space) for space in spaces)
    texts = [re.sub(r" at 0x[0-9a-f]+", "", repr(each)) for each in (one, other)]
    assert texts[0] == texts[1] or one == other
    if isinstance(one, bool):  # says little: what is it about?
        for part in parts:
            compare(*part)


for space, cells in zip(spaces, ({!r}, {!r})):
    for cell in cells:
        with contextlib.suppress(Exception, SystemExit):
            exec(cell, space)
for step in {!r}:
    run(step) if isinstance(step, str) else compare(*step)
"""


def reconvergence(original: Sequence[Hashable], rewritten: Sequence[Hashable]) -> float:
    """Share of the original suffix's 4-grams that the rewritten suffix has, counted with multiplicity, in [0, 1]. For
    a suffix of fewer than 4 tokens: the whole suffix instead of 4-grams."""
    size = min(GRAM, max(len(original), 1))
    grams = [tuple(original[i : i + size]) for i in range(len(original) - size + 1)]
    if not grams:
        return 1.0
    rest = Counter(tuple(rewritten[i : i + size]) for i in range(len(rewritten) - size + 1))
    return (Counter(grams) & rest).total() / len(grams)


def passes_tests(text: str, tests: str, conversation: Sequence[dict] = (), seconds: float = 10.0) -> bool:
    """
    Whether the code of an answer passes `tests`. It **runs the code**, for at most `seconds` in an empty folder; its
    limits are described in `sandbox.py`. The caller must have the user's permission (`--allow-code`).

    The imports in the user's messages of the conversation run first, then the blocks of the answer one after another,
    as in a notebook: a block that fails, such as an example of use, does not affect the others.
    """
    return bool(_passes(_cells(text, conversation), tests, seconds))


def computes_the_same(
    first: str, second: str, tests: str, conversation: Sequence[dict] = (), seconds: float = 10.0
) -> bool | None:
    """
    Whether the code of two answers, which need not be right, computes the same values where `tests` assert something:
    of `assert f(2) == 4` this is `f(2)`, of `assert isclose(f(2), 4)` it is the call and, since that is only true or
    false, `f(2)`. An exception is a value, too: its type. It **runs the code** like [`passes_tests`].

    Returns:
        `bool` or `None`: `None` if the tests assert nothing outside of functions, or the code did not end in time.
    """
    if not can_compare(tests):
        return None
    cells = [_cells(text, conversation) for text in (first, second)]
    return True if cells[0] == cells[1] else _passes((), COMPARISON.format(*cells, _steps(tests)), seconds)


def can_compare(tests: str) -> bool:
    """Whether [`computes_the_same`] finds anything in `tests` to compare."""
    return any(isinstance(step, tuple) for step in _steps(tests))


# An expression, and the parts to look at as well if its value is true or false.
Compared = tuple[str, list["Compared"]]


def _steps(tests: str) -> list[str | Compared]:
    """Tests, statement by statement: what an assertion compares, and the code of all others."""
    try:
        statements = ast.parse(tests).body
    except SyntaxError:
        return []
    steps = []
    for statement in statements:
        if isinstance(statement, ast.Assert):
            steps += map(_compared, _operands(statement.test))
        else:
            steps.append(ast.unparse(statement))
    return steps


def _compared(node: ast.expr) -> Compared:
    parts = []
    if isinstance(node, ast.Call):
        of_object = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        parts = [*of_object, *node.args, *(keyword.value for keyword in node.keywords)]
    return ast.unparse(node), [_compared(operand) for part in parts for operand in _operands(part)]


def _operands(node: ast.expr) -> list[ast.expr]:
    """What a condition is about: expressions that are no constants."""
    match node:
        case ast.BoolOp(values=parts):
            pass
        case ast.UnaryOp(op=ast.Not(), operand=part):
            parts = [part]
        case ast.Compare(left=left, comparators=others):
            parts = [left, *others]
        case ast.GeneratorExp(elt=each, generators=loops):  # of `all` and `any`
            return [ast.ListComp(ast.Tuple(_operands(each), ast.Load()), loops)]
        case _:
            return [] if _is_literal(node) else [node]
    return [operand for part in parts for operand in _operands(part)]


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _cells(text: str, conversation: Sequence[dict]) -> tuple[str, ...]:
    """The code of an answer, after the imports in the user's messages."""
    user_texts = [message["content"] for message in conversation if message["role"] == "user"]
    imports = [statement for part in user_texts if isinstance(part, str) for statement in imports_of(part)]
    return (*imports, *code_of(text))


@lru_cache(maxsize=4096)  # rewrites often end in the same code
def _passes(cells: tuple[str, ...], tests: str, seconds: float) -> bool | None:
    """Whether tests pass after cells; `None` if these did not end in time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        parts, work = Path(folder) / "cells", Path(folder) / "work"
        parts.mkdir()
        work.mkdir()
        for number, code in enumerate((*cells, tests)):
            (parts / f"{number:06}.py").write_text(code, encoding="utf-8", errors="replace")
        mark = work / secrets.token_hex(16)
        status = sandbox.run(parts, work, mark, seconds)
        return True if mark.is_dir() else None if status == sandbox.TIMED_OUT else False


def repetition(tokens: Sequence[int]) -> float:
    """Share of an answer's 4-grams that it had before, in [0, 1]."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def similarity(model: str, first: str, second: str) -> float:
    """Cosine of the sentence embeddings of two texts, by a sentence-transformers model (folder or Hub id)."""
    one, other = _encoder(model).encode([first, second], normalize_embeddings=True)
    return float(one @ other)


@lru_cache(maxsize=1)
def _encoder(model: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(resolve_model(model), device="cpu", model_kwargs={"use_safetensors": True})
