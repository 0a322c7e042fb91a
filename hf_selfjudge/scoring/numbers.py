"""In: the text of an answer, with its Markdown and LaTeX. Out: the exact value of its last number, or `None`.

Everything that separators or operators join to the last digits is read together, or not at all: the value is never
that of a part. What is read:

- digits of any script, with or without zeros before the number: `5`, `-5`, `+5`, `007`, `.5`, `18.00`;
- thousands, grouped by commas (also as in India: `1,00,000`), spaces of any kind, apostrophes or underscores: `1,000`,
  `1{,}000`, `1 000`, `1'000`, `1_000`. A point always begins decimals;
- fractions: `3/4`, `½`, `3 1/2`, `3½`, `\\frac{3}{4}`, `3\\frac12`;
- powers: `10^3`, `10³`, `2**10`, `1e3`, `1.5 × 10^{3}`;
- scales: `5k`, `$5M`, `$5m`, `$5B`, `$5 bn`, `1.5 million`, dozen, hundred to trillion, lakh and crore;
- a minus directly before the number, or after `=`. The hyphen of `GPT-4` and the dash of a list are no minus.

Currencies, per cent, degrees, units (`5kg`, `50 m²`) and emphasis are ignored. The following cannot be read: ranges,
sums and other terms (`10-15`, `5 + 3`, `2x`, `5\\pi`, `2\\sqrt{3}`, `f(3)`), dates, times, ratios, versions, digits in
names (`H2O`, `7B`), unclear commas and points (`1,5`, `1.000,50`, `1,2,3`), an unclear minus (`total - 5`, `minus 5`),
and very long numbers; in a box also inequalities, absolute values, intervals that end at infinity, and `3!`. Numbers
in words are ignored.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction


LONGEST = 200  # characters of a number
WORDS = {"hundred": 10**2, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9}
WORDS |= {"trillion": 10**12, "dozen": 12, "bn": 10**9}
SCALES = {"k": 10**3, "K": 10**3, **WORDS}
NO_UNITS = ("e", "i", "n", "x", "y", "z", "pi", "M", "B")
LETTERS = {  # characters that mean the same, and the one that replaces them
    "−﹣－": "−", "‐‑‒–": "-", "―": "—", "＋": "+", "⁄∕÷／": "/", "·⋅∙✕✖＊": "×", "．٫": ".", "٬": ",", "：": ":",
    "‘’ʼ": "'", "％": "%", "＝≈≅⇒→⟹": "=", "～": "~", "⟨": "(", "⟩": ")", "\r\v\f\x85\u2028\u2029": "\n",
}  # fmt: skip


class _Characters(dict):
    """The replacement of each character, for `str.translate`. A fraction is put between ⟨ and ⟩."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind, parts = unicodedata.category(character), unicodedata.decomposition(character)
        if kind == "Nd":
            character = str(unicodedata.decimal(character))
        elif kind in ("Zs", "Cf", "Sc"):
            character = {"Zs": " ", "Cf": "", "Sc": "$"}[kind]
        elif parts.startswith("<fraction>"):
            character = f"⟨{unicodedata.normalize('NFKC', character)}⟩".replace("⁄", "/")
        self[code] = character
        return character


CHARACTERS = _Characters({ord(character): to for characters, to in LETTERS.items() for character in characters})
GROUPED = "|".join(rf"[1-9]\d{{0,2}}(?:{mark}\d{{3}})+" for mark in ",'_ ")
DECIMAL = rf"(?:(?:{GROUPED}|[1-9]\d?(?:,\d\d)+,\d{{3}}|\d+)(?:\.\d+)?|\.\d+)"
SIGNED = rf"[-−+]?{DECIMAL}"
EXPONENT = r"([-−+]?\d{1,3})"
# Each form of a number, and the function that gives its value.
FORMS = [
    (re.compile(form + "([A-Za-z]*)"), value)
    for form, value in (
        (rf"({DECIMAL})", lambda number: number),
        (rf"({DECIMAL})(?: ?[×*xX] ?10\^|[eE]){EXPONENT}", lambda number, power: number * Fraction(10) ** power),
        (rf"({DECIMAL})\^{EXPONENT}", lambda number, power: number**power),
        (rf"({DECIMAL}) ?/ ?({DECIMAL})", lambda above, below: above / below),
        (rf"⟨({SIGNED})/({SIGNED})⟩", lambda above, below: above / below),
        (
            r"(\d+)(?: | ?⟨)([1-9]\d?)/(\d+)⟩?",
            lambda whole, above, below: whole + above / below if above < below else None,
        ),
    )
]
# Digits, and everything that is joined to them.
ATOM = r"(?:⟨[^⟩]*⟩|\.?\d[\dA-Za-z]*)"
JOINT = r"(?:[.,:'_，、…]+|[ \t]*(?:[-−+*/^×±—&][ \t]*)+|[ \t]+(?:[xX:][ \t]+)?|(?=⟨))"
RUN = re.compile(rf"{ATOM}(?:{JOINT}{ATOM})*")
TERM = re.compile(r"[ \t]*(?:[\\π√^&₀-₉百千万萬億亿兆]|(?:pi|[inxyz])\b)")  # a number before it is part of a term
# A box with one number is more than that number if it has an order, infinity, bars, another equation or a factorial.
MORE = re.compile(r"[<>≤≥≠∞|]|=[^=\d]*\d[^=]*[^\w=](?:[A-Za-z]\w*|\\)[\s&]*=[^=]*$|\d *[!'′](?!\d)")
SCALE = re.compile(rf"(?:[ \t]{{0,3}}|-)({'|'.join(WORDS)})s?\b", re.IGNORECASE)


def _fraction(match: re.Match) -> str:
    above, below = ((match[i] or match[i + 1] or "").strip() for i in (1, 3))
    numbers = re.fullmatch(SIGNED, above) and re.fullmatch(SIGNED, below)
    return f"⟨{above}/{below}⟩" if numbers else match[0]


# Markdown and LaTeX -> plain text, in this order.
REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\\\", "\n"),
        (r"\\n(?![A-Za-z])", "\n"),
        (r"\\(?:begin|end) *\{(?:align|aligned|gather|gathered|equation|split)\*?\}", " "),
        (r"(\\[A-Za-z]+)_(?:\{[^{}]*\}|\w)", r"\1 "),  # \log_{10}
        (r"\\infty(?![A-Za-z])", "∞"),
        (r"\\(?:[lg]t|[lg]eq?)(?![A-Za-z])", "≤"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|~|\\[()\[\]]|\\(?:left|right|quad|qquad|displaystyle)(?![A-Za-z])", " "),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"\\(?:approx|equiv|sim|implies|[Rr]ightarrow|to)(?![A-Za-z])", "="),
        (r"\^ *(?:\{ *)?\\circ *\}?|\\degree(?![A-Za-z])|\\%|[°%]", ""),
        (r"\\(?:text)?color *\{[^{}]*\}", ""),
        (r"\\(?:(?:bf|it|rm|tiny|small|[Ll]arge|LARGE|[Hh]uge)(?![A-Za-z])|mathbf *(?=\d))", " "),
        (r"\\(?:text[a-z]*|math[a-z]*|mbox|operatorname|underline) *\{([^{}]*)\}", r"\1"),
        (r"\^ *\{? *(st|nd|rd|th)\b *\}?", r"\1"),
        (r"\\([^A-Za-z0-9\s])", r"\1"),
        (r"\b(?:USD|EUR|GBP|INR|Rs)\.? ?(?=\d)", "$"),
        (r"(?<=\bNo)\.(?=\d)", " "),
        (r"([-−]\$) +(?=[\d.])", r"\1"),
        (r"\$ ?([-−]?[\d.,]+)(?:m| ?M)\b(?! *\$)", r"$\1 million"),
        (r"\$ ?([-−]?[\d.,]+) ?B\b(?! *\$)", r"$\1 billion"),
        (r"\b[A-Z]{1,3}(?=\$ ?[\d.])", ""),  # US$
        (r"(?<=[A-Za-z])\$", " "),
        (r"(?<=\d) +\$(?=[\d.])", "; "),  # 4 $5 bills
        (r"\$", ""),
        (r"(?<=\d)\*\*(?=\d)", "^"),
        (r"\*\*|__+|`|(?<!\w)_(?=[^\s_])|(?<=[^\s_])_(?!\w)", ""),
        (r"<sup>", "^"),
        (r"</?[A-Za-z]+>", " "),
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0])),
        (r"\^ *\{ *([-−+]?\d+) *\}", r"^\1"),
        (r"([A-Za-z]{2}|(?<![A-Za-z])[ms])\^[-−]?\d+", r"\1"),  # the power of a unit
        (r"\\[dtc]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))", _fraction),
        (r"(?<=\d) and (?=\d+ ?/|⟨|(?:a|one) (?:half|third|quarter)\b)", "&"),
        (r"\\[A-Za-z]+", "\\\\"),
        (r"(^|\n|[=:(,*]|\w[ \t])([ \t]*)\{([^{}]*)\}", r"\1\2 \3 "),  # braces without a command
    )
]


def last_number(text: str, alone: bool = False) -> Fraction | None:
    """The value of the last number of a text; `None` if there is none, or it cannot be read. With `alone`, there must
    be no other number, except before `=`."""
    text = text.translate(CHARACTERS)
    for pattern, to in REWRITES:
        text = pattern.sub(to, text)
    if alone:
        text = re.sub(r"^\s*([-−])[ \t]+(?=[.\d⟨])", r"\1", text)  # no list begins in a box
    if alone and MORE.search(text):
        return None
    runs = [run.span() for run in RUN.finditer(text, text.rfind("=") + 1 if alone else 0)]
    return None if not runs or (alone and len(runs) > 1) else _value(text, *runs[-1])


def _value(text: str, start: int, end: int) -> Fraction | None:
    """The value of the number at this place in plain text."""
    run, line = text[start:end], text[:start].rpartition("\n")[2]
    zeros = re.match(r"0\d", run) and line.rstrip().endswith(",")  # 1, 000
    repeats = "." in run and text.startswith(("..", "…"), end)  # 0.33...
    sign = _sign(line)
    if len(run) > LONGEST or zeros or repeats or sign is None or TERM.match(text, end):
        return None
    for form, value in FORMS:
        match = form.fullmatch(" ".join(run.split()))
        if match:
            *parts, unit = match.groups()
            if unit in NO_UNITS:
                return None
            word = SCALE.match(text, end)
            scale = WORDS[word[1].lower()] if word else SCALES.get(unit, 1)
            numbers = [Fraction(re.sub("[,'_ ]", "", part).replace("−", "-")) for part in parts]
            try:
                found = value(*numbers)
            except ZeroDivisionError:
                return None
            return None if found is None else sign * scale * found
    return None


def _sign(line: str) -> int | None:
    """The sign of a number after `line`: 1 or -1; `None` if that is unclear, or the number is part of a name or a
    term."""
    head = line.rstrip()
    sign = {"-": -1, "−": -1, "+": 1}.get(head[-1:])
    if sign is None:
        return 1 if _may_begin(line) else None
    front = head[:-1]
    if head != line:
        return sign if front.rstrip().endswith("=") else 1 if _may_begin(line) else None
    if front[-1:].isascii() and front[-1:].isalnum():
        name = head[-1] == "-" and re.fullmatch("[A-Za-z]{2}", front[-2:]) and _may_begin(f"{front} ")
        return 1 if name else None
    return sign if _may_begin(front) else None


def _may_begin(line: str) -> bool:
    """Whether a number may begin after `line`. If not, the number is part of something longer."""
    head = line.rstrip()
    last, spaced = head[-1:], head != line
    if spaced and head.strip(" \t>") in ("-", "+", "*"):
        return True  # after the mark of a list
    if last == "*":
        return not spaced and (
            len(head) == 1 or not (head[-2].isalnum() or head[-2] in ")]}")
        )  # after the mark of emphasis
    if last and last in "-−+/^×±&√\\{⟩" or head.lower().endswith((*WORDS, "minus", "negative")):
        return False
    if spaced or not last:
        return True
    if last == "(":  # part of a product or a term?
        front = head[:-1]
        if front[-1:].isascii() and front[-1:].isalnum():
            return False  # or the argument of a function
        return front[-1:] not in (")", "\\") and front.rstrip()[-1:] not in tuple("-−+*/^×")
    return not (last in "_.)]}" or (last.isascii() and last.isalnum()))
