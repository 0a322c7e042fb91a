"""In: what `summary.py` makes. Out: tables in Markdown, ready for a card."""

from __future__ import annotations

from collections.abc import Sequence

from ..scoring.statistics import shown
from ..utils.text import in_markdown
from .summary import RETENTION_LEVELS, UNCHANGED_LEVELS
from .tradeoff import BASE


RELATIVE = ("unchanged", "same", "agreement", "similarity", "length")  # measures against the lossless answer


def quality_tables(quality: dict) -> str:
    """The tables of [`summarise_quality`]."""
    rows, categories = quality["settings"], quality["categories"]
    kept_by = (f"{name} by {c['retention_by'] or 'nothing'} ({c['prompts']})" for name, c in categories.items())
    gaps = [key for key in quality["separation"][0] if key not in ("measure", "prompts")]
    parts = [
        _table(
            ("decoding", "tokens/round", "× lossless", "retention", "judged", "accepted", "unfinished"),
            [
                (
                    row["setting"], shown(row["tokens_per_round"]), shown(row["speed"]),
                    shown(row["retention"], ".3f"), _share(row["judged_share"], 1),
                    _share(row["accepted_share"], 0), str(row["unfinished"]),
                )
                for row in rows
            ],
        ),
        in_markdown(f"Retention of {', '.join(kept_by)}, prompts in brackets."),
        _table(
            ("× lossless / retention", *categories),
            [(row["setting"], *(_values(row["by_category"][name]) for name in categories)) for row in rows],
        ),
        _table(
            ("mean of", *rows[0]["measures"]),
            [(row["setting"], *(shown(mean, ".3f") for mean in row["measures"].values())) for row in rows],
        ),
        *_comparisons("retention", quality["comparisons"], RETENTION_LEVELS),
        *_comparisons("unchanged numbers", quality["comparisons_unchanged"], UNCHANGED_LEVELS),
        _table(
            ("measure", "prompts", *(f"lossless − {key}" for key in gaps)),
            [
                (
                    row["measure"] + "*" * (row["measure"] in RELATIVE), str(row["prompts"]),
                    *(f"{row[key]:.2f}" if isinstance(row[key], float) else shown(row[key], ".3f") for key in gaps),
                )
                for row in quality["separation"]
            ],
        ),
        "\\* compared with the lossless answer itself, so that any other text falls behind it.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def timing_tables(timing: dict) -> str:
    """The table of [`summarise_timing`]."""
    rows = timing["settings"]
    over = [key for key in ("greedy", "stock", BASE) if f"speed_over_{key}" in rows[0]]
    head = ("decoding", "tokens/s", "s/answer", "tokens/answer", *(f"seconds of {key} ÷ its own" for key in over))
    cells = [
        (
            row["setting"], shown(row["tokens_per_second"]), f"{row['seconds_per_answer']:.1f}",
            f"{row['tokens_per_answer']:.0f}", *(shown(row[f"speed_over_{key}"]) for key in over),
        )
        for row in rows
    ]  # fmt: skip
    return _table(head, cells) + "\n"


def _comparisons(measure: str, comparisons: Sequence[dict], levels: Sequence[float]) -> list[str]:
    """Pairs of rules where they keep the same of a measure; nothing where there are none."""
    head = (f"tokens a round (thresholds) at {measure}", *(f"{level:.0%}" for level in levels))
    rows = [
        (
            "{first} ({0}) ÷ {second} ({1})".format(*row["thresholds"], **row),
            *(shown(row["speed_ratio"][str(level)]) for level in levels),
            shown(row["area_between"], ".3f"),
        )
        for row in comparisons
    ]
    return [_table((*head, f"area between, {min(levels):.0%} to 100%"), rows)] if rows else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines)


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _values(category: dict) -> str:
    """Speed and retention in a category, without their intervals."""
    speed, retention = category["speed"], category["retention"]
    return f"{speed[0]:.2f} / {retention[0]:.3f}" if speed and retention else "–"
