"""In: tokens, or any text. Out: the text of each part of an answer, or text in which a terminal, Markdown, a plot, a
shell or Python finds no markup."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
import warnings
from collections.abc import Sequence

from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


INCOMPLETE = "\ufffd"  # a decoder puts this in place of an incomplete character
# Control characters, which move a terminal's cursor or change its colours -> symbols for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), INCOMPLETE)


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int], growing: bool = False
) -> list[str]:
    """
    The text of an answer in pieces, which join to exactly the text of the whole answer. Decoding the parts one by one
    would not do, since decoders look at neighbours (for a space at the beginning, or a character of several tokens).
    A character belongs to the piece that completes it.

    Args:
        ids (`Sequence[int]`): The tokens of the answer. Special tokens are skipped.
        ends (`Sequence[int]`): The number of tokens up to the end of each piece, ascending; the last is that of all.
        growing (`bool`): Whether more tokens will come. An incomplete character at the end is then left out.
    """
    ids = list(ids)
    whole = _complete(tokenizer, ids) if growing else tokenizer.decode(ids, skip_special_tokens=True)
    places = [0]
    for end in ends[:-1]:
        begins = tokenizer.decode(ids[:end], skip_special_tokens=True), _complete(tokenizer, ids[:end])
        places.append(max(places[-1], *(len(os.path.commonprefix([begin, whole])) for begin in begins)))
    places.append(len(whole))
    return [whole[i:j] for i, j in itertools.pairwise(places)][: len(ends)]


def _complete(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of the longest beginning that ends with a whole character."""
    for end in range(len(ids), 0, -1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if not text.endswith(INCOMPLETE):
            return text
    return ""


def token_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """The text that a token adds after others, or its name in the vocabulary if it adds no whole character."""
    text = pieces(tokenizer, [*before, token], [len(before), len(before) + 1])[-1]
    return text if text and INCOMPLETE not in text else tokenizer.convert_ids_to_tokens(token)


def in_terminal(text: str, style: str = "") -> Text:
    """Text for rich, without markup, emoji codes and control characters."""
    return Text(text.translate(CONTROLS), style)


def one_line(text: str) -> str:
    """Text in one line, without control characters."""
    return " ".join(text.split()).translate(CONTROLS)


def in_markdown(text: str) -> str:
    """Text for a sentence, a heading or a cell of a table in Markdown."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("\\", "&#92;")):
        text = text.replace(character, entity)
    # An underscore within a word is not markup.
    return re.sub(r"[`*~|$]|\](?=[\[(])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def in_code(text: str) -> str:
    """Text as code in Markdown, or as plain text if it has a character that code cannot have."""
    line = one_line(text)
    return in_markdown(line) if re.search(r"[`|]", line) else f"`{line}`"


def in_python(text: str) -> str:
    """Text as a string in Python code."""
    return json.dumps(text, ensure_ascii=False)


def in_plot(text: str) -> str:
    """Text for a label in matplotlib, where dollars enclose formulas, and legends leave out labels that begin with
    `_`."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def in_shell(text: str) -> str:
    """Text as one word of a command for bash, in one line."""
    if text.isprintable():
        return shlex.quote(text)
    for character, escape in (("\\", r"\\"), ("'", r"\'"), ("\n", r"\n"), ("\t", r"\t")):
        text = text.replace(character, escape)
    return "$'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + "'"


def parse_python(code: str) -> ast.Module | None:
    """The syntax tree of code; `None` if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
