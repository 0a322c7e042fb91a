"""In: what `hf-selfjudge bench` and `quickstart` measured with a judge. Out: `results.json` in the judge's folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..judge.card import RESULTS, read_results
from ..utils.files import json_object, read_json, read_text, write_json
from ..utils.names import public_name, public_text


# What a card shows of each setting of a bench.
SHOWN = (
    *("setting", "family", "tokens_per_round", "speed", "retention", "judged_share", "accepted_share", "unfinished"),
    *("final_answers", "by_category"),
)


def add_results(
    folder: str | os.PathLike,
    weights: str,
    quickstart: str | os.PathLike | None = None,
    benches: Sequence[str | os.PathLike] = (),
) -> None:
    """
    Add results to a judge's `results.json`, and the curves of benches to its folder.

    Args:
        weights (`str`): [`fingerprint`] of the judge.
        quickstart (`str`, *optional*): A file of `hf-selfjudge quickstart --json`.
        benches (`Sequence[str]`): Folders of `hf-selfjudge bench`. The results get the names of the folders.

    Raises:
        ValueError: If `quickstart` is another kind of file, or a bench has no results of this judge.
    """
    folder = Path(folder)
    results = read_results(folder, weights) | {"weights": weights}
    if quickstart is not None:
        figures = read_json(quickstart)
        if not {"pair", "prompts", "runs", "judged_against_lossless"} <= figures.keys():
            raise ValueError(
                f"`results`: {quickstart} is not a file of `hf-selfjudge quickstart --json`, or is one of an earlier "
                "version. Run the quickstart again."
            )
        names = [public_name(name.strip()) for name in figures["pair"].split(",")]
        results["quickstart"] = figures | {"pair": ",".join(names)}
    for bench in map(Path, benches):
        name = re.sub(r"[^\w-]", "-", bench.resolve().name)
        results.setdefault("bench", {})[name] = _bench_results(bench, weights)
        shutil.copyfile(bench / "curve.png", folder / f"curve-{name}.png")
    write_json(folder / RESULTS, results)


def _bench_results(bench: Path, weights: str) -> dict[str, Any]:
    """What a card shows of a bench: everything except other judges and the coins that accept as often as those."""
    quality = read_quality(bench)
    family = family_in(quality, weights, bench)
    shown = {row["family"] for row in quality["settings"] if row["judge"] in (None, family)}
    results = {key: quality[key] for key in ("heading", "prompts", "categories", "dataset")} | {"family": family}
    results["settings"] = [
        {key: row[key] for key in SHOWN} | {"task": row["measures"].get("task")}
        for row in quality["settings"]
        if row["family"] in shown
    ]

    def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if row["first"] == family and row["second"] in shown]

    results |= {key: compared(quality[key]) for key in ("comparisons", "comparisons_unchanged")}
    by_category = quality["comparisons_by_category"]
    return results | {"comparisons_by_category": {name: compared(rows) for name, rows in by_category.items()}}


def read_quality(bench: str | os.PathLike) -> dict[str, Any]:
    """
    The results of a bench in mode quality, from its folder.

    Raises:
        FileNotFoundError: If it has none.
    """
    path = Path(bench) / "quality-results.json"
    if not path.is_file():
        raise FileNotFoundError(f"`bench`: {bench} has no quality-results.json. Make it with `hf-selfjudge bench`.")
    return json_object(public_file(path), str(path))["quality"]


def family_in(quality: dict[str, Any], weights: str, bench: str | os.PathLike) -> str:
    """
    The name of a judge's curve in the results of a bench. `weights` is the judge's [`fingerprint`].

    Raises:
        ValueError: If the bench has no results of this judge.
    """
    for family, judge_weights in quality.get("judges", {}).items():  # none in files of earlier versions
        if judge_weights == weights:
            return family
    raise ValueError(f"`bench`: {bench} has no results of this judge. Run `hf-selfjudge bench --rule judge:FOLDER=…`.")


def public_file(path: Path) -> str:
    """The content of a bench's file, with the paths of its models replaced by their [`public_name`]s."""
    runs = [read_json(file) for mode in ("quality", "timing") if (file := path.with_name(f"{mode}.json")).is_file()]
    return public_text(read_text(path), [run[name] for run in runs for name in ("target", "draft")])
