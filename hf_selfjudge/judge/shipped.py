"""The judges that come with the package, for the known pairs."""

from __future__ import annotations

import os
from pathlib import Path

from ..models.pair import DRAFT_MODEL, LOOKUP, PAIRS
from ..utils.files import shipped


HUB_CARDS = shipped("hub_cards")
# (pair, what drafts) -> folder in `hub_cards/` of the judge that is used unless another one is named.
SHIPPED = {
    ("qwen2.5-coder", DRAFT_MODEL): "qwen2.5-coder-1.5b-selfjudge",
    ("qwen2.5-coder", LOOKUP): "qwen2.5-coder-1.5b-lookup-selfjudge",
}
# Judges that have to be named.
OTHERS = ("qwen2.5-coder-1.5b-gsm8k-selfjudge",)  # of final numbers


def find_judge(reference: str | os.PathLike) -> str | os.PathLike:
    """The folder of a shipped judge, by the judge's name; any other reference, and a folder of that name, as it is."""
    is_name = str(reference) in (*SHIPPED.values(), *OTHERS) and not Path(reference).is_dir()
    return HUB_CARDS / reference if is_name else reference


def shipped_for(target: str, draft: str) -> Path | None:
    """The folder of the judge that is shipped for a target and a draft (or `LOOKUP`), by their names; `None` if there
    is none."""
    for (pair, drafts), name in SHIPPED.items():
        if (target, draft) == (PAIRS[pair][0], LOOKUP if drafts == LOOKUP else PAIRS[pair][1]):
            return HUB_CARDS / name
    return None


def shipped_judge(pair: str, drafts: str = DRAFT_MODEL) -> Path:
    """
    The folder of the judge that is shipped for a known pair.

    Args:
        pair (`str`): A name of [`PAIRS`].
        drafts (`str`, defaults to `DRAFT_MODEL`): `DRAFT_MODEL` for the pair's draft model, or `LOOKUP`.

    Raises:
        FileNotFoundError: If there is none.
    """
    if (pair, drafts) not in SHIPPED:
        raise FileNotFoundError(
            f"`pair`: no judge is shipped for {pair!r} with {drafts} (only for "
            f"{', '.join(f'{name!r} with {kind}' for name, kind in SHIPPED)}). Name one with `--judge`, or make one: "
            "`hf-selfjudge mine`, then `train`."
        )
    return HUB_CARDS / SHIPPED[pair, drafts]
