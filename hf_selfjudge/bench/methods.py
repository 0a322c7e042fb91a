"""In: text such as `margin=0.3,0.7`. Out: the [`Method`]s of decoding that a bench compares. They are read without a
model, so that mistakes are found before one is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..decoding.rules import Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Rule, TopK
from ..judge.judge import Judge
from ..judge.threshold import Threshold
from .tradeoff import BASE


@dataclass(frozen=True)
class Family:
    """What methods that differ only in their arguments have in common."""

    rule: type[Rule] | None = None  # decides about mismatches; `None` for decoding without a rule
    defaults: str = ""  # arguments to compare by default; empty if the family takes none
    needs_draft: bool = False  # a draft model: drafts of prompt lookup have no probabilities


FAMILIES = {
    "lossless": Family(Lossless),  # this package, with a rule that accepts nothing
    "greedy": Family(),  # the target alone
    "stock": Family(),  # assisted generation of transformers
    "draft": Family(needs_draft=True),  # the draft alone
    # Assisted generation that verifies against a mixture of target and draft.
    "ensemble": Family(None, "0.25,0.5,0.75", needs_draft=True),
    "top-k": Family(TopK, "2,3,5"),
    "margin": Family(Margin, "0.5,1,2"),
    "kl": Family(KLGate, "0.05,0.2,0.8", needs_draft=True),
    "look-ahead": Family(LookAhead, "2:0.05,2:0.02,1:0.02"),
    "coin": Family(Coin, "0.25,0.5,0.75"),
    "judge": Family(JudgeRule, "0.2,0.35,0.5"),
}


@dataclass(frozen=True)
class Method:
    """
    One method of decoding.

    Args:
        family (`str`): A name in `FAMILIES`.
        arguments (`tuple`): Arguments of the rule, the threshold first: numbers, or for a judge a [`Threshold`] or the
            name of an operating point.
        judge (`str`, *optional*): Folder or Hub id of the judge.
        named (`bool`): Whether tables show the judge's name, because it is not the shipped one.
        like ([`Method`], *optional*): For a coin that accepts as often as a judge, the method of that judge.
        draft (`str`, *optional*): Name of the draft, if it is not the pair's own.
        length (`int` or `str`, *optional*): Tokens to draft in a round, if they are not those of the bench: a number,
            `"auto"` for a rule, or `"default"` for what transformers chooses.
        lookup (`int`, *optional*): Tokens to look up in a round, beside a draft model.
    """

    family: str
    arguments: tuple[float | str | Threshold, ...] = ()
    judge: str | None = None
    named: bool = False
    like: Method | None = None
    draft: str | None = None
    length: int | str | None = None
    lookup: int | None = None

    @property
    def curve(self) -> str:
        """Name of all methods that differ only in their arguments: a line in a plot."""
        if self.like is not None:
            return f"{self.family} like {self.like.curve}"
        return self._with("")

    @property
    def name(self) -> str:
        """Unique among the methods of a bench."""
        if self.like is not None:
            return f"{self.family} like {self.like.name}"
        values = [f"{value:g}" if isinstance(value, int | float) else str(value) for value in self.arguments]
        return self._with("=" * bool(values) + ":".join(values)) + (f", {self.draft}" if self.draft else "")

    def _with(self, values: str) -> str:
        judge = f":{Path(self.judge).name}" if self.named else ""
        length = "" if self.length is None else f"@{self.length}"
        return self.family + judge + values + length + (f"+{self.lookup}" if self.lookup else "")

    @property
    def judge_curve(self) -> str | None:
        """The curve of the judge that this method is or imitates."""
        return (self.like or self).curve if self.like or self.judge else None

    def rule(self, judges: Mapping[str, Judge], share: float | None = None) -> Rule | None:
        """The rule to decode with, or `None`. `judges` are by folder or Hub id. `share`, in [0, 1], is for a coin that
        imitates a judge: the share of mismatches that it accepts."""
        if self.judge is not None:
            return JudgeRule(judges[self.judge], *self.arguments, allow_other_weights=True)
        rule = FAMILIES[self.family].rule
        return None if rule is None else rule(*(self.arguments if self.like is None else (share,)))


def parse_methods(texts: Sequence[str] | None, shipped: str | None = None, lookup: bool = False) -> list[Method]:
    """
    Read what to compare: `NAME` or `NAME=VALUE,VALUE,…`. Several arguments of a rule are joined with colons:
    `look-ahead=2:0.05` is `LookAhead(2, 0.05)`. A judge is `judge=0.2,0.4` (the shipped one) or
    `judge:FOLDER=changes_5`; `judge=0.03/token` is a threshold for each token gained, and without a value a judge uses
    its own. `coin` without a value is a coin for each method of a judge, which accepts the same share of mismatches.

    `@16` at the end drafts 16 tokens a round, `@auto` as many as pay, `stock@default` as many as transformers chooses.
    `@16+10` looks 10 tokens up instead, in rounds where that is expected to keep as many.

    Args:
        texts (`Sequence[str]`, *optional*): By default all families that can be used, with their default arguments.
        shipped (`str`, *optional*): Folder of the judge that is shipped for the pair.
        lookup (`bool`): Whether drafts come from prompt lookup.

    Returns:
        `list[Method]`: `lossless`, the reference for all others, comes first.

    Raises:
        ValueError: If a text has another form, or names a method that cannot be used.
    """
    if not texts:
        texts = [
            f"{name}={family.defaults}" if family.defaults else name
            for name, family in FAMILIES.items()
            if not (lookup and family.needs_draft) and (shipped or name != "judge")
        ] + ["coin"] * bool(shipped)
    methods = {BASE: Method(BASE)}
    for method in (method for text in texts if text != "coin" for method in _parse(text, shipped, lookup)):
        before = methods.setdefault(method.name, method)
        if before.judge != method.judge:
            raise ValueError(
                f"`rule`: the judges {before.judge} and {method.judge} have the same name {method.curve!r}. "
                "Rename one of the folders."
            )
        if before != method:
            raise ValueError(f"`rule`: two thresholds are both {method.name}. Leave one out.")
    if "coin" in texts:
        judged = [method for method in methods.values() if method.judge is not None]
        coins = [Method("coin", like=method, length=method.length, lookup=method.lookup) for method in judged]
        if not coins:
            raise ValueError(
                "`rule` 'coin' accepts as often as a judge, but no judge is compared. Give it a share: coin=0.5."
            )
        methods |= {coin.name: coin for coin in coins}
    return list(methods.values())


def _parse(text: str, shipped: str | None, lookup: bool) -> Iterator[Method]:
    """The methods of one text."""
    stem, length, beside = re.fullmatch(r"(.*?)(?:@(\d+|auto|default)(?:\+(\d+))?)?", text, re.DOTALL).groups()
    name, has_values, values = stem.rpartition("=") if "=" in stem else (stem, "", "")
    name, named, folder = name.partition(":")
    family, judged = FAMILIES.get(name), name == "judge"
    wrong = bool(has_values) != bool(values) or (named and not judged)
    if family is None or wrong or (bool(values) != bool(family.defaults) and not (judged and not values)):
        plain = ", ".join(name for name, family in FAMILIES.items() if not family.defaults)
        others = ", ".join(name for name, family in FAMILIES.items() if family.defaults)
        raise ValueError(
            f"`rule` must be {plain}, or one of {others} with its thresholds (margin=0.3,0.7; judge:FOLDER=0.2,0.4), "
            f"got {text!r}."
        )
    if judged and not folder and shipped is None:
        raise ValueError(
            f"`rule` {text!r}: no judge is shipped for this `pair` and kind of draft. Name one: judge:FOLDER=0.3."
        )
    if lookup and length == "default":
        raise ValueError(f"`rule` {text!r}: prompt lookup has no default length. Give a number.")
    if lookup and family.needs_draft:
        raise ValueError(f"`rule` {text!r} needs a draft model; with prompt lookup there is none. Leave it out.")
    length = int(length) if length is not None and length.isdecimal() else length
    beside = None if beside is None else int(beside)
    if beside is not None and (lookup or family.rule is None or family.needs_draft or not beside):
        raise ValueError(
            f"`rule` {text!r}: tokens are looked up beside a draft model, by a rule such as lossless, 1 or more in a "
            f"round. Leave out +{beside}."
        )
    if name in ("greedy", "draft") and length is not None:
        raise ValueError(f"`rule` {text!r}: {name} decodes without drafts. Leave out @{length}.")
    if length == 0 or length == ("auto" if family.rule is None else "default"):
        other = "'default'" if family.rule is None else "'auto'"
        raise ValueError(f"`rule` {text!r}: {name} drafts a number of tokens, 1 or more, or {other}, got @{length}.")
    if length is None and not judged and "@" in text:
        raise ValueError(f"`rule` {text!r}: @ is followed by the length of drafts: a number, 'auto' or 'default'.")
    for part in values.split(","):
        try:
            if judged:
                # The name of an operating point is checked later, when the judge has been read.
                arguments = (part if part.isidentifier() else Threshold.parse(part),) if part or values else ()
                yield Method(name, arguments, folder or shipped, bool(folder), length=length, lookup=beside)
                continue
            numbers = part.split(":") if values else ()
            arguments = tuple(int(number) if number.strip().isdecimal() else float(number) for number in numbers)
            if name == "ensemble" and (len(arguments) != 1 or not 0 < arguments[0] < 1):
                raise ValueError(f"the target's weight must lie between 0 and 1, got {part}.")
            method = Method(name, arguments, length=length, lookup=beside)
            method.rule({})  # refuses arguments that it cannot have
            yield method
        except (TypeError, ValueError) as error:
            raise ValueError(f"`rule` {text!r}: {error}") from error
