"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..utils.names import public_mining, public_name
from .features import SCALARS, STATES


PER_TOKEN = "/token"


@dataclass(frozen=True)
class JudgeInfo:
    """
    What a judge is and which models it belongs to; the content of `config.json`.

    Args:
        target (`str`): Hub id of the target; of one from a folder, its [`public_name`].
        target_fingerprint (`str`): Of its weights, see [`fingerprint`].
        hidden_size (`int`): Of the target.
        vocab_size (`int`): Of the target.
        draft (`str`): The same of the draft whose mismatches it was trained on.
        special_tokens (`list[int]`): Tokens that are never accepted against the target, nor overruled.
        components (`int`): Dimensions kept of each hidden state.
        threshold (`float` or `str`): See [`JudgeRule`]; no name.
        scalars (`list[str]`): Which of `SCALARS` it looks at.
        states (`list[str]`): Which of `STATES` it looks at.
        layer (`int`, *optional*): How many of the target's layers are below these states. `None`: all, and its last
            normalisation.
        operating_points (`dict[str, dict]`): Thresholds with a name, and what was measured at each.
        adapter (`bool`): Whether an adapter belongs to it: hidden states are then those of the target with it.
        training (`dict`): How it was made and what it measured: for the reader, not for the code.
    """

    target: str
    target_fingerprint: str
    hidden_size: int
    vocab_size: int
    draft: str
    special_tokens: list[int]
    components: int
    threshold: float | str
    scalars: list[str] = field(default_factory=lambda: list(SCALARS))
    states: list[str] = field(default_factory=lambda: list(STATES))
    layer: int | None = None
    operating_points: dict[str, dict] = field(default_factory=dict)
    adapter: bool = False
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        # A judge's files are made to be shared, and those of earlier versions hold paths.
        for name in ("target", "draft"):
            object.__setattr__(self, name, public_name(getattr(self, name), here=False))
        if "mining" in self.training:
            mining = [public_mining(made, here=False) for made in self.training["mining"]]
            object.__setattr__(self, "training", self.training | {"mining": mining})


def _check_info(info: JudgeInfo) -> None:
    """
    Raises:
        ValueError: If a value is of another type than it should be, or beyond what any judge has.
    """
    kinds = {
        **dict.fromkeys(("target", "target_fingerprint", "draft"), str),
        **dict.fromkeys(("hidden_size", "vocab_size", "components"), int),
        **dict.fromkeys(("special_tokens", "scalars", "states"), list),
        **{"threshold": (int, float, str), "adapter": bool, "operating_points": dict, "training": dict},
    }
    for name, kind in kinds.items():
        value = getattr(info, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is a {type(value).__name__}")
    for name, most in (("hidden_size", 2**17), ("vocab_size", 2**24), ("components", 2**12)):
        if not 0 <= getattr(info, name) <= most:
            raise ValueError(f"{name} is {getattr(info, name)}, not in [0, {most}]")
    for name, kind in (("special_tokens", int), ("scalars", str), ("states", str)):
        values = getattr(info, name)
        if not all(isinstance(value, kind) for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{name} is no list of different values of type {kind.__name__}")
    if info.layer is not None and (type(info.layer) is not int or not 0 < info.layer < 2**12):
        raise ValueError(f"layer is {info.layer!r}, no number of layers")
    if info.layer is not None and info.adapter:
        raise ValueError(f"it has an adapter, which is for the last states, and looks at layer {info.layer}")
    if not all(0 <= token < 2**31 for token in info.special_tokens):
        raise ValueError("special_tokens are not all tokens")
    for threshold in (info.threshold, *(point["threshold"] for point in _points(info))):
        limit_of(threshold)


def read_threshold(text: str | None) -> float | str | None:
    """A number, one for each token gained (`0.03/token`), the name of an operating point, or nothing."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


def limit_of(threshold: float | str) -> tuple[float, bool]:
    """
    A threshold as a number, and whether it is one for each token gained (`"0.03/token"`).

    Raises:
        ValueError: If it is no such text and no number, or not in [0, 1].
    """
    per_token = isinstance(threshold, str) and threshold.endswith(PER_TOKEN)
    try:
        limit = float(threshold.removesuffix(PER_TOKEN)) if per_token else threshold
    except ValueError:
        limit = None
    if not isinstance(limit, int | float) or not 0 <= limit <= 1:
        raise ValueError(
            "`threshold` must be in [0, 1] (0 is lossless, 1 accepts every candidate), or as text such a number for "
            f"each token gained ('0.03{PER_TOKEN}'), got {threshold!r}."
        )
    return limit, per_token


def _points(info: JudgeInfo) -> list[dict]:
    points = [*info.operating_points.values()]
    if not all(isinstance(point, dict) and "threshold" in point for point in points):
        raise ValueError("an operating point has no threshold")
    return points
