"""In: a pair, a few prompts, a judge. Out: answers of greedy, stock assisted and judged decoding, one at a time in
turns, and their figures as numbers and for the terminal."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.console import Group
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, encode
from ..judge.judge import Judge
from ..judge.threshold import Threshold
from ..models.pair import Pair
from ..scoring.meaning import reconvergence
from ..scoring.statistics import Interval, draws
from ..utils.text import in_terminal, pieces
from .answers import AnswerRecord
from .methods import Method
from .runner import BenchConfig, decode


COLOURS = {"target": "default", "matched": "green", "judged": "bold yellow"}
# Columns of the table: heading, figure, format.
COLUMNS = (
    ("tokens/s", "tokens_per_second", ".2f"),
    ("s/answer", "seconds_per_answer", ".1f"),
    ("tokens/answer", "tokens_per_answer", ".0f"),
    ("tokens/round", "tokens_per_round", ".2f"),
    ("judged", "judged_share", ".1%"),
    ("agreement", "agreement", ".3f"),
    ("logprob/token", "logprob_per_token", ".3f"),
)


def run_quickstart(
    pair: Pair,
    prompts: Sequence[Prompt],
    judge: Judge,
    threshold: float | str | Threshold | None = None,
    draft_length: int | str = 5,
    max_new_tokens: int = 96,
    int8_draft: PreTrainedModel | None = None,
) -> list[AnswerRecord]:
    """
    Answer prompts with greedy, stock assisted and judged decoding, with a progress bar.

    Args:
        threshold (`float`, `str` or [`Threshold`], *optional*): Used instead of the judge's own.
        draft_length, max_new_tokens: See [`BenchConfig`].
        int8_draft ([`~transformers.PreTrainedModel`], *optional*): A second draft for judged decoding, with int8
            weights.

    Returns:
        `list[AnswerRecord]`: With the log-probability of each answer. `method` is `"greedy"`, `"assisted"`, `"judged"`
        or `"judged, int8 draft"`.

    Raises:
        TooLong, ValueError: See [`decode`].
    """
    judged = Method("judge", () if threshold is None else (threshold,), judge="judge")
    methods = {Method("greedy"): "greedy", Method("stock"): "assisted", judged: "judged"}
    drafts = {} if int8_draft is None else {"int8": int8_draft}
    if drafts:
        methods[replace(judged, draft="int8")] = "judged, int8 draft"
    config = BenchConfig("timing", max_new_tokens, draft_length)
    records = decode(pair, prompts, [*methods], {"judge": judge}, config, drafts=drafts)
    names, by_id = {method.name: name for method, name in methods.items()}, {prompt.id: prompt for prompt in prompts}

    @functools.cache  # decodings often give the same text
    def logprob(prompt_id: str, tokens: tuple[int, ...]) -> float:
        return answer_logprob(pair, by_id[prompt_id], tokens)

    for record in track(records, "Score"):
        record.method, record.logprob = names[record.method], logprob(record.prompt, tuple(record.tokens))
    return records


@torch.no_grad()
def answer_logprob(pair: Pair, prompt: Prompt, tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities of an answer's tokens under the target, nats."""
    ids = encode(pair.tokenizer, prompt.conversation, None, 0, prompt.tools)
    text = torch.cat([ids, torch.tensor([[*tokens]])], dim=1).to(pair.target.device)
    logits = pair.target(text, logits_to_keep=len(tokens) + 1).logits[0, -len(tokens) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, text[0, ids.shape[1] :, None]).sum().item()


def figures(records: Sequence[AnswerRecord]) -> dict:
    """The figures of [`run_quickstart`]: `runs`, a `dict` for each decoding, and `speed_against_assisted`, the seconds
    of assisted decoding divided by those of each decoding, as an [`Interval`] over prompts."""
    by_name: dict[str, list[AnswerRecord]] = {}
    for record in records:
        by_name.setdefault(record.method, []).append(record)
    seconds = {name: np.array([record.seconds for record in answers]) for name, answers in by_name.items()}
    weights = draws(np.zeros(len(seconds["assisted"])), 2000, 0)
    ratios = {name: Interval.of((weights @ seconds["assisted"]) / (weights @ own)) for name, own in seconds.items()}
    runs = []
    for name, answers in by_name.items():
        tokens, total = sum(len(record.tokens) for record in answers), seconds[name].sum()
        beside = zip(by_name["greedy"], answers, strict=True)
        agreement = [reconvergence(greedy.tokens, record.tokens) for greedy, record in beside]
        run = {
            "decoding": name,
            "tokens_per_second": tokens / total,
            "seconds_per_answer": total / len(answers),
            "tokens_per_answer": tokens / len(answers),
            "tokens_per_round": tokens / sum(len(record.lengths) for record in answers),
            "judged_share": sum(record.stats.judged for record in answers) / tokens,
            "agreement": sum(agreement) / len(answers),
            "logprob_per_token": sum(record.logprob for record in answers) / tokens,
        }
        if any(record.stats.rounds for record in answers):  # where its seconds went is known of judged decoding only
            for part in ("draft", "verify", "rule"):
                run[f"{part}_share"] = sum(getattr(r.stats, f"{part}_seconds") for r in answers) / total
        runs.append(run)
    return {"speed_against_assisted": ratios, "runs": runs}


def quickstart_table(results: dict, title: str) -> Table:
    """`runs` of [`figures`] as a table for the terminal."""
    table = Table(title=in_terminal(title, "table.title"))
    table.add_column("decoding", no_wrap=True)
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for run in results["runs"]:
        table.add_row(in_terminal(run["decoding"]), *(f"{run[key]:{spec}}" for _, key, spec in COLUMNS))
    return table


def speed_lines(results: dict) -> list[str]:
    """For each judged decoding of [`figures`], how fast it is compared with assisted decoding, and what takes its
    time."""
    return [
        f"{run['decoding']}: {results['speed_against_assisted'][run['decoding']]:.2f} times as fast as assisted; of "
        f"its time {run['draft_share']:.0%} drafting, {run['verify_share']:.0%} verifying, {run['rule_share']:.1%} in "
        "the rule."
        for run in results["runs"]
        if "draft_share" in run
    ]


def coloured_answer(record: AnswerRecord, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Group:
    """A prompt and a judged answer for the terminal; colours show who decided each token."""
    runs = [(source, len([*same])) for source, same in itertools.groupby(record.stats.sources)]
    ends = [*itertools.accumulate(count for _, count in runs)]
    answer = Text()
    for (source, _), piece in zip(runs, pieces(tokenizer, record.tokens, ends), strict=True):
        answer.append(in_terminal(piece, COLOURS[source]))
    legend = Text("target's own choice  ")
    legend.append("draft, matched  ", style=COLOURS["matched"]).append("draft, judged", style=COLOURS["judged"])
    return Group(in_terminal(f"\n{prompt.text}", "dim"), answer, legend)
