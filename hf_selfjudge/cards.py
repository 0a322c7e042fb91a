"""Judge + measurements -> `README.md`, the model card. Written by the tools, never by hand."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .files import write_text
from .judge import Judge


# In a wheel the cards lie inside the package, in a checkout beside it.
HUB_CARDS = next(
    folder / "hub_cards" for folder in Path(__file__).resolve().parents[:2] if (folder / "hub_cards").is_dir()
)
# Shipped judges: one folder each in `hub_cards/`, for the known pairs.
SHIPPED = {"qwen2.5-coder": "qwen2.5-coder-1.5b-selfjudge"}


def shipped_judge(pair: str) -> Path:
    """
    The folder of the judge that is shipped for a known pair.

    Raises:
        FileNotFoundError: If none is.
    """
    if pair not in SHIPPED:
        raise FileNotFoundError(
            f"`pair`: no judge is shipped for {pair!r} (only for {sorted(SHIPPED)}). Name one with `--judge`, or make "
            "one with `--train`."
        )
    return HUB_CARDS / SHIPPED[pair]


def write_card(judge: Judge, folder: str | os.PathLike, results: dict | None = None) -> Path:
    """
    Render `hub_cards/judge_card.md` beside the judge.

    Args:
        judge ([`Judge`]): Its `info.training` fills the card.
        folder (`str`): The judge's folder; its last part is the judge's name.
        results (`dict`, *optional*): What `hf-selfjudge quickstart --json` wrote.

    Raises:
        OSError: If the card cannot be written.
    """
    folder, info = Path(folder), judge.info
    data = ModelCardData(
        library_name="hf_selfjudge",
        license="apache-2.0",
        base_model=[info.target],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        tags=[
            "hf_selfjudge",
            "speculative-decoding",
            "judge-decoding",
            f"base_model:adapter:{info.target}",
            "arxiv:2510.02329",
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(HUB_CARDS / "judge_card.md"),
        name=folder.resolve().name,
        info=info,
        **info.training,
        label=info.training.get("fit", {}).get("options", {}).get("label", "changed"),
        results=results,
        quote=shlex.quote,
        interval=lambda value: "–" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value),
        shares=lambda value: "–" if value is None else " / ".join(f"{share:.3f}" for share in value.values()),
    )
    path = folder / "README.md"
    write_text(path, str(card))
    return path


def read_results(path: str | os.PathLike) -> dict:
    """
    Read what `quickstart --json` wrote.

    Raises:
        ValueError: If it is something else.
    """
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not {"pair", "prompts", "runs"} <= results.keys():
        raise ValueError(f"`results`: {path} is not a file of `hf-selfjudge quickstart --json`.")
    return results
