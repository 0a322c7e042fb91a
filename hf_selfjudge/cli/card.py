"""`calibrate` and `card`: put what a bench measured into a judge and its card."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bench.summary import RISKS, operating_points
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
    points = operating_points(quality, family, risk or RISKS)
    count, found = quality["changes"]["answers"], [point["risk"] for point in points.values()]
    missing = [each for each in sorted(risk or RISKS) if each not in found]
    if missing and (risk or not points):
        needed = math.ceil(1 / missing[-1]) - 1
        raise ValueError(
            f"`risk` {missing[-1]:g}: with {count} answers, no threshold in {bench} can be promised to change so few "
            "of them and is faster than the more careful ones. "
            + (f"At least {needed} answers are needed. " if count < needed else "")
            + "Measure more prompts or lower thresholds, or allow a higher risk."
        )
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
            f"{name}: threshold {point['threshold']}, {speed:.2f} times the tokens a round of lossless decoding; "
            f"changed {changed:.3f} of {count} answers."
        )
    if missing:
        shares = ", ".join(f"{each:.0%}" for each in missing)
        say(f"Without a threshold of their own, because none is careful or fast enough: {shares} of the answers.")


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
