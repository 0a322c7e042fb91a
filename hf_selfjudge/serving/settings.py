"""What a server decodes with, and what a request may ask for. Knows nothing of vLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..bench.methods import parse_methods
from ..decoding.rules import JudgeRule, Lossless, Rule
from ..judge.judge import Judge
from ..judge.threshold import Threshold


KEY = "selfjudge"  # in vLLM's `additional_config`, and in the extra arguments of a request
LOSSLESS = Lossless()


@dataclass(frozen=True)
class ServingConfig:
    """
    Content of `selfjudge` in vLLM's `additional_config`. One of `judge` and `rule` is given.

    Args:
        judge (`str`, *optional*): Folder or Hub id of a judge.
        threshold (`float` or `str`, *optional*): See [`Threshold`]. By default the judge's own.
        rule (`str`, *optional*): A rule that needs no judge, as in the bench: `"margin=0.5"`.
        allow_other_weights (`bool`): Use the judge on a target with another name.

    Raises:
        ValueError: If it is something else.
    """

    judge: str | None = None
    threshold: float | str | None = None
    rule: str | None = None
    allow_other_weights: bool = False

    def __post_init__(self):
        texts = dict.fromkeys(("judge", "rule"), (str | None, "text"))
        for name, (kind, words) in (texts | {"allow_other_weights": (bool, "true or false")}).items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"`{KEY}`: {name} must be {words}, got {value!r}.")
        if (self.judge is None) == (self.rule is None):
            raise ValueError(f"`{KEY}` needs either a judge (its folder or Hub id) or a rule such as 'margin=0.5'.")
        if self.rule is not None and self.threshold is not None:
            raise ValueError(f"`{KEY}`: a threshold is for a judge. Write that of a rule after it: 'margin=0.5'.")

    @classmethod
    def read(cls, additional_config: object) -> ServingConfig:
        """Read vLLM's `additional_config`."""
        found = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        names = [field.name for field in fields(cls)]
        if not isinstance(found, Mapping) or not {*found} <= {*names}:
            raise ValueError(
                f"`--additional-config` must have {KEY!r} with keys among {', '.join(names)}: "
                f'\'{{"{KEY}": {{"judge": "FOLDER"}}}}\', got {additional_config!r}.'
            )
        return cls(**found)


class Rules:
    """
    The rules that a server has.

    Args:
        config ([`ServingConfig`]): What it was started with.

    Attributes:
        judge ([`Judge`], *optional*): The judge, if there is one.
        default ([`Rule`]): For requests that ask for nothing.

    Raises:
        ValueError: If the judge or the rule cannot be served.
        FileNotFoundError, HubError: If the judge cannot be loaded.
    """

    def __init__(self, config: ServingConfig):
        self.of = functools.lru_cache(maxsize=1024)(self._of)
        if config.judge is None:
            self.judge, self.default = None, _without_judge(config.rule)
            return
        self.judge = Judge.from_pretrained(config.judge)
        if self.judge.info.adapter:
            raise ValueError(
                f"`judge`: {config.judge} has a LoRA adapter, for which the target's last layers would have to run "
                "twice. Serve a judge without an adapter."
            )
        self.default = self._judged(config.threshold)

    @property
    def layer(self) -> int | None:
        """The layer whose input the judge reads; `None` for the target's last hidden states."""
        return None if self.judge is None else self.judge.info.layer

    def _judged(self, threshold: float | str | None) -> Rule:
        rule = JudgeRule(self.judge, threshold)
        return rule if rule.threshold.limit else LOSSLESS

    def _of(self, asked: float | str | None) -> Rule:
        """The rule of a request that asks for this threshold; `None` if it asks for nothing. A `ValueError` if the
        server has no such rule."""
        if asked is None:
            return self.default
        if self.judge is not None:
            return self._judged(asked)
        if Threshold.parse(asked).limit:
            raise ValueError(f"`{KEY}` can only be 0 (lossless): this server decodes with {self.default}.")
        return LOSSLESS


def _without_judge(text: str) -> Rule:
    *others, method = parse_methods([text])  # lossless decoding is among them
    rule = method.rule({}) if len(others) <= 1 and method.length is None else None
    if rule is None or rule.needs_draft_logits:
        raise ValueError(
            "`rule` must be a rule that needs neither a judge nor the draft's probabilities, with one threshold, such "
            f"as 'margin=0.5' or 'look-ahead=4:0.05', got {text!r}."
        )
    return rule


def asked_for(extra_args: Mapping | None) -> float | str | None:
    """
    The threshold that a request asks for in its extra arguments: 0 for lossless decoding, a number, or such as
    `"0.03/token"`; `None` if it asks for nothing.

    Raises:
        ValueError: If it is none of these.
    """
    asked = None if extra_args is None else extra_args.get(KEY)
    if asked is not None:
        try:
            Threshold.parse(asked)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{KEY}` in the request: {error}") from error
    return asked
