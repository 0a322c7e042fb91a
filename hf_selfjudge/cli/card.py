"""`calibrate` and `card`: what a bench measured becomes part of a judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..bench.summary import OPERATING_POINTS, operating_points
from ..hub.results import add_results, family_in, read_quality
from ..judge.card import write_card
from ..judge.judge import Judge
from ..models.load import fingerprint
from .console import say
from .options import JudgeFolder, option, reuse


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What the thresholds are chosen from."""

    bench: Path = option("Folder of `hf-selfjudge bench` with this judge.")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Results for a card."""

    results: Path | None = option("What `quickstart --json` wrote.", None)
    bench: list[Path] | None = reuse(CalibrateOptions, "bench", None)


def calibrate_command(folder: JudgeFolder, options: CalibrateOptions) -> None:
    """Name the fastest thresholds that keep 99, 97 and 90 % of the quality of a bench's lossless answers: strict,
    balanced and fast. Balanced becomes the judge's own."""
    judge = Judge.from_pretrained(folder)
    quality = read_quality(options.bench)
    points = operating_points(quality, family_in(quality, fingerprint(judge), options.bench))
    if not points:
        raise ValueError(f"`bench`: no threshold in {options.bench} keeps 90 % of the quality. Measure lower ones.")
    calibration = {name: quality[name] for name in ("prompts", "categories", "heading")}
    judge.info = replace(
        judge.info,
        threshold=points.get("balanced", points["fast"])["threshold"],
        operating_points=points,
        training=judge.info.training | {"calibration": calibration},
    )
    judge.save_pretrained(folder)
    write_card(folder, judge.info, fingerprint(judge))
    for name, point in points.items():
        say(
            f"{name}: threshold {point['threshold']}, {point['tokens_per_round'][0]:.2f} tokens a round, retention "
            f"{point['retention'][0]:.3f}"
        )
    if missing := [name for name in OPERATING_POINTS if name not in points]:
        say(f"No threshold keeps enough for {', '.join(missing)}.")


def card_command(folder: JudgeFolder, options: CardOptions) -> None:
    """Write a judge's card again, with results of decoding, which are kept beside it. --bench may be repeated."""
    judge = Judge.from_pretrained(folder)
    if options.results or options.bench:
        add_results(folder, fingerprint(judge), options.results, options.bench or [])
    say(f"Card written to {write_card(folder, judge.info, fingerprint(judge))}")
