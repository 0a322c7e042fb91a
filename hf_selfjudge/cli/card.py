"""`calibrate` and `card`: put what a bench measured into a judge and its card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bench.summary import OPERATING_POINTS, operating_points
from ..hub.results import add_results, family_in, read_quality
from ..judge.card import write_card
from ..judge.judge import Judge
from ..models.load import fingerprint
from .console import say
from .options import JudgeFolder


OWN_RETENTION = 0.97  # of the threshold that a judge uses if none is given
BENCH = typer.Option(help="Folder of `hf-selfjudge bench` with this judge.")
RESULTS = typer.Option(help="File written by `quickstart --json`.")


def calibrate_command(folder: JudgeFolder, bench: Annotated[Path, BENCH]) -> None:
    """Name the fastest thresholds that keep 99, 97 and 90 % of the quality of lossless answers, where they differ in
    speed. The fastest that keeps 97 % becomes the judge's own."""
    judge = Judge.from_pretrained(folder)
    quality = read_quality(bench)
    points = operating_points(quality, family_in(quality, fingerprint(judge), bench))
    if not points:
        raise ValueError(f"`bench`: no threshold in {bench} keeps 90 % of the quality. Measure lower ones.")
    own = [point for point in points.values() if point["for_retention"] >= OWN_RETENTION] or [*points.values()]
    calibration = {key: quality[key] for key in ("prompts", "categories", "heading")}
    judge.info = replace(
        judge.info,
        threshold=own[-1]["threshold"],
        operating_points=points,
        training=judge.info.training | {"calibration": calibration},
    )
    judge.save_pretrained(folder)
    write_card(folder, judge.info, fingerprint(judge))
    for name, point in points.items():
        speed, retention = point["tokens_per_round"][0], point["retention"][0]
        say(f"{name}: threshold {point['threshold']}, {speed:.2f} tokens a round, retention {retention:.3f}")
    if missing := [name for name in OPERATING_POINTS if name not in points]:
        say(f"Without a threshold of their own, because none keeps enough or differs in speed: {', '.join(missing)}.")


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
