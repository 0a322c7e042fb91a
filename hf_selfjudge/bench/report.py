"""What a bench writes: results and tables, the picture, and answers in the format of Spec-Bench."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..models.pair import LOOKUP
from ..scoring.statistics import shown
from ..utils.files import atomic_write, read_json, write_json, write_text
from ..utils.names import public_name
from ..utils.text import in_markdown, in_plot
from .answers import AnswerRecord
from .methods import FAMILIES
from .summary import RETENTION_LEVELS, ROUND_LEVELS, UNCHANGED_LEVELS
from .tradeoff import BASE


# Measures against the lossless answer.
RELATIVE = ("unchanged", "lost", "gained", "same", "agreement", "similarity", "length")
NEAR = 1.1  # ratio of speeds, up to which two settings are shown beside each other


def write_results(folder: Path, mode: str, results: dict, prompts_name: str, left_out: Sequence[str] = ()) -> str:
    """Write `results` of [`summarise_quality`] or [`summarise_timing`] to `MODE-results.json` and `MODE-results.md` in
    `folder`. `left_out` are the ids of prompts that were too long. Returns the text of the second file: what was
    measured, in a sentence, and the tables."""
    prompts_name += f" ({len(left_out)} more were too long)" if left_out else ""
    results |= {"heading": heading(folder / f"{mode}.json", prompts_name, results["prompts"]), "left_out": [*left_out]}
    tables = quality_tables(results) if mode == "quality" else timing_tables(results)
    text = f"{in_markdown(results['heading'])}\n\n{tables}"
    write_json(folder / f"{mode}-results.json", {mode: results})
    write_text(folder / f"{mode}-results.md", text)
    return text


def heading(path: Path, prompts_name: str, count: int) -> str:
    """A sentence that says what was measured. `path` is `quality.json` or `timing.json` of [`decode`], `count` the
    number of prompts."""
    run = read_json(path)
    draft = LOOKUP if run["draft"] is None else f"{public_name(run['draft'])} ({run['draft_dtype']})"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{public_name(run['target'])} ({run['target_dtype']}) with {draft}, {run['draft_length']} drafted tokens, "
        f"answers of at most {run['max_new_tokens']} tokens to {count} prompts of {prompts_name}; {run['machine']}; "
        f"{versions}; {time.strftime('%Y-%m-%d')}. In brackets: 95 % bootstrap intervals over prompts."
    )


def quality_tables(quality: dict) -> str:
    """The tables of [`summarise_quality`]."""
    rows, categories = quality["settings"], quality["categories"]
    kept_by = (f"{name} by {c['retention_by'] or 'nothing'} ({c['prompts']})" for name, c in categories.items())
    gaps = [key for key in quality["separation"][0] if key not in ("measure", "prompts")]
    main = {
        "decoding": "", "tokens/round": ".2f", "× lossless": ".2f", "retention": ".3f", "judged": ".1%",
        "accepted": ".0%", "unfinished": "",
    }  # fmt: skip
    keys = ("setting", "tokens_per_round", "speed", "retention", "judged_share", "accepted_share", "unfinished")
    measures = {"mean of": ""} | dict.fromkeys(rows[0]["measures"], ".3f")
    separation = {"measure": "", "prompts": ""}
    separation |= {f"lossless − {key}": ".2f" if key.endswith("standardised") else ".3f" for key in gaps}
    parts = [
        _table(main, [[row[key] for key in keys] for row in rows]),
        in_markdown(f"Retention of {', '.join(kept_by)}, prompts in brackets."),
        *_in_categories(rows),
        _table(measures, [(row["setting"], *row["measures"].values()) for row in rows]),
        *_comparisons("retention", quality["comparisons"], RETENTION_LEVELS),
        *_comparisons("unchanged final answers", quality["comparisons_unchanged"], UNCHANGED_LEVELS),
        *(
            table
            for name, of_category in quality["comparisons_by_category"].items()
            for table in _comparisons(f"unchanged final answers, {name}", of_category, UNCHANGED_LEVELS)
        ),
        *_paired(quality["paired"]),
        _table(
            separation,
            [
                (row["measure"] + "*" * (row["measure"] in RELATIVE), row["prompts"], *(row[key] for key in gaps))
                for row in quality["separation"]
            ],
        ),
        "\\* compared with the lossless answer itself, which any other text differs from.",
    ]
    return "\n\n".join(parts) + "\n"


def timing_tables(timing: dict) -> str:
    """The tables of [`summarise_timing`]: over all prompts and, for each reference, by category."""
    rows = timing["settings"]
    categories = [*rows[0]["by_category"]]
    columns = {"decoding": "", "tokens/s": ".2f", "s/answer": ".1f", "tokens/answer": ".0f"}
    keys = ["setting", "tokens_per_second", "seconds_per_answer", "tokens_per_answer"]
    ratios = {
        key: f"seconds of {key.removeprefix('speed_over_')} ÷ its own"
        for key in rows[0]
        if key.startswith("speed_over_")
    }
    over_all = [[row[key] for key in (*keys, *ratios)] for row in rows]
    parts = [_table(columns | dict.fromkeys(ratios.values(), ".2f"), over_all)]
    for key, title in ratios.items() if len(categories) > 1 else ():
        cells = [[row["setting"], *(row["by_category"][name][key] for name in categories)] for row in rows]
        parts.append(_table({title: ""} | dict.fromkeys(categories, ".2f"), cells))
    return "\n\n".join(parts) + "\n"


def replay_tables(results: dict) -> str:
    """The tables of [`summarise_replay`]."""
    rows, categories = results["settings"], [*results["settings"][0]["by_category"]]
    columns = {"rule": "", "tokens/round": ".2f", "× lossless": ".2f", "rounds unchanged": ".3f"}
    keys = ("setting", "tokens_per_round", "speed", "unchanged")
    parts = [_table(columns, [[row[key] for key in keys] for row in rows])]
    if len(categories) > 1:
        cells = [(row["setting"], *map(_values, row["by_category"].values())) for row in rows]
        parts.append(_table({"× lossless / rounds unchanged": ""} | dict.fromkeys(categories, ""), cells))
    parts += _comparisons("unchanged rounds", results["comparisons_unchanged"], ROUND_LEVELS)
    return "\n\n".join(parts) + "\n"


def _in_categories(rows: Sequence[dict]) -> list[str]:
    """A table for each category, if there are several."""
    categories = rows[0]["by_category"]
    tables = []
    for name, measures in categories.items() if len(categories) > 1 else ():
        columns = {name: ""} | {"× lossless" if key == "speed" else key: ".2f" for key in measures}
        tables.append(_table(columns, [(row["setting"], *row["by_category"][name].values()) for row in rows]))
    return tables


def _comparisons(measure: str, comparisons: Sequence[dict], levels: Sequence[float]) -> list[str]:
    """A table of pairs of rules at equal shares of a measure; empty if there are no pairs."""
    columns = {f"tokens a round (thresholds) at {measure}": ""} | {f"{level:.0%}": ".2f" for level in levels}
    columns[f"area between, {min(levels):.0%} to 100%"] = ".3f"
    rows = [
        (
            "{first} ({0}) ÷ {second} ({1})".format(*row["thresholds"], **row),
            *row["speed_ratio"].values(),
            row["area_between"],
        )
        for row in comparisons
    ]
    return [_table(columns, rows)] if rows else []


def _paired(rows: Sequence[dict]) -> list[str]:
    """A table of [`paired_differences`] of settings that are about equally fast; empty if there are none."""
    measures = [name for name in ("unchanged", "task") if rows and name in rows[0]]
    columns = {"prompt by prompt": "", "tokens a round, ratio": ".2f"} | {
        f"{name}, difference": ".3f" for name in measures
    }
    near = [row for row in rows if row["speed"] and 1 / NEAR <= row["speed"][0] <= NEAR]
    cells = [(f"{row['first']} and {row['second']}", row["speed"], *(row[name] for name in measures)) for row in near]
    return [_table(columns, cells)] if measures and cells else []


def _table(columns: dict[str, str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown. `columns` maps each heading to the format of its numbers; `rows` hold text, numbers,
    intervals, and `None` for a dash."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(*each) for each in zip(row, columns.values(), strict=True)] for row in rows]
    return "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines)


def _values(category: dict) -> str:
    """Speed in a category, and the other figure beside it, without their intervals."""
    speed, other = category.values()
    return f"{speed[0]:.2f} / {other[0]:.3f}" if speed and other else "–"


def plot_tradeoff(quality: dict, path: Path) -> None:
    """Draw speed against retention and, if prompts have final answers, against unchanged ones, also in each of several
    categories, from [`summarise_quality`]: a line for each rule, with the intervals as crosses."""
    rows = [row for row in quality["settings"] if row["speed"] and row["retention"]]
    panels = {"retention (lossless = 1)": [(row["retention"], row["speed"]) for row in rows]}
    if rows[0]["final_answers"]:
        panels["final answers unchanged"] = [
            (row["final_answers"]["unchanged"], row["final_answers"]["speed"]) for row in rows
        ]
    ending = [name for name, measures in rows[0]["by_category"].items() if measures.get("unchanged")]
    for name in ending if len(ending) > 1 else ():
        in_category = [row["by_category"][name] for row in rows]
        panels[f"unchanged, {in_plot(name)}"] = [(each["unchanged"], each["speed"]) for each in in_category]
    judged = {row["family"]: row["rule"] == "judge" for row in rows if FAMILIES[row["rule"]].defaults}
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, 5.5 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (name, points) in zip(axes, panels.items(), strict=False):
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


def write_spec_bench(
    records: Sequence[AnswerRecord], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the answers of mode timing in the format of Spec-Bench (https://github.com/hemingkx/Spec-Bench), one file
    for each method. Repeats are `choices` of one line. Only the first turn of a question is answered."""
    folder.mkdir(parents=True, exist_ok=True)
    timestamp = time.time()
    for method in dict.fromkeys(record.method for record in records):
        lines = []
        for prompt in prompts:
            row = {
                "question_id": int(prompt.id) if prompt.id.isdecimal() else prompt.id,
                "category": prompt.subcategory or prompt.category,
                "answer_id": hashlib.sha256(f"{method} {prompt.id}".encode()).hexdigest()[:22],
                "model_id": method,
                "choices": [
                    {
                        "index": record.repeat,
                        "turns": [tokenizer.decode(record.tokens, skip_special_tokens=True)],
                        "decoding_steps": [len(record.lengths)],
                        "new_tokens": [len(record.tokens)],
                        "wall_time": [record.seconds],
                        "accept_lengths": record.lengths,
                    }
                    for record in records
                    if (record.method, record.prompt) == (method, prompt.id)
                ],
                "tstamp": timestamp,
            }
            lines.append(json.dumps(row) + "\n")
        write_text(folder / f"{method.replace('/', '-').replace(' ', '-')}.jsonl", "".join(lines))
