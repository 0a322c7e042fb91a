"""In: an answer or a prompt in Markdown. Out: its blocks of Python code, or its imports.

Blocks are those of CommonMark. A search for fences line by line also finds code that is not indented like its fence;
the way that finds more Python is used.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

from ..utils.text import parse_python


MARKDOWN = MarkdownIt("commonmark").disable(["inline", "html_block"])  # a tag in front of a fence does not hide it
# From a line that ends in backticks and a name to the next line that begins with as many, or to the end of the text.
FENCED = re.compile(r"^[^`\n]*(`{3,})([^`\n]*)\n(?:(.*?)^[ \t>]*(\1)|(.*))", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"[\s{.]*(?:i?python|py)[\d.]*(?![\w-])|\S+\.py\b", re.IGNORECASE)
UNNAMED = ("", "text", "txt", "plaintext", "code")  # names of blocks that may still be Python
IMPORT_LINES = 100  # at most, in one statement


@dataclass(frozen=True)
class Block:
    """A fenced block with the name of its language; `whole`: the block ends before the text does."""

    name: str
    code: str
    whole: bool


def has_code(text: str) -> bool:
    """Whether an answer has a whole block of Python. Such code is complete, whatever text would follow."""
    return any(block.whole for block in _named(blocks_of(text)))


def code_of(text: str) -> list[str]:
    """
    The Python blocks of an answer, in their order. Blocks without a language count as Python. If all blocks are of
    other languages, those that can be parsed as Python are used. A block that was cut off is used only if no other is
    there. An answer without fences is code as a whole, or its indented blocks are.
    """
    if parse_python(text):
        return [text]
    tokens, found = MARKDOWN.parse(text), blocks_of(text)
    if found or any(token.type == "fence" for token in tokens):
        blocks = _named(found) or [block for block in found if parse_python(block.code)]
        return [block.code for block in blocks if block.whole] or [block.code for block in blocks]
    return [token.content for token in tokens if token.type == "code_block"] or [text]


def imports_of(text: str) -> list[str]:
    """The import statements in a prompt and its Python blocks."""
    lines = _lines(text)
    for token in MARKDOWN.parse(text):
        if token.type == "fence":
            start, end = token.map
            lines[start:end] = [""] * (end - start)
    parts = ["\n".join(lines), *(block.code for block in _named(blocks_of(text)))]
    return list(dict.fromkeys(statement for part in parts for statement in _imports(part)))


def blocks_of(text: str) -> list[Block]:
    """The blocks in any language, from the way that finds more Python."""
    lines = _lines(text)
    fences = [token for token in MARKDOWN.parse(text) if token.type == "fence"]
    blocks = [Block(fence.info, _at_the_margin(fence.content), _is_whole(fence, lines)) for fence in fences]
    by_line = [
        Block(match[2], _at_the_margin(match[3] or match[5] or ""), bool(match[4]))
        for match in FENCED.finditer("\n".join(lines))
    ]
    ways = ([block for block in way if block.code.strip()] for way in (blocks, by_line))
    return max(ways, key=lambda way: sum(parse_python(block.code) is not None for block in _named(way)))


def _named(blocks: list[Block]) -> list[Block]:
    """The blocks that are called Python, or have no name of a language."""
    return [block for block in blocks if PYTHON.match(block.name) or block.name.strip().lower() in UNNAMED]


def _lines(text: str) -> list[str]:
    return re.sub("\r\n?", "\n", text).split("\n")


def _at_the_margin(code: str) -> str:
    """Code without the indentation that it may have in a list."""
    return textwrap.dedent(code) if parse_python(code) is None else code


def _is_whole(fence: Token, lines: list[str]) -> bool:
    start, end = fence.map
    code = fence.content.count("\n") + (fence.content[-1:] not in ("", "\n"))  # lines
    # The end of a list or a quotation also ends a block in it.
    return end - start == code + 2 or any(line.strip() for line in lines[end:])


def _imports(code: str) -> list[str]:
    """The imports at the top level of code; found line by line in text that cannot be parsed."""
    if (tree := parse_python(code)) is not None:
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
            if parse_python(statement) is not None:
                found.append(statement)
    return found
