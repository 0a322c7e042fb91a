"""What a bench found, in tables, a plot and files.

In: the lines that decoding wrote, and their prompts. Out: a [`Grid`] with every measure, and from it Markdown, JSON, a
picture, and answers in the format of Spec-Bench.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..models.pair import LOOKUP
from ..scoring.meaning import reconvergence, says_no
from ..scoring.quality import repetition, similarity, task_score, unchanged
from ..utils.files import JsonlLog, atomic_write, read_json, write_text
from ..utils.names import public_name
from ..utils.text import in_markdown, in_plot
from .methods import COIN, JUDGE, PLAIN, Setting
from .runner import WITHOUT_RULE, accepted_share
from .tradeoff import BASE, Grid, compare_rules, falling, interval, separation


# Measures that retention is built on, the first that tells something in a category; chosen by what `separation` shows.
RETENTION = ("task", "same", "agreement")
# Of retention, and of the share of final numbers that are those of the lossless answers: where rules are compared.
RETENTION_LEVELS = (0.99, 0.97, 0.95, 0.9)
UNCHANGED_LEVELS = (0.95, 0.9, 0.8, 0.7)
# Names of a judge's thresholds, and the retention that each is chosen for.
OPERATING_POINTS = {"strict": 0.99, "balanced": 0.97, "fast": 0.9}
RELATIVE = ("unchanged", "same", "agreement", "similarity", "length")  # to the lossless answer


@dataclass
class Scorer:
    """
    Every measure of one answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the pair.
        folder (`Path`): Scores that cost a forward are kept there, in `views.jsonl`.
        allow_code (`bool`): Whether code of answers may be run.
        target ([`~transformers.PreTrainedModel`], *optional*): To be asked whether an answer says the same as the
            lossless one: the measure `same`.
        embeddings (`str`, *optional*): A sentence-transformers model for the measure `similarity`.
    """

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    allow_code: bool = False
    target: PreTrainedModel | None = None
    embeddings: str | None = None

    def __post_init__(self):
        self.views = JsonlLog(self.folder / "views.jsonl")
        self.known = {(line["measure"], line["texts"]): line["value"] for line in self.views}

    def scores(self, prompt: Prompt, line: dict, lossless: dict) -> dict[str, float | None]:
        """Of a line of the bench beside that of lossless decoding."""
        own, text = (self.tokenizer.decode(one["tokens"], skip_special_tokens=True) for one in (lossless, line))
        count = max(1, len(line["tokens"]))
        found = {
            "task": task_score(prompt, text, line["finished"], self.allow_code),
            "unchanged": unchanged(prompt, own, lossless["finished"], text, line["finished"]),
            "agreement": reconvergence(lossless["tokens"], line["tokens"]),
            "logprob": line["logprob"] / count,
            "repetition": repetition(line["tokens"]),
            "length": len(line["tokens"]) / max(1, len(lossless["tokens"])),
            "finished": float(line["finished"]),
        }
        if self.target is not None:
            no = self._view(
                "same",
                (self.target.config.name_or_path, prompt.text, own, text),
                lambda: 0.0 if text == own else says_no(self.target, self.tokenizer, prompt.text, own, text),
            )
            found["same"] = None if no is None else 1 - no
        if self.embeddings is not None:
            found["similarity"] = self._view(
                "similarity", (self.embeddings, own, text), lambda: similarity(self.embeddings, own, text)
            )
        return found

    def _view(self, measure: str, texts: Sequence[str], ask: Callable[[], float | None]) -> float | None:
        key = measure, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = ask()
            self.views.add({"measure": measure, "texts": key[1], "value": self.known[key]})
        return self.known[key]


def grid_of(lines: Sequence[dict], prompts: Sequence[Prompt], settings: Sequence[Setting], scorer: Scorer) -> Grid:
    """
    Every measure of every answer, with a progress bar.

    Args:
        lines (`Sequence[dict]`): Of `quality`, as [`decode`] returns them.
    """
    by = {(line["setting"], line["prompt"]): line for line in lines}
    shape = (len(settings), len(prompts))
    scores: dict[str, np.ndarray] = {}
    tokens, rounds = np.zeros(shape), np.full(shape, np.nan)
    for column, prompt in enumerate(track(prompts, "Measure")):
        for row, setting in enumerate(settings):
            line = by[setting.name, prompt.id]
            tokens[row, column], rounds[row, column] = len(line["tokens"]), len(line["lengths"]) or np.nan
            for name, value in scorer.scores(prompt, line, by[BASE, prompt.id]).items():
                if value is not None:
                    scores.setdefault(name, np.full(shape, np.nan))[row, column] = value
    names, families = [setting.name for setting in settings], [family_of(setting) for setting in settings]
    return Grid(names, families, np.array([prompt.category for prompt in prompts]), tokens, rounds, scores)


def family_of(setting: Setting) -> str:
    """The curve that a setting lies on."""
    return f"{setting.family} like {setting.like.family}" if setting.like is not None else setting.family


def summarise_quality(grid: Grid, lines: Sequence[dict]) -> dict:
    """
    All tables of `quality`.

    Returns:
        `dict` that JSON can hold: `settings` (a row for each), `categories`, `separation` of the measures, and
        `comparisons` of each judge with every other rule at equal retention, and as `comparisons_unchanged`, if
        prompts ask for numbers, at equal shares of unchanged ones, among prompts whose lossless answer has one; a
        setting's `numbers` are its share and its speed among these.
    """
    preference = [name for name in RETENTION if name in grid.scores]
    speed, retention = grid.speed(), grid.retention(preference)
    rate = grid.ratio(grid.tokens, grid.rounds)
    numbers = grid.known("unchanged") if "unchanged" in grid.scores else None
    if numbers is not None:
        same, speed_there = numbers.mean("unchanged"), numbers.speed()
    rows = []
    for i, name in enumerate(grid.settings):
        mine = [line for line in lines if line["setting"] == name]
        produced = sum(len(line["tokens"]) for line in mine)
        rounds = sum(len(line["lengths"]) for line in mine)
        ruled = grid.families[i] not in WITHOUT_RULE  # others do not tell what they accepted
        rows.append(
            {
                "setting": name,
                "family": grid.families[i],
                "tokens_per_round": interval(rate[:, i]),
                "tokens_per_round_without_bonus": (produced - rounds) / rounds if rounds else None,
                "speed": interval(speed[:, i]),
                "retention": interval(retention[:, i]),
                "judged_share": sum(line["judged"] for line in mine) / produced if ruled else None,
                "accepted_share": accepted_share(mine) if ruled else None,
                "target_forwards": rounds,
                "draft_forwards": sum(line["draft_forwards"] for line in mine),
                "tokens": produced,
                "unfinished": sum(not line["finished"] for line in mine),
                "measures": {
                    measure: interval(_mean_of_known(grid, values)[:, i]) for measure, values in grid.scores.items()
                },
                "numbers": None
                if numbers is None
                else {"unchanged": interval(same[:, i]), "speed": interval(speed_there[:, i])},
                "by_category": {
                    category: {
                        "speed": interval(grid.speed(category)[:, i]),
                        "retention": interval(grid.retention(preference, category)[:, i]),
                    }
                    for category in sorted(set(grid.categories))
                },
            }
        )
    judges = [name for name in dict.fromkeys(grid.families) if name.partition(":")[0] == JUDGE]
    others = [name for name in dict.fromkeys(grid.families) if name not in (*judges, *PLAIN)]
    compared = list(product(judges, others))
    return {
        "prompts": len(grid.categories),
        "categories": {
            category: {
                "prompts": int((grid.categories == category).sum()),
                "retention_by": grid.measure_of(category, preference),
            }
            for category in sorted(set(grid.categories))
        },
        "settings": rows,
        "separation": separation(grid, _middle_coin(grid)),
        "comparisons": [compare_rules(grid, retention, RETENTION_LEVELS, *two) for two in compared],
        "comparisons_unchanged": []
        if numbers is None
        else [compare_rules(numbers, same, UNCHANGED_LEVELS, *two) for two in compared],
    }


def _mean_of_known(grid: Grid, values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values).all(0)
    return grid.ratio(np.where(known, values, 0), np.broadcast_to(known, values.shape).astype(float))


def _middle_coin(grid: Grid) -> str | None:
    """The coin whose share is nearest to a half."""
    coins = [name for name in grid.settings if name.startswith(f"{COIN}=")]
    return min(coins, key=lambda name: abs(float(name.partition("=")[2].partition(":")[0]) - 0.5), default=None)


def operating_points(quality: dict, family: str) -> dict[str, dict]:
    """
    For each of `OPERATING_POINTS` the fastest of a judge's measured thresholds that keeps so much, if one does.

    Args:
        quality (`dict`): Of [`summarise_quality`], and in `thresholds` that of each setting of a judge.
        family (`str`): The judge's curve in it.

    Returns:
        `dict[str, dict]`: For each name `threshold`, `for_retention`, and what was measured there: `retention`,
        `speed`, `tokens_per_round` (each `[value, low, high]`) and `accepted_share`. As in [`compare_rules`], a faster
        threshold is taken to keep no more than a slower one.
    """
    rows = [row for row in quality["settings"] if row["family"] == family and row["retention"]]
    if not rows:
        return {}
    (base,) = (row for row in quality["settings"] if row["setting"] == BASE)
    retention, speed = (np.array([[row[key][0] for row in (base, *rows)]]) for key in ("retention", "speed"))
    kept = falling(retention, speed)[0, 1:]
    points = {}
    for name, level in OPERATING_POINTS.items():
        able = [row for row, share in zip(rows, kept, strict=True) if share > level - 1e-9]  # to rounding
        if able:
            best = max(able, key=lambda row: row["speed"][0])
            measured = {key: best[key] for key in ("retention", "speed", "tokens_per_round", "accepted_share")}
            threshold = quality["thresholds"][best["setting"]]
            points[name] = {"threshold": threshold, "for_retention": level, **measured}
    return points


def summarise_timing(lines: Sequence[dict], prompts: Sequence[Prompt], settings: Sequence[Setting]) -> dict:
    """
    All tables of `timing`: for each setting tokens a second, seconds an answer, and the ratio of seconds of greedy and
    of stock decoding to its own, over all prompts and for each category.
    """
    categories = np.array([prompt.category for prompt in prompts])
    seconds, tokens = {}, {}
    for setting in settings:
        mine = {prompt.id: [] for prompt in prompts}
        for line in lines:
            if line["setting"] == setting.name:
                mine[line["prompt"]].append(line)
        seconds[setting.name] = np.array([[np.mean([line["seconds"] for line in some]) for some in mine.values()]])
        tokens[setting.name] = np.array([[np.mean([len(line["tokens"]) for line in some]) for some in mine.values()]])
    grid = Grid([BASE], [BASE], categories, np.ones((1, len(prompts))), np.ones((1, len(prompts))))
    rows = []
    for name in seconds:
        row = {
            "setting": name,
            "tokens_per_second": interval(grid.ratio(tokens[name], seconds[name])[:, 0]),
            "seconds_per_answer": float(seconds[name].mean()),
            "tokens_per_answer": float(tokens[name].mean()),
        }
        for other in ("greedy", "stock", BASE):
            if other in seconds:
                row[f"speed_over_{other}"] = interval(grid.ratio(seconds[other], seconds[name])[:, 0])
                row[f"speed_over_{other}_by_category"] = {
                    category: interval(grid.ratio(seconds[other], seconds[name], category)[:, 0])
                    for category in sorted(set(categories))
                }
        rows.append(row)
    return {"prompts": len(prompts), "repeats": max(line["repeat"] for line in lines) + 1, "settings": rows}


def heading(path: Path, prompts: str, count: int) -> str:
    """
    What was measured, in a sentence.

    Args:
        path (`Path`): Of what [`decode`] wrote about its run: `quality.json` or `timing.json`.
        prompts (`str`): What to call the prompts.
        count (`int`): How many there were.
    """
    made = read_json(path)
    draft = LOOKUP if made["draft"] is None else f"{public_name(made['draft'])} ({made['draft_dtype']})"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"{public_name(made['target'])} ({made['dtype']}) with {draft}, {made['draft_length']} drafted tokens, "
        f"answers of at most {made['max_new_tokens']} tokens to {count} prompts of {prompts}; {made['machine']}; "
        f"{versions}; {time.strftime('%Y-%m-%d')}. In brackets: 95 % bootstrap intervals over prompts."
    )


def markdown(results: dict) -> str:
    """The tables of `quality` and `timing`, whichever there are, ready for a card."""
    parts = []
    if "quality" in results:
        found = results["quality"]
        rows, categories = found["settings"], found["categories"]
        parts.append(_table(
            ("decoding", "tokens/round", "× lossless", "retention", "judged", "accepted", "unfinished"),
            [
                (
                    row["setting"], _show(row["tokens_per_round"]), _show(row["speed"]), _show(row["retention"], 3),
                    _share(row["judged_share"], 1), _share(row["accepted_share"], 0), str(row["unfinished"]),
                )
                for row in rows
            ],
        ))  # fmt: skip
        kept = (f"{name} by {c['retention_by'] or 'nothing'} ({c['prompts']})" for name, c in categories.items())
        parts.append(in_markdown(f"Retention of {', '.join(kept)}, prompts in brackets."))
        parts.append(_table(
            ("× lossless / retention", *categories),
            [(row["setting"], *(_both(row["by_category"][name]) for name in categories)) for row in rows],
        ))  # fmt: skip
        parts.append(_table(
            ("mean of", *rows[0]["measures"]),
            [(row["setting"], *(_show(value, 3) for value in row["measures"].values())) for row in rows],
        ))  # fmt: skip
        for what, comparisons, levels in (
            ("retention", found["comparisons"], RETENTION_LEVELS),
            ("unchanged numbers", found["comparisons_unchanged"], UNCHANGED_LEVELS),
        ):
            if comparisons:
                parts.append(_table(
                    (
                        f"tokens a round (thresholds) at {what}", *(f"{level:.0%}" for level in levels),
                        f"area between, {min(levels):.0%} to 100%",
                    ),
                    [
                        (
                            " ÷ ".join(f"{row[key]} ({n})" for key, n in zip(
                                ("first", "second"), row["thresholds"], strict=True
                            )),
                            *(_show(row["speed_ratio"][str(level)]) for level in levels),
                            _show(row["area_between"], 3),
                        )
                        for row in comparisons
                    ],
                ))  # fmt: skip
        keys = [key for key in found["separation"][0] if key not in ("measure", "prompts")]
        parts.append(_table(
            ("measure", "prompts", *(f"lossless − {key}" for key in keys)),
            [
                (row["measure"] + ("*" if row["measure"] in RELATIVE else ""), str(row["prompts"]), *(
                    _show(row[key], 3) if isinstance(row[key], list | None) else f"{row[key]:.2f}" for key in keys
                ))
                for row in found["separation"]
            ],
        ))  # fmt: skip
        parts.append("\\* compared with the lossless answer itself, so that any other text falls behind it.")
    if "timing" in results:
        rows = results["timing"]["settings"]
        over = [key for key in ("greedy", "stock", BASE) if f"speed_over_{key}" in rows[0]]
        parts.append(_table(
            ("decoding", "tokens/s", "s/answer", "tokens/answer", *(f"seconds of {key} ÷ its own" for key in over)),
            [
                (
                    row["setting"], _show(row["tokens_per_second"]), f"{row['seconds_per_answer']:.1f}",
                    f"{row['tokens_per_answer']:.0f}", *(_show(row[f"speed_over_{key}"]) for key in over),
                )
                for row in rows
            ],
        ))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines)


def _show(value: list[float] | None, digits: int = 2) -> str:
    return "–" if value is None else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits).replace("-", "−")


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _both(category: dict) -> str:
    """Speed and retention in a category, without their intervals."""
    speed, retention = (category[key] for key in ("speed", "retention"))
    return f"{speed[0]:.2f} / {retention[0]:.3f}" if speed and retention else "–"


def plot(quality: dict, path: Path) -> None:
    """Speed against retention, and beside it against unchanged numbers if prompts ask for any, of
    [`summarise_quality`]: a line for each rule, with the intervals as crosses."""
    rows = [row for row in quality["settings"] if row["speed"] and row["retention"]]
    panels = {"retention (lossless = 1)": [(row["retention"], row["speed"]) for row in rows]}
    if rows[0]["numbers"]:
        numbers = [row["numbers"] for row in rows]
        panels["final numbers unchanged"] = [(there["unchanged"], there["speed"]) for there in numbers]
    figure = Figure(figsize=(8 * len(panels), 5.5))
    for axis, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for family in dict.fromkeys(row["family"] for row in rows if row["family"] not in PLAIN):
            mine = [point for row, point in zip(rows, points, strict=True) if row["family"] in (family, BASE)]
            x, y = np.array(sorted(mine, key=lambda point: point[1][0])).transpose(1, 0, 2)
            axis.errorbar(
                x[:, 0], y[:, 0], xerr=abs(x[:, 1:] - x[:, :1]).T, yerr=abs(y[:, 1:] - y[:, :1]).T,
                label=in_plot(family), marker="o", markersize=4, linewidth=2 if family.startswith(JUDGE) else 1,
                elinewidth=0.4,
            )  # fmt: skip
        axis.set_xlabel(name)
        axis.set_ylabel("tokens a round (lossless = 1)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    with atomic_write(path) as incomplete:
        figure.savefig(incomplete, dpi=150)


def write_spec_bench(lines: Sequence[dict], prompts: Sequence[Prompt], tokenizer, folder: Path) -> None:
    """
    Answers of `timing` in the format of Spec-Bench (https://github.com/hemingkx/Spec-Bench), a file for each setting;
    repeats are `choices` of one line. Only the first turn of a question is answered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    since = time.time()
    for setting in dict.fromkeys(line["setting"] for line in lines):
        rows = []
        for prompt in prompts:
            mine = [line for line in lines if (line["setting"], line["prompt"]) == (setting, prompt.id)]
            choices = [
                {
                    "index": line["repeat"],
                    "turns": [tokenizer.decode(line["tokens"], skip_special_tokens=True)],
                    "decoding_steps": [len(line["lengths"])],
                    "new_tokens": [len(line["tokens"])],
                    "wall_time": [line["seconds"]],
                    "accept_lengths": line["lengths"],
                }
                for line in mine
            ]
            row = {
                "question_id": int(prompt.id) if prompt.id.isdecimal() else prompt.id,
                "category": prompt.subcategory or prompt.category,
                "answer_id": hashlib.sha256(f"{setting} {prompt.id}".encode()).hexdigest()[:22],
                "model_id": setting,
                "choices": choices,
                "tstamp": since,
            }
            rows.append(json.dumps(row))
        write_text(folder / f"{setting.replace('/', '-').replace(' ', '-')}.jsonl", "\n".join(rows) + "\n")
