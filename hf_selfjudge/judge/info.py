"""What is known about a judge besides its weights: the content of its `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from ..utils.names import public_mining, public_name
from .features import SCALARS, STATES
from .threshold import Threshold


# Files of a judge; those of an adapter are named as PEFT does.
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# The type of each field, and for numbers and lists of numbers the largest value that any judge has.
TYPES = {
    **dict.fromkeys(("target", "target_fingerprint", "draft"), str),
    **dict.fromkeys(("hidden_size", "vocab_size", "components"), int),
    **dict.fromkeys(("special_tokens", "scalars", "states"), list),
    **dict.fromkeys(("operating_points", "training"), dict),
    "adapter": bool,
}
LARGEST = {"hidden_size": 2**17, "vocab_size": 2**24, "components": 2**12}


class TrainingRecord(TypedDict, total=False):
    """How a judge was trained and what was measured then. Absent parts did not happen."""

    mining: list[dict[str, Any]]  # one `mining.json` for each set of labels
    fit: dict[str, Any]  # options of the training, and the calibration's `slope` and `intercept`
    held_out: dict[str, Any]  # measurements on held-out prompts
    calibration: dict[str, Any]  # which bench the operating points come from


@dataclass(frozen=True)
class JudgeInfo:
    """
    What a judge is and which models it belongs to; the content of `config.json`. All of it is checked.

    Args:
        target (`str`): Hub id of the target. A folder is replaced by its [`public_name`].
        target_fingerprint (`str`): [`fingerprint`] of the target's weights.
        hidden_size (`int`): Size of the target's hidden states.
        vocab_size (`int`): Size of the target's vocabulary.
        draft (`str`): Hub id of the draft whose mismatches the judge was trained on, treated as `target`; or
            [`LOOKUP`].
        special_tokens (`list[int]`): Tokens that the judge neither accepts against the target nor overrules.
        components (`int`): Principal components kept of each hidden state.
        threshold ([`Threshold`], `float` or `str`): The judge's own threshold, used where none is given.
        scalars (`list[str]`): The scalar features that it uses, of `SCALARS`.
        states (`list[str]`): The hidden states that it uses, of `STATES`.
        layer (`int`, *optional*): The states are those that enter this layer of the target, counted from 0. `None`:
            the last hidden states.
        operating_points (`dict[str, dict]`): For each name a `threshold`, as `config.json` holds it, and what was
            measured there.
        adapter (`bool`): Whether a LoRA adapter belongs to the judge, which then sees the adapted target's states.
        training ([`TrainingRecord`]): For the card.

    Raises:
        ValueError: If a value has the wrong type, is larger than any judge's, or is unknown to this version.
    """

    target: str
    target_fingerprint: str
    hidden_size: int
    vocab_size: int
    draft: str
    special_tokens: list[int]
    components: int
    threshold: Threshold
    scalars: list[str] = field(default_factory=lambda: list(SCALARS))
    states: list[str] = field(default_factory=lambda: list(STATES))
    layer: int | None = None
    operating_points: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: bool = False
    training: TrainingRecord = field(default_factory=TrainingRecord)

    def __post_init__(self):
        self._check()
        object.__setattr__(self, "threshold", Threshold.parse(self.threshold))
        # Judges are shared, and their files must not tell the paths of the computer they were made on.
        for name in ("target", "draft"):
            object.__setattr__(self, name, public_name(getattr(self, name), here=False))
        if "mining" in self.training:
            mining = [public_mining(record, here=False) for record in self.training["mining"]]
            object.__setattr__(self, "training", self.training | {"mining": mining})

    @property
    def thresholds(self) -> dict[str, Threshold]:
        """The operating points' thresholds by name."""
        return {name: Threshold.parse(point["threshold"]) for name, point in self.operating_points.items()}

    def _check(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
        for name, largest in LARGEST.items():
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} is {getattr(self, name)}, not in [0, {largest}]")
        for name, known in (("scalars", SCALARS), ("states", STATES)):
            values = getattr(self, name)
            if unknown := [value for value in values if value not in known]:
                raise ValueError(
                    f"it uses the {name} {unknown}, this version of hf_selfjudge computes {list(known)}. Install the "
                    "version that the judge was made with, or train it again"
                )
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice")
        if not all(type(token) is int and 0 <= token < 2**31 for token in self.special_tokens):
            raise ValueError("special_tokens has values that are not tokens")
        if self.layer is not None and (type(self.layer) is not int or not 0 < self.layer < 2**12):
            raise ValueError(f"layer is {self.layer!r}, not the number of a layer")
        if self.layer is not None and self.adapter:
            raise ValueError(
                f"it has an adapter, which belongs to the last hidden states, and uses layer {self.layer}"
            )
        if not all(isinstance(point, dict) and "threshold" in point for point in self.operating_points.values()):
            raise ValueError("an operating point has no threshold")
        mining = self.training.get("mining", [])
        if not isinstance(mining, list) or not all(isinstance(record, dict) for record in mining):
            raise ValueError("training.mining is not a list of records")
        _ = self.thresholds  # parsed, so that a wrong one is found here

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"threshold": self.threshold.json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> JudgeInfo:
        """
        Read the content of `config.json`.

        Raises:
            ValueError: If it is not that of a judge of this version.
        """
        if unknown := content.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"this version of hf_selfjudge does not know {', '.join(sorted(unknown))}")
        try:
            return cls(**content)
        except (AttributeError, TypeError) as error:  # missing fields, or nested values of other types
            raise ValueError(str(error)) from error
