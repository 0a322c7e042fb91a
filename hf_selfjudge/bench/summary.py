"""In: [`AnswerRecord`]s of a bench, their prompts and methods. Out: a [`Grid`] with every measure of every answer, and
summaries that JSON can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..data.prompts import Prompt
from ..judge.judge import Judge
from ..models.load import fingerprint
from ..scoring.asking import Asked
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.meaning import reconvergence, repetition, similarity
from ..scoring.statistics import Interval, risk_bound
from ..utils.files import JsonlLog
from ..utils.progress import tracked
from .answers import AnswerRecord, accepted_share
from .methods import FAMILIES, Method
from .tradeoff import BASE, Grid, compare_rules, paired_differences, separation


T = TypeVar("T")
# Retention of a category is measured by the first of these that applies. Ordered by what `separation` shows.
RETENTION = ("task", "same", "agreement")
# Shares of retention, and of unchanged final answers, at which rules are compared.
RETENTION_LEVELS = (0.99, 0.97, 0.95, 0.9)
UNCHANGED_LEVELS = (0.95, 0.9, 0.8, 0.7)
ROUND_LEVELS = (0.99, 0.98, 0.97, 0.95)  # the same of single rounds
# What says whether an answer still says what the lossless one says: the one of these that is known of more answers.
CHANGES = ("unchanged", "same")
# What is shown of each category, beside speed and retention.
IN_CATEGORY = ("unchanged", "task", "lost", "gained")
# Shares of changed answers for which [`operating_points`] looks for thresholds.
RISKS = (0.05, 0.1, 0.2)


@dataclass
class Scorer:
    """
    Every measure of one answer.

    Args:
        asked ([`Asked`]): The target, for prompts with questions and for the measure `same`.
        folder (`Path`): Where what costs a forward is kept, in `views.jsonl`.
        allow_code (`bool`): Whether code in answers may be run.
        ask (`bool`): For the measure `same`: whether to ask the target if an answer says the same as the lossless one.
        embeddings (`str`, *optional*): For the measure `similarity`: a sentence-transformers model.
    """

    asked: Asked
    folder: Path
    allow_code: bool = False
    ask: bool = False
    embeddings: str | None = None

    def __post_init__(self):
        self.views = JsonlLog(self.folder / "views.jsonl")
        self.known = {(row["measure"], row["texts"]): row["value"] for row in self.views}

    def scores(self, prompt: Prompt, record: AnswerRecord, lossless: AnswerRecord) -> dict[str, float | None]:
        """The measures of an answer, given the lossless one; `None` where a measure does not apply."""
        decode = self.asked.tokenizer.decode
        own, text = (decode(each.tokens, skip_special_tokens=True) for each in (lossless, record))
        answer, check = CheckedAnswer(text, record.finished), check_of(prompt, self.allow_code, self._replies)
        unchanged = check.unchanged(prompt, CheckedAnswer(own, lossless.finished), answer)
        scores = {
            "task": check.score(prompt, answer),
            "unchanged": None if unchanged is None else float(unchanged),
            "agreement": reconvergence(lossless.tokens, record.tokens),
            "logprob": record.logprob / max(1, len(record.tokens)),
            "repetition": repetition(record.tokens),
            "length": len(record.tokens) / max(1, len(lossless.tokens)),
            "finished": float(record.finished),
        }
        if self.ask:
            texts = prompt.text, own, text
            different = self._view("same", (self._target, *texts), lambda: self.asked.says_no(*texts))
            scores["same"] = None if different is None else 1 - different
        if self.embeddings is not None:
            compared = self.embeddings, own, text
            scores["similarity"] = self._view("similarity", compared, lambda: similarity(*compared))
        return scores

    @property
    def _target(self) -> str:
        return self.asked.model.config.name_or_path

    def _replies(self, text: str, questions: Sequence[str]) -> Sequence[str] | None:
        """Replies of the target ([`Asked`])."""
        return self._view("replies", (self._target, text, *questions), lambda: self.asked.replies(text, questions))

    def _view(self, measure: str, texts: Sequence[str], compute: Callable[[], T]) -> T:
        key = measure, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = compute()
            self.views.add({"measure": measure, "texts": key[1], "value": self.known[key]})
        return self.known[key]


def grid_of(
    records: Sequence[AnswerRecord], prompts: Sequence[Prompt], methods: Sequence[Method], scorer: Scorer
) -> Grid:
    """Every measure of every answer, with a progress bar. `records` are what [`decode`] returns in mode quality."""
    by_key = {(record.method, record.prompt): record for record in records}
    shape = (len(methods), len(prompts))
    scores: dict[str, np.ndarray] = {}
    tokens, rounds = np.zeros(shape), np.full(shape, np.nan)
    for column, prompt in enumerate(tracked(prompts, "Measure")):
        for row, method in enumerate(methods):
            record = by_key[method.name, prompt.id]
            tokens[row, column], rounds[row, column] = len(record.tokens), len(record.lengths) or np.nan
            for name, value in scorer.scores(prompt, record, by_key[BASE, prompt.id]).items():
                if value is not None:
                    scores.setdefault(name, np.full(shape, np.nan))[row, column] = value
    names, curves = [method.name for method in methods], [method.curve for method in methods]
    if "task" in scores:
        more = scores["task"] - scores["task"][names.index(BASE)]
        scores |= {"lost": np.clip(-more, 0, None), "gained": np.clip(more, 0, None)}
    return Grid(names, curves, np.array([prompt.category for prompt in prompts]), tokens, rounds, scores)


def summarise_quality(
    grid: Grid, records: Sequence[AnswerRecord], methods: Sequence[Method], judges: Mapping[str, Judge]
) -> dict:
    """
    Summarise a bench in mode quality: `settings` (a row for each method), `categories`, `separation` of the measures,
    `comparisons` of each judge with every other rule at equal retention, and `paired`, each setting of a judge with
    each of another rule ([`paired_differences`]). If prompts have final answers, `comparisons_unchanged` compares
    rules at equal shares of unchanged ones, among prompts whose lossless answer has one; `comparisons_by_category`
    does so in each of several categories; `final_answers` in a row are that share and the speed there. `changes` says
    of how many `answers`, and `by` which of `CHANGES`, it is known whether they say the same as the lossless ones; in
    a row it is the share `changed` of them, and the speed there. `judges` maps the curve of each judge that decoded
    with the draft length of the bench to its fingerprint.
    """
    preference = [name for name in RETENTION if name in grid.scores]
    rate, speed, retention = grid.ratio(grid.tokens, grid.rounds), grid.speed(), grid.retention(preference)
    means = {measure: grid.mean(measure) for measure in grid.scores}
    known = {name: grid.known(name) for name in CHANGES if name in grid.scores}
    by = max(known, key=lambda name: len(known[name].categories), default=None)
    ending, of_ending = known.get("unchanged"), {}
    if ending is not None and len(ending.categories):
        of_ending = {"unchanged": ending.mean("unchanged"), "speed": ending.speed()}
    if by is not None and (answers := len(known[by].categories)):
        changes = {"by": by, "answers": answers}
        of_changes = {
            "changed": 1 - known[by].mean(by),
            "speed": known[by].speed(),
            "tokens_per_round": known[by].ratio(known[by].tokens, known[by].rounds),
        }
    else:
        changes, of_changes = None, {}
    categories = sorted(set(grid.categories))
    in_category = {name: _in_category(grid, name, preference) for name in categories}
    rows = [
        {
            **_row(method, [record for record in records if record.method == method.name], judges),
            **_intervals({"tokens_per_round": rate, "speed": speed, "retention": retention}, i),
            "measures": _intervals(means, i),
            "final_answers": _intervals(of_ending, i) or None,
            "changes": _intervals(of_changes, i) or None,
            "by_category": {name: _intervals(samples, i) for name, samples in in_category.items()},
        }
        for i, method in enumerate(methods)
    ]
    curves = {method.curve: method for method in methods if FAMILIES[method.family].defaults}
    own = [curve for curve, method in curves.items() if method.judge is not None]
    compared = list(product(own, [curve for curve in curves if curve not in own]))
    coins = [method for method in methods if method.family == "coin" and method.like is None]
    middle = min(coins, key=lambda coin: abs(coin.arguments[0] - 0.5), default=None)  # accepts about a half
    controls = [middle] * (middle is not None) + [method for method in methods if method.family == "draft"]
    return {
        "prompts": len(grid.categories),
        "categories": {
            name: {"prompts": int(grid.among(name).sum()), "retention_by": grid.measure_of(name, preference)}
            for name in categories
        },
        "settings": rows,
        "changes": changes,
        "separation": separation(grid, [method.name for method in controls]),
        "comparisons": [compare_rules(grid, retention, RETENTION_LEVELS, *two) for two in compared],
        "comparisons_unchanged": [
            compare_rules(ending, of_ending["unchanged"], UNCHANGED_LEVELS, *two) for two in compared if of_ending
        ],
        "comparisons_by_category": _compared_in(ending if len(categories) > 1 and of_ending else None, compared),
        "paired": [
            paired_differences(grid, first.name, second.name)
            for first, second in product(methods, methods)
            if (first.curve, second.curve) in compared
        ],
        "judges": {
            curve: fingerprint(judges[method.judge]) for curve in own if (method := curves[curve]).length is None
        },
    }


def _in_category(grid: Grid, category: str, preference: Sequence[str]) -> dict[str, np.ndarray]:
    """Samples of what is shown of a category, each of shape `(1 + resamples, M)`."""
    samples = {"speed": grid.speed(category), "retention": grid.retention(preference, category)}
    return samples | {name: grid.mean(name, category) for name in IN_CATEGORY if name in grid.scores}


def _compared_in(ending: Grid | None, compared: Sequence[tuple[str, str]]) -> dict[str, list[dict]]:
    """[`compare_rules`] for pairs of curves at equal shares of unchanged answers, in each category of `ending`."""
    parts = {} if ending is None else {name: ending.within(name) for name in sorted(set(ending.categories))}
    return {
        name: [compare_rules(part, part.mean("unchanged"), UNCHANGED_LEVELS, *two) for two in compared]
        for name, part in parts.items()
    }


def summarise_replay(grid: Grid, methods: Sequence[Method]) -> dict:
    """Summarise rounds that were replayed ([`replay`]): for each of `methods`, and the oracle, tokens a round, those
    divided by lossless decoding's, and the share of rounds that leave the final answer unchanged, also in each
    category; and each judge compared with every other rule at equal shares."""
    samples = {
        "tokens_per_round": grid.ratio(grid.tokens, grid.rounds),
        "speed": grid.speed(),
        "unchanged": grid.ratio(grid.scores["unchanged"] * grid.rounds, grid.rounds),
    }
    own = [*dict.fromkeys(method.curve for method in methods if method.judge is not None)]
    others = [*dict.fromkeys(method.curve for method in methods if method.judge is None and method.arguments)]
    unchanged = {
        name: grid.ratio(grid.scores["unchanged"] * grid.rounds, grid.rounds, name) for name in set(grid.categories)
    }
    rows = [
        {
            "setting": name,
            **_intervals(samples, i),
            "by_category": {
                category: _intervals({"speed": grid.speed(category), "unchanged": unchanged[category]}, i)
                for category in sorted(unchanged)
            },
        }
        for i, name in enumerate(grid.methods)
    ]
    return {
        "prompts": len(grid.categories),
        "rounds": int(grid.rounds[0].sum()),
        "settings": rows,
        "comparisons_unchanged": [
            compare_rules(grid, samples["unchanged"], ROUND_LEVELS, *two) for two in product(own, others)
        ],
    }


def _intervals(samples: Mapping[str, np.ndarray], index: int) -> dict[str, Interval | None]:
    """The intervals of one method, from samples of shape `(1 + resamples, M)`."""
    return {name: Interval.of(values[:, index]) for name, values in samples.items()}


def _row(method: Method, records: Sequence[AnswerRecord], judges: Mapping[str, Judge]) -> dict:
    """What a method is, and sums over its answers."""
    tokens = sum(len(record.tokens) for record in records)
    ruled = FAMILIES[method.family].rule is not None  # without a rule it is not known which mismatches were accepted
    return {
        "setting": method.name,
        "family": method.curve,
        "rule": method.family,
        "judge": method.judge_curve,
        "threshold": None if method.judge is None else method.rule(judges).threshold.json(),
        "judged_share": sum(record.stats.judged for record in records) / tokens if ruled else None,
        "accepted_share": accepted_share(records) if ruled else None,
        "target_forwards": sum(len(record.lengths) for record in records),
        "draft_forwards": sum(record.draft_forwards for record in records),
        "unfinished": sum(not record.finished for record in records),
    }


def fastest_within(quality: dict, family: str, risk: float) -> dict | None:
    """
    The row of the fastest measured threshold of a judge that changes at most the share `risk` of the answers, by
    [`risk_bound`]; `None` if there is none. A threshold is taken to change no less than those that were slower.

    Args:
        quality (`dict`): From [`summarise_quality`].
        family (`str`): The judge's curve in it.

    Raises:
        ValueError: If it is not known of any answer whether it was changed.
    """
    if quality.get("changes") is None:  # files of earlier versions have none
        raise ValueError(
            "`bench`: no answer has a result that could be compared with that of the lossless one. Use prompts with a "
            "final answer, or ask the target: `hf-selfjudge bench --ask`."
        )
    rows = [row for row in quality["settings"] if row["family"] == family]
    rows.sort(key=lambda row: row["changes"]["speed"][0])
    answers = quality["changes"]["answers"]
    bounds = np.maximum.accumulate([risk_bound(row["changes"]["changed"][0], answers) for row in rows])
    # A bound that equals the risk may exceed it by rounding.
    able = [row for row, bound in zip(rows, bounds, strict=True) if bound <= risk + 1e-9]
    return able[-1] if able else None


def operating_points(quality: dict, family: str, risks: Sequence[float] = RISKS) -> dict[str, dict]:
    """
    Names for the thresholds that [`fastest_within`] finds for each of `risks`. A threshold only gets one if it is
    faster than the last one with a name, and than lossless decoding, each outside of the other's interval.

    Returns:
        `dict[str, dict]`: By name (`changes_5` for a risk of 0.05) `threshold`, `risk`, and what was measured there:
        `changed`, `speed`, `tokens_per_round` (each an [`Interval`]) and `accepted_share`.
    """
    points, before = {}, (1.0, 1.0, 1.0)  # the speed of lossless decoding
    for risk in sorted(risks):
        row = fastest_within(quality, family, risk)
        if row is not None and (speed := row["changes"]["speed"])[1] > before[0] and speed[0] > before[2]:
            name = f"changes_{100 * risk:g}".replace(".", "_")
            measured = {"risk": risk, **row["changes"], "accepted_share": row["accepted_share"]}
            points[name], before = {"threshold": row["threshold"], **measured}, speed
    return points


def summarise_timing(records: Sequence[AnswerRecord], prompts: Sequence[Prompt], methods: Sequence[Method]) -> dict:
    """Summarise a bench in mode timing: for each method tokens a second, seconds an answer, and the seconds of greedy,
    stock and lossless decoding divided by its own, also in each category."""
    repeats = max(record.repeat for record in records) + 1
    names, ids = [method.name for method in methods], [prompt.id for prompt in prompts]
    seconds, tokens = np.zeros((2, len(names), len(ids)))
    for record in records:
        place = names.index(record.method), ids.index(record.prompt)
        seconds[place] += record.seconds / repeats
        tokens[place] += len(record.tokens) / repeats
    grid = Grid(names, names, np.array([prompt.category for prompt in prompts]), tokens, seconds)

    def speeds(category: str | None = None) -> dict[str, np.ndarray]:
        references = {other: seconds[[names.index(other)]] for other in ("greedy", "stock", BASE) if other in names}
        return {
            f"speed_over_{other}": grid.ratio(np.broadcast_to(reference, seconds.shape), seconds, category)
            for other, reference in references.items()
        }

    samples = {"tokens_per_second": grid.ratio(tokens, seconds), **speeds()}
    in_category = {name: speeds(name) for name in sorted(set(grid.categories))}
    rows = [
        {
            "setting": name,
            "seconds_per_answer": float(seconds[i].mean()),
            "tokens_per_answer": float(tokens[i].mean()),
            **_intervals(samples, i),
            "by_category": {category: _intervals(ratios, i) for category, ratios in in_category.items()},
        }
        for i, name in enumerate(names)
    ]
    return {"prompts": len(prompts), "repeats": repeats, "settings": rows}
