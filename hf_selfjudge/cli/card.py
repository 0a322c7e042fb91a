"""`calibrate` and `card`: put what a bench measured into a judge and its card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bench.summary import RISKS, fastest_within, operating_points
from ..hub.results import add_results, family_in, read_quality
from ..judge.card import write_card
from ..judge.judge import Judge
from ..models.load import fingerprint
from ..scoring.statistics import Interval
from .console import say
from .options import JudgeFolder


BENCH = typer.Option(help="Folder of `hf-selfjudge bench` with this judge.")
RESULTS = typer.Option(help="File written by `quickstart --json`.")
RISK = typer.Option(help="Share of answers that may be changed, such as 0.05. May be repeated.", min=0.001, max=0.999)


def calibrate_command(
    folder: JudgeFolder, bench: Annotated[Path, BENCH], risk: Annotated[list[float] | None, RISK] = None
) -> None:
    """Choose thresholds by the share of answers that they change: the fastest that changes at most 5, 10 and 20 % of
    them, or the shares given by --risk. The most careful one becomes the judge's own."""
    judge = Judge.from_pretrained(folder)
    quality = read_quality(bench)
    family = family_in(quality, fingerprint(judge), bench)
    risks, count = sorted(risk or RISKS), (quality.get("changes") or {"answers": 0})["answers"]
    possible = [each for each in risks if fastest_within(quality, family, each) is not None]
    points = operating_points(quality, family, possible)
    if (risk or not points) and (too_low := [each for each in risks if each not in possible]):
        needed = math.ceil(1 / too_low[0]) - 1
        raise ValueError(
            f"`risk` {too_low[0]:g}: no threshold in {bench} changed so few of {count} answers that this can be "
            "promised. "
            + (f"At least {needed} answers are needed. " if count < needed else "Measure lower thresholds. ")
            + "Or allow a higher risk."
        )
    if not points:
        raise ValueError(f"`bench`: no threshold in {bench} was measured to be faster than lossless decoding.")
    calibration = {key: quality[key] for key in ("prompts", "categories", "heading", "changes")}
    judge.info = replace(
        judge.info,
        threshold=[*points.values()][0]["threshold"],
        operating_points=points,
        training=judge.info.training | {"calibration": calibration},
    )
    judge.save_pretrained(folder)
    write_card(folder, judge.info, fingerprint(judge))
    for name, point in points.items():
        speed, changed = Interval(*point["speed"]), Interval(*point["changed"])
        say(
            f"{name}: threshold {point['threshold']}, {speed:.2f} times the tokens a round of lossless decoding. It "
            f"changed the share {changed:.2f} of {count} answers."
        )
    named = [point["risk"] for point in points.values()]
    if unnamed := ", ".join(f"{each:g}" for each in risks if each not in named):
        say(f"No threshold is both careful enough for these risks and faster than a more careful one: {unnamed}.")


def card_command(
    folder: JudgeFolder,
    results: Annotated[Path | None, RESULTS] = None,
    bench: Annotated[list[Path] | None, BENCH] = None,
) -> None:
    """Write a judge's card again, with results of decoding. The results stay in the judge's folder. --bench may be
    repeated."""
    judge = Judge.from_pretrained(folder)
    if results or bench:
        add_results(folder, fingerprint(judge), results, bench or [])
    say(f"Card written to {write_card(folder, judge.info, fingerprint(judge))}")
