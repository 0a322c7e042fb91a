"""In: the text of an answer. Out: the final answer that it ends in, as a value that can be compared, or `None`.

One function for each kind of final answer; `checks.py` says how they are scored. Numbers are read anywhere
([`final_number`]), calls in JSON ([`final_call`]), all others behind the last "Answer:"; without one in the last box,
or behind "the answer is".
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Hashable
from fractions import Fraction

from .codeblocks import blocks_of
from .numbers import last_number


BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or an escaped character
ARTICLES = re.compile(r"\b(a|an|the)\b")
COLON = re.compile(r"\banswer[\s*_`]*:[\s*_]*", re.IGNORECASE)
VERB = re.compile(r"\b(?:answer|option|choice)[\s*_`]*\bis\b[\s*_:]*", re.IGNORECASE)
COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\[()\[\]]")
# An option of a question: a letter and its text, or a word after a dash.
OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]*(.+)$|^[ \t]*- (.+)$", re.MULTILINE)
LETTER = re.compile(r"[(\[]?([A-Z])(?![\w'’])[)\]]?[.:,]?\s*")
WORDS = ("yes", "no", "true", "false", "valid", "invalid")  # answers to questions without options
LONGEST = 10_000  # characters of a value
LEFT_OUT = re.compile(r"[ ,./\-_*^()]")  # in strings of calls, as in the Berkeley function-calling leaderboard


def final_number(text: str) -> Fraction | None:
    """The value of the number in the last `\\boxed{}` or `\\fbox{}` of an answer, or of its last number if it has no
    box. `None` if there is no number, it cannot be read (see `numbers.py`), or the box holds several or was cut
    off."""
    boxes = [*BOX.finditer(text)]
    if not boxes:
        return last_number(text)
    content = _content(text, boxes[-1].end())
    return None if content is None else last_number(content, alone=True)


def final_choice(text: str, question: str) -> str | None:
    """
    The option that an answer chooses: a letter (`"B"`), or a word in lower case (`"yes"`) where options are words.
    Options are found in the question as lines that begin with `A.`, `A)`, `(A)` or `-`. The text of an option counts
    as its letter. `None` if several are named, or what is named is no option.
    """
    line = _line(text)
    if line is None:
        return None
    line = VERB.split(line)[-1].strip("'\"` ")  # Answer: the right option is B
    found = OPTION.findall(question)
    options = {one or other: _same_case(option) for one, other, option, word in found if not word}
    if match := LETTER.match(line):
        letter, rest = match[1], line[match.end() :]
        others = [other for other, option in options.items() if option == _same_case(rest)]
        several = re.match(r"(?:and|or|&|/)\s*[(\[]?[A-Z]\b", rest) or LETTER.fullmatch(rest)
        wrong = several or (others and letter not in others) or (options and letter not in options)
        return None if wrong else letter
    if len(letters := [letter for letter, option in options.items() if option == _same_case(line)]) == 1:
        return letters[0]
    words = [normalised(word) for *_, word in found if word] or ([] if options else WORDS)
    said = normalised(line)
    return next((word for word in words if word in (said, said.partition(" ")[0])), None)


def final_span(text: str) -> str | None:
    """The line behind "Answer:", [`normalised`]."""
    return normalised(_line(text) or "") or None


def final_value(text: str) -> Hashable | None:
    """The Python or JSON value behind "Answer:", as [`comparable`]. A single word without quotes is a string."""
    tail = _tail(text)
    if tail is None:
        return None
    block = re.match(r"`{3,}\w*\n(.*?)`{3,}", tail, re.DOTALL)
    line = _line(text) or ""
    for part in [block[1]] if block else [tail, line.strip("` "), line.strip("` ").removesuffix(".")]:
        found = _literal(part.strip())
        if found is not None:
            return found
    word = line.strip("` ")
    return word if re.fullmatch(r"[^\s\[\](){}'\"]+", word) else None


def final_call(text: str) -> Hashable | None:
    """The function call in the last block of an answer that has one in JSON, `{"name": …, "arguments": {…}}`; several
    calls in any order. As [`comparable`], without case, blanks and punctuation in strings."""
    return frozenset(comparable([call["name"], call["arguments"]], plain) for call in calls_of(text)) or None


def calls_of(text: str) -> list[dict]:
    """The calls of [`final_call`], each with `name` (`str`) and `arguments` (`dict`)."""
    for part in [*(block.code for block in reversed(blocks_of(text))), text]:
        if calls := [*_calls(part)]:
            return calls
    return []


def has_allowed_call(text: str, reference: str) -> bool:
    """Whether an answer has the calls of a reference: calls, or what the Berkeley function-calling leaderboard has, a
    JSON list with a `{name: {argument: [allowed values]}}` for each call, where `""` allows to leave the argument
    out."""
    if (right := final_call(reference)) is not None:
        return final_call(text) == right
    left = [pair for each in json.loads(reference) for pair in each.items()]
    for call in calls_of(text):
        fits = (one for one in left if one[0] == call["name"] and _arguments_fit(call["arguments"], one[1]))
        if (found := next(fits, None)) is None:
            return False
        left.remove(found)
    return not left


def normalised(text: str, keep_articles: bool = False) -> str:
    """Text without case, punctuation and articles, with single blanks (as in SQuAD,
    https://huggingface.co/papers/1606.05250). An article alone stays: it may be the letter A."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    without = [] if keep_articles else ARTICLES.sub(" ", text).split()
    return " ".join(without or text.split())


def _same_case(text: str) -> str:
    return " ".join(text.casefold().split())


def plain(text: str) -> str:
    """A string of a call without case, blanks and punctuation."""
    return LEFT_OUT.sub("", text).lower().replace("'", '"')


def comparable(value: object, of_text=str) -> Hashable:
    """A value of literals that can be hashed, and equals that of another value if the two are equal in Python. Strings
    are replaced by `of_text` of them."""
    match value:
        case str():
            return of_text(value)
        case dict():
            return dict, frozenset((comparable(key), comparable(item, of_text)) for key, item in value.items())
        case set():
            return set, frozenset(comparable(item, of_text) for item in value)
        case list() | tuple():
            return type(value), tuple(comparable(item, of_text) for item in value)
    return value


def _tail(text: str) -> str | None:
    """What follows the last mark of a final answer."""
    for mark in (COLON, BOX, VERB):
        if found := [*mark.finditer(text)]:
            return (_content(text, found[-1].end()) or "") if mark is BOX else text[found[-1].end() :].strip()
    return None


def _line(text: str) -> str | None:
    """The first line of [`_tail`], without markup."""
    tail = _tail(text)
    if tail is None:
        return None
    box = BOX.search(tail.partition("\n")[0])
    line = (_content(tail, box.end()) or "") if box else tail.partition("\n")[0]
    return COMMAND.sub(r"\1", line).strip().strip("*_$").strip()


def _content(text: str, start: int) -> str | None:
    """The content of a box from `start`; `None` if it was cut off. Without braces, the rest of the formula."""
    if text[start : start + 1] != "{":
        return re.split(r"\$|\\\)|\n", text[start:], maxsplit=1)[0]
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


def _literal(text: str) -> Hashable | None:
    if not text or len(text) > LONGEST:
        return None
    for read in (ast.literal_eval, json.loads):
        try:
            value = comparable(read(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return ("None",) if value is None else value
    return None


def _calls(text: str) -> list[dict]:
    """The calls in a text, in their order."""
    decoder, calls, place = json.JSONDecoder(), [], text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            value, end = None, place + 1
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            arguments = value.get("arguments", value.get("parameters"))
            if isinstance(arguments, str):  # as the API of OpenAI writes them
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    arguments = None
            if isinstance(arguments, dict):
                calls.append({"name": value["name"], "arguments": arguments})
        elif isinstance(value, dict):
            end = place + 1  # the call may be inside
        place = text.find("{", end)
    return calls


def _arguments_fit(arguments: dict, allowed: dict) -> bool:
    """Whether each argument has one of its allowed values, and only those are left out that may be."""
    return arguments.keys() <= allowed.keys() and all(
        any(_fits(arguments[name], value) for value in values) if name in arguments else "" in values
        for name, values in allowed.items()
    )


def _fits(value: object, allowed: object) -> bool:
    if isinstance(allowed, dict) and isinstance(value, dict):
        return _arguments_fit(value, allowed)
    if isinstance(allowed, list) and isinstance(value, list):
        return len(allowed) == len(value) and all(map(_fits, value, allowed))
    return comparable(value, plain) == comparable(allowed, plain)
