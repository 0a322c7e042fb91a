"""The figures of a bench as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..utils.files import atomic_write
from ..utils.text import in_plot
from .methods import FAMILIES
from .tradeoff import BASE


def plot_tradeoff(quality: dict, path: Path) -> None:
    """Speed against retention, and beside it against unchanged numbers if prompts ask for any, of
    [`summarise_quality`]: a line for each rule, with the intervals as crosses."""
    rows = [row for row in quality["settings"] if row["speed"] and row["retention"]]
    panels = {"retention (lossless = 1)": [(row["retention"], row["speed"]) for row in rows]}
    if rows[0]["numbers"]:
        numbers = [row["numbers"] for row in rows]
        panels["final numbers unchanged"] = [(row["unchanged"], row["speed"]) for row in numbers]
    judged = {row["family"]: row["rule"] == "judge" for row in rows if FAMILIES[row["rule"]].defaults}
    figure = Figure(figsize=(8 * len(panels), 5.5))
    for axis, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for family, is_judge in judged.items():
            on_curve = [point for row, point in zip(rows, points, strict=True) if row["family"] in (family, BASE)]
            x, y = np.array(sorted(on_curve, key=lambda point: point[1][0])).transpose(1, 0, 2)
            axis.errorbar(
                x[:, 0], y[:, 0], xerr=abs(x[:, 1:] - x[:, :1]).T, yerr=abs(y[:, 1:] - y[:, :1]).T,
                label=in_plot(family), marker="o", markersize=4, linewidth=2 if is_judge else 1, elinewidth=0.4,
            )  # fmt: skip
        axis.set_xlabel(name)
        axis.set_ylabel("tokens a round (lossless = 1)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    with atomic_write(path) as incomplete:
        figure.savefig(incomplete, dpi=150)
