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
import unicodedata
from collections import Counter
from collections.abc import Hashable
from fractions import Fraction

from .codeblocks import blocks_of
from .numbers import last_number


BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or an escaped character
ARTICLES = re.compile(r"\b(a|an|the)\b")
# Marks of a final answer; one at the beginning of a line comes first.
LINE = re.compile(
    r"^[^\w\n]*(?:(?:the|my|final|correct|right|best) )*answer[^\w\n:]*:[\s*_]*", re.IGNORECASE | re.MULTILINE
)
COLON = re.compile(r"\banswer[\s*_`]*:[\s*_]*", re.IGNORECASE)
SUBJECT = r"(?:answer|option|choice|letter|argument|expression|statement)"
VERB = re.compile(rf"\b{SUBJECT}[\s*_`]*\bis\b[\s*_:]*", re.IGNORECASE)
NAMING = r"(?:\b(?:the|correct|right|best|option|choice|letter|is)\b[\s:*_]*)+"
NAMED = re.compile(rf"^{NAMING}|{NAMING}$", re.IGNORECASE)  # Option B; A is the right option
COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\[()]|\\[\[\]](?=\s|$)")
ESCAPED = re.compile(r"\\([\[\]{}_])")
FORMULA = re.compile(r"\\\(|\\\[\s|\\(?:boxed|text)")  # but `\[1, 2\]` is a list with escaped brackets
MARKUP = re.compile(r"^[\s*_$`]+|[\s*_$`.]+$")
FENCE = re.compile(r"`{3,}")
BLOCK = re.compile(r"`{3,}\w*\n(.*?)\n?`{3,}", re.DOTALL)
# An option of a question: a letter and its text, or a word after a dash.
OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]*(.+)$|^[ \t]*- (.+)$", re.MULTILINE)
# A letter that is no word: alone, in brackets, or in front of a stop. Only A and I are words, too.
LETTER = re.compile(r"[(\[]([A-Za-z])[)\]][.:,]?\s*|([A-Z])(?:[.:,)]\s*|$|(?<![AI])\s+)|([a-z])$")
SEVERAL = re.compile(r"(?:and|or|&|/)\s*[(\[]?[A-Z]\b|[(\[]?[A-Z][)\]]?$")
# Punctuation of a span that is more than that.
MEANT = re.compile(r"((?<=\d)[.,:/-](?=\d)|(?<![\w)])-(?=\.?\d)|(?<=[A-Za-z])[+#]+|[<>])")
GROUPING = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,000
DASHES = str.maketrans("−‐‑‒–", "-----")
WORDS = ("yes", "no", "true", "false", "valid", "invalid")  # answers to questions without options
LONGEST = 10_000  # characters that are read
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
    if (whole := _line(text)) is None:
        return None
    options, words = _options(question)
    line = NAMED.sub("", VERB.split(whole)[-1], count=1).strip("'\"`*_ ")  # without "the right option is"
    for part in (whole, line):
        if len(same := [letter for letter, option in options.items() if option == _same_case(part)]) == 1:
            return same[0]
    match = None if words else LETTER.match(line)
    if match:
        letter, rest = next(filter(None, match.groups())).upper(), line[match.end() :]
        named = [other for other, option in options.items() if option == _same_case(rest)]
        wrong = letter not in named if named else SEVERAL.match(rest) or (options and letter not in options)
        return None if wrong else letter
    said, known = normalised(line), words or ([] if options else WORDS)
    found = {word for word in said.split() if word in known}
    if said in known:
        return said
    first = said.partition(" ")[0]
    if len(found) == 1 and "not" not in said.split():
        return found.pop()
    return first if first in known and not re.match(r"\w+ (?:or|and)\b", said) else None


def _options(question: str) -> tuple[dict[str, str], list[str]]:
    """The texts of a question's options by their letters, and its options that are words."""
    options, words = {}, []
    for one, other, option, word in OPTION.findall(question):
        letter = one or other
        if word:
            words.append(normalised(word))
        elif letter == "A":
            options, words = {"A": _same_case(option)}, []  # the last list counts
        elif options and letter == chr(ord("A") + len(options)):
            options[letter] = _same_case(option)
    return options, words


def final_span(text: str) -> str | None:
    """The line behind "Answer:", [`normalised`], but with the punctuation that a number or a name consists of: `-5`,
    `1.5`, `1/2`, `19-20`, `C++`."""
    line = GROUPING.sub("", _line(text) or "").translate(DASHES)
    parts = [part if i % 2 else normalised(part) for i, part in enumerate(MEANT.split(line))]
    return "".join(parts) or None


def final_value(text: str) -> Hashable | None:
    """The Python or JSON value behind "Answer:", as [`comparable`]. A single word without quotes is a string."""
    tail = _tail(text)
    if tail is None:
        return None
    first = tail.partition("\n")[0]
    if block := BLOCK.match(tail):
        parts = [block[1]]
    else:
        quoted = re.match(r"`([^`]+)`", first)
        line = _line(text) or ""
        unescaped = ESCAPED.sub(r"\1", line if FORMULA.search(first) else MARKUP.sub("", first))
        parts = [*([quoted[1]] if quoted else ()), tail, unescaped, line.rpartition(" = ")[2]]
    for part in parts:
        if (found := _literal(part.strip().removesuffix("."))) is not None:
            return found
    word = MARKUP.sub("", parts[0] if block else line)
    return word if re.fullmatch(r"[^\s\[\](){}'\"`\\]+", word) else None


def final_call(text: str) -> Hashable | None:
    """The function call in the last block of an answer that has one in JSON, `{"name": …, "arguments": {…}}`; several
    calls in any order. As [`comparable`], without case, blanks and punctuation in strings."""
    try:
        calls = Counter(comparable([call["name"], call["arguments"]], plain) for call in calls_of(text))
    except RecursionError:
        return None
    return frozenset(calls.items()) or None


def calls_of(text: str) -> list[dict]:
    """The calls of [`final_call`], each with `name` (`str`) and `arguments` (`dict`)."""
    text = text[-LONGEST:]
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
    return _all_allowed(calls_of(text), [pair for each in json.loads(reference) for pair in each.items()])


def _all_allowed(calls: list[dict], allowed: list[tuple[str, dict]]) -> bool:
    """Whether calls and allowed ones go together in pairs."""
    if not calls or len(calls) != len(allowed):
        return not calls and not allowed
    return any(
        name == calls[0]["name"]
        and _arguments_fit(calls[0]["arguments"], values)
        and _all_allowed(calls[1:], allowed[:place] + allowed[place + 1 :])
        for place, (name, values) in enumerate(allowed)
    )


def normalised(text: str, keep_articles: bool = False) -> str:
    """Text without case, punctuation and articles, with single blanks (as in SQuAD,
    https://huggingface.co/papers/1606.05250). An article alone stays: it may be the letter A."""
    text = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    without = [] if keep_articles else ARTICLES.sub(" ", text).split()
    return " ".join(without or text.split())


def _same_case(text: str) -> str:
    """Text without case and final period, with single blanks."""
    return " ".join(text.casefold().split()).removesuffix(".")


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
        case float() if value != value:
            return ("NaN",)  # which equals nothing, not even itself
    return value


def _tail(text: str) -> str | None:
    """What follows the last mark of a final answer."""
    text = text[-LONGEST:].replace("：", ":")
    for mark in (LINE, COLON, BOX, VERB):
        if found := [*mark.finditer(text)]:
            return (_content(text, found[-1].end()) or "") if mark is BOX else text[found[-1].end() :].strip()
    return None


def _line(text: str) -> str | None:
    """The first line of [`_tail`] that says something, without markup."""
    if (tail := _tail(text)) is None:
        return None
    for line in tail.splitlines():
        box = BOX.search(line)
        said = (_content(line, box.end()) or "") if box else line
        said = MARKUP.sub("", COMMAND.sub(r"\1", said))
        if said and not FENCE.match(line.strip()):
            return said
    return ""


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
    """A Python or JSON literal, as [`comparable`]; `None` if it is none."""
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
            if "arguments" not in value and isinstance(arguments, dict) and "properties" in arguments:
                arguments = None  # the schema of a function
            if isinstance(arguments, str):  # as the API of OpenAI writes them
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    arguments = None
            if isinstance(arguments, dict):
                calls.append({"name": value["name"], "arguments": arguments})
            else:
                end = place + 1  # the call may be inside
        elif isinstance(value, dict):
            end = place + 1
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
