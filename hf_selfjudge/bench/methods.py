"""What a bench compares: rules with their thresholds, and decoding without one.

In: text such as `margin=0.3,0.7`. Out: [`Setting`]s. Models are not needed to read them, so that a mistake is found
before any is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..decoding.rules import Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, Rule, TopK
from ..judge.info import limit_of, read_threshold
from ..judge.judge import Judge


# Decoding without a threshold: the target alone, stock assisted generation, ours without a rule, the draft alone.
PLAIN = ("greedy", "stock", "lossless", "draft")
TRAINING_FREE = {"top-k": TopK, "margin": Margin, "kl": KLGate, "look-ahead": LookAhead, "coin": Coin}
ENSEMBLE, COIN, JUDGE = "ensemble", "coin", "judge"
# Drafts of prompt lookup have no probabilities, and there is no draft that could answer alone.
NEED_DRAFT = ("draft", "kl", ENSEMBLE)
DEFAULT_RULES = (
    *PLAIN,
    "ensemble=0.25,0.5,0.75",
    "top-k=2,3,5",
    "margin=0.5,1,2",
    "kl=0.05,0.2,0.8",
    "look-ahead=2:0.05,2:0.02,1:0.02",
    "coin=0.25,0.5,0.75",
)


@dataclass(frozen=True)
class Setting:
    """
    One way of decoding.

    Args:
        family (`str`): What settings that differ in their threshold have in common: a line in a plot.
        values (`tuple[float | str, ...]`): The rule's arguments; the threshold first. Of a judge it may be for each
            token gained (`0.03/token`), or the name of an operating point.
        judge (`str`, *optional*): Folder or Hub id, if the rule is a judge.
        like ([`Setting`], *optional*): Of a coin: whose share of accepted mismatches it has.
    """

    family: str
    values: tuple[float | str, ...] = ()
    judge: str | None = None
    like: Setting | None = None

    @property
    def name(self) -> str:
        if self.like is not None:
            return f"{self.family} like {self.like.name}"
        values = (value if isinstance(value, str) else f"{value:g}" for value in self.values)
        return self.family + ("=" if self.values else "") + ":".join(values)

    def rule(self, judges: Mapping[str, Judge], share: float | None = None) -> Rule:
        """
        Args:
            judges (`Mapping[str, Judge]`): Those that are named, loaded.
            share (`float`, *optional*): Of a coin that is like another setting: that setting's, in [0, 1].
        """
        if self.judge is not None:
            return JudgeRule(judges[self.judge], *self.values, allow_other_weights=True)
        if self.like is not None:
            return Coin(share)
        return Lossless() if self.family == "lossless" else TRAINING_FREE[self.family](*self.values)


def parse_settings(texts: Sequence[str], shipped: str | None = None, lookup: bool = False) -> list[Setting]:
    """
    Read what is to be compared: `NAME` or `NAME=VALUE,VALUE,…`. Several arguments of a rule are joined with colons:
    `look-ahead=2:0.05` is `LookAhead(2, 0.05)`. A judge is `judge=0.2,0.4` (the shipped one) or `judge:FOLDER=strict`;
    `judge=0.03/token` is a threshold for each token gained, and without a value a judge decodes with its own. A `coin`
    without a value is thrown once for each setting of a judge, with the share that this one accepts.

    Args:
        shipped (`str`, *optional*): Folder of the judge that is shipped for the pair.
        lookup (`bool`): Whether drafts come from prompt lookup.

    Returns:
        `list[Setting]`: `lossless`, with which everything is compared, is always one of them.

    Raises:
        ValueError: If a text is none of these, or cannot be decoded with.
    """
    settings: dict[str, Setting] = {"lossless": Setting("lossless")}
    coins_like_judges = False
    for text in texts:
        name, _, numbers = text.rpartition("=") if "=" in text else (text, "", "")
        family, _, folder = name.partition(":")
        if family == JUDGE and not folder and shipped is None:
            raise ValueError(
                f"`rule` {text!r}: no judge is shipped for this `pair` and kind of draft. Name one: judge:FOLDER=0.3."
            )
        if lookup and needs_draft(text):
            raise ValueError(f"`rule` {text!r} needs a draft model; with prompt lookup there is none. Leave it out.")
        coins_like_judges |= text == COIN
        for setting in [] if text == COIN else _read(text, family, folder or shipped, bool(folder), numbers):
            if (before := settings.setdefault(setting.name, setting)) != setting:
                if setting.judge == before.judge:
                    raise ValueError(f"`rule`: two thresholds are both {setting.name}. Leave one out.")
                raise ValueError(
                    f"`rule`: the judges {before.judge} and {setting.judge} have the same name {setting.family!r}. "
                    "Rename one of the folders."
                )
    judges = [setting for setting in settings.values() if setting.judge is not None]
    if coins_like_judges and not judges:
        raise ValueError("`rule` 'coin' is thrown like a judge, but no judge is compared. Give it a share: coin=0.5.")
    if coins_like_judges:
        settings |= {coin.name: coin for coin in (Setting(COIN, like=judge) for judge in judges)}
    return list(settings.values())


def needs_draft(text: str) -> bool:
    """Whether what a text names is nothing without a draft model."""
    return text.partition("=")[0] in NEED_DRAFT


def _read(text: str, family: str, judge: str | None, named: bool, numbers: str) -> list[Setting]:
    """The settings of one text."""
    takes = (
        {JUDGE: (True, False)} | dict.fromkeys(PLAIN, (False,)) | dict.fromkeys((*TRAINING_FREE, ENSEMBLE), (True,))
    )
    valued = bool(numbers)
    if ("=" in text) != valued or valued not in takes.get(family, ()) or (named and family != JUDGE):
        raise ValueError(
            f"`rule` must be {', '.join(PLAIN)}, or one of {', '.join([*TRAINING_FREE, ENSEMBLE, JUDGE])} with its "
            f"thresholds (margin=0.3,0.7; judge:FOLDER=0.2,0.4), got {text!r}."
        )
    settings = []
    for part in numbers.split(","):
        try:
            if family == JUDGE:
                values = (read_threshold(part),) if numbers else ()
                for threshold in values:
                    # A name is that of an operating point, and the judge has not been read yet.
                    if isinstance(threshold, float) or not threshold.isidentifier():
                        limit_of(threshold)
                name = f"judge:{Path(judge).name}" if named else JUDGE
                settings.append(Setting(name, values, judge))
                continue
            values = tuple(_number(value) for value in part.split(":")) if numbers else ()
            setting = Setting(family, values)
            if family == ENSEMBLE:
                (weight,) = values
                if not 0 < weight < 1:
                    raise ValueError(f"the target's weight must lie between 0 and 1, got {weight}.")
            elif values:
                setting.rule({})
            settings.append(setting)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`rule` {text!r}: {error}") from error
    return settings


def _number(text: str) -> float:
    return int(text) if text.strip().isdecimal() else float(text)
