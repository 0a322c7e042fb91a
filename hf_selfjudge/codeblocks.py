"""Find the Python code in Markdown.

In: an answer or a prompt. Out: the blocks of Python in it, as CommonMark tells blocks, and the imports of these.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token


MARKDOWN = MarkdownIt("commonmark").disable("inline")
PYTHON = re.compile(r"[\s{.]*(?:i?python|py)[\d.]*(?![\w-])|\S+\.py\b", re.IGNORECASE)
UNTOLD = ("", "text", "txt", "plaintext", "code")  # what blocks are called that may be Python all the same
IMPORT_LINES = 100  # of one statement


@dataclass(frozen=True)
class Block:
    """Python in a fence; it is `whole` unless the text ends before the block does."""

    code: str
    whole: bool


def has_code(text: str) -> bool:
    """Whether an answer has a whole block of Python: whatever follows, its code is there."""
    return any(block.whole for block in _python(MARKDOWN.parse(text), text))


def code_of(text: str) -> list[str]:
    """
    The Python blocks of an answer, in their order; blocks that do not name their language are taken for Python. A
    block that was cut off counts only where there is no whole one. An answer without fences is code as it stands, or
    else what is indented in it.
    """
    tokens = MARKDOWN.parse(text)
    if any(token.type == "fence" for token in tokens):
        blocks = _python(tokens, text)
        return [block.code for block in blocks if block.whole] or [block.code for block in blocks]
    indented = [token.content for token in tokens if token.type == "code_block"]
    return [text] if _parsed(text) or not indented else indented


def imports_of(text: str) -> list[str]:
    """The import statements in the Python blocks of a prompt; if it has no fences, in the prompt itself."""
    tokens = MARKDOWN.parse(text)
    fenced = any(token.type == "fence" for token in tokens)
    parts = [block.code for block in _python(tokens, text)] if fenced else [text]
    return [statement for part in parts for statement in _imports(part)]


def _python(tokens: list[Token], text: str) -> list[Block]:
    lines = re.sub("\r\n?", "\n", text).split("\n")
    fences = [token for token in tokens if token.type == "fence" and token.content.strip()]
    fences = [fence for fence in fences if PYTHON.match(fence.info) or fence.info.strip().lower() in UNTOLD]
    return [Block(_at_the_margin(fence.content), _is_whole(fence, lines)) for fence in fences]


def _at_the_margin(code: str) -> str:
    """In a list, code may be indented further than its fence."""
    return textwrap.dedent(code) if _parsed(code) is None else code


def _is_whole(fence: Token, lines: list[str]) -> bool:
    start, end = fence.map
    code = fence.content.count("\n") + (fence.content[-1:] not in ("", "\n"))  # lines
    # The end of a list or a quotation also ends a block in it.
    return end - start == code + 2 or any(line.strip() for line in lines[end:])


def _imports(code: str) -> list[str]:
    """Those at its top level; line by line if it does not parse, as text around code does not."""
    tree = _parsed(code)
    if tree is not None:
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.If, ast.Try))]
        nodes = [node for statement in top for node in ast.walk(statement)]
        return [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines, found = code.splitlines(), []
    for start, line in enumerate(lines):
        if line.startswith(("import ", "from ")):
            statement = line
            for more in lines[start + 1 : start + IMPORT_LINES]:
                if not ("(" in statement and ")" not in statement or statement.endswith("\\")):
                    break
                statement += f"\n{more}"
            if _parsed(statement) is not None:
                found.append(statement)
    return found


def _parsed(code: str) -> ast.Module | None:
    """`None` if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
