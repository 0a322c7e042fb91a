"""In: an answer or a prompt in Markdown. Out: its Python blocks, as CommonMark defines blocks, and its imports.

Where a search for fences line by line finds more Python, as it does if code is not indented like its fence, that
result is used.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token


MARKDOWN = MarkdownIt("commonmark").disable(["inline", "html_block"])  # a tag in front of a fence does not hide it
# From any line that ends in ticks and a name to the next that begins with as many, or to the end of the text.
FENCED = re.compile(r"^[^`\n]*(`{3,})([^`\n]*)\n(?:(.*?)^[ \t>]*(\1)|(.*))", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"[\s{.]*(?:i?python|py)[\d.]*(?![\w-])|\S+\.py\b", re.IGNORECASE)
UNNAMED = ("", "text", "txt", "plaintext", "code")  # names of blocks that may still be Python
IMPORT_LINES = 100  # of one statement


@dataclass(frozen=True)
class Block:
    """Code in a fence that is called `name`; it is `whole` unless the text ends before the block does."""

    name: str
    code: str
    whole: bool


def has_code(text: str) -> bool:
    """Whether an answer has a whole block of Python: whatever follows, the code is complete."""
    return any(block.whole for block in _named(_blocks(text)))


def code_of(text: str) -> list[str]:
    """
    The Python blocks of an answer, in their order; blocks that do not name their language are taken for Python, and if
    all name another one, those that parse as Python. A block that was cut off counts only where there is no
    whole one. An answer without fences is code as a whole, or else its indented blocks are.
    """
    if _parsed(text):
        return [text]
    tokens, found = MARKDOWN.parse(text), _blocks(text)
    if found or any(token.type == "fence" for token in tokens):
        blocks = _named(found) or [block for block in found if _parsed(block.code)]
        return [block.code for block in blocks if block.whole] or [block.code for block in blocks]
    return [token.content for token in tokens if token.type == "code_block"] or [text]


def imports_of(text: str) -> list[str]:
    """The import statements in a prompt and in the Python blocks of it."""
    lines = _lines(text)
    for token in MARKDOWN.parse(text):
        if token.type == "fence":
            start, end = token.map
            lines[start:end] = [""] * (end - start)
    parts = ["\n".join(lines), *(block.code for block in _named(_blocks(text)))]
    return list(dict.fromkeys(statement for part in parts for statement in _imports(part)))


def _blocks(text: str) -> list[Block]:
    """Those of any language, found in the way that finds more Python."""
    lines = _lines(text)
    fences = [token for token in MARKDOWN.parse(text) if token.type == "fence"]
    blocks = [Block(fence.info, _at_the_margin(fence.content), _is_whole(fence, lines)) for fence in fences]
    by_line = [
        Block(match[2], _at_the_margin(match[3] or match[5] or ""), bool(match[4]))
        for match in FENCED.finditer("\n".join(lines))
    ]
    ways = ([block for block in way if block.code.strip()] for way in (blocks, by_line))
    return max(ways, key=lambda way: sum(_parsed(block.code) is not None for block in _named(way)))


def _named(blocks: list[Block]) -> list[Block]:
    """Those that are called Python, or nothing else."""
    return [block for block in blocks if PYTHON.match(block.name) or block.name.strip().lower() in UNNAMED]


def _lines(text: str) -> list[str]:
    return re.sub("\r\n?", "\n", text).split("\n")


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
    if (tree := _parsed(code)) is not None:
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.If, ast.Try))]
        nodes = [node for statement in top for node in ast.walk(statement)]
        return [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines, found = code.splitlines(), []
    for start, line in enumerate(lines):
        if line.startswith(("import ", "from ")):
            statement = line
            for more in lines[start + 1 : start + IMPORT_LINES]:
                bare = re.sub("#.*", "", statement)
                if not ("(" in bare and ")" not in bare or bare.endswith("\\")):
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
