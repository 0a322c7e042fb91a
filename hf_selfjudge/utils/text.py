"""Text that is shown: parts of a decoded answer, and data that a medium would take for markup.

In: tokens, or any text at all. Out: text that a terminal, Markdown, a plot, a shell or Python shows or reads as it is.
"""

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


INCOMPLETE = "\ufffd"  # what a decoder puts in the place of a part of a character
# Characters that move a terminal's cursor or change its colours -> signs that stand for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), INCOMPLETE)


# -- parts of an answer ----------------------------------------------------------------------------------------------


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int], growing: bool = False
) -> list[str]:
    """
    The text of an answer in pieces. They join to exactly what the answer decodes to, which parts that are decoded one
    by one do not: decoders look at neighbours (a space at the beginning, a character of several tokens). A character
    belongs to the piece that completes it.

    Args:
        ids (`Sequence[int]`): The answer. Special tokens are skipped.
        ends (`Sequence[int]`): Behind which of its tokens each piece ends, ascending, the last behind all of them.
        growing (`bool`): Whether more tokens will come: a character that is not complete yet is then left out.
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
    """The text of the longest beginning that ends with a whole character. Behind it, a decoder of bytes may not even
    show the whole characters before the incomplete one."""
    for end in range(len(ids), 0, -1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if not text.endswith(INCOMPLETE):
            return text
    return ""


def token_text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """What a token adds behind others; of one that adds nothing, or a part of a character, its name in the
    vocabulary."""
    text = pieces(tokenizer, [*before, token], [len(before), len(before) + 1])[-1]
    return text if text and INCOMPLETE not in text else tokenizer.convert_ids_to_tokens(token)


# -- text that is no markup ------------------------------------------------------------------------------------------


def in_terminal(text: str, style: str = "") -> Text:
    """For rich: no markup, no emoji codes, no control characters."""
    return Text(text.translate(CONTROLS), style)


def one_line(text: str) -> str:
    """Without control characters, too."""
    return " ".join(text.split()).translate(CONTROLS)


def in_markdown(text: str) -> str:
    """In a sentence, a heading or a cell of a table."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("\\", "&#92;")):
        text = text.replace(character, entity)
    # An underscore within a word is one.
    return re.sub(r"[`*~|$]|\](?=[\[(])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def in_code(text: str) -> str:
    """As code in Markdown; what such a span cannot hold, as text."""
    line = one_line(text)
    return in_markdown(line) if re.search(r"[`|]", line) else f"`{line}`"


def in_python(text: str) -> str:
    """As a string in code."""
    return json.dumps(text, ensure_ascii=False)


def in_plot(text: str) -> str:
    """As a label in matplotlib, where dollars enclose formulas, and legends leave out what begins with `_`."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def in_shell(text: str) -> str:
    """As one word of a command for bash, in one line."""
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
