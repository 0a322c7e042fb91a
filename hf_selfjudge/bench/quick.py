"""Speed beside quality: several ways of decoding the same prompts in one run.

In: models, drafts, prompts. Out: one [`Run`] for each prompt and decoding, their summary, and tables. The decodings
take turns prompt by prompt, since a shared machine is never equally fast for long.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, fitting, none_fits
from ..decoding.judged_model import JudgedModel
from ..decoding.stats import Stats
from ..forward.tap import ForwardTap
from ..models.tokens import context_of, decoding_greedily
from ..scoring.meaning import reconvergence
from ..utils.text import in_terminal, pieces


COLOURS = {"target": "default", "matched": "green", "judged": "bold yellow"}


@dataclass
class Run:
    """
    One answer.

    Args:
        decoding (`str`): Its name.
        prompt ([`Prompt`]): What was asked.
        tokens (`list[int]`): The answer.
        seconds (`float`): Wall time of `generate`.
        rounds (`int`): Forwards of the target.
        logprob (`float`): Sum of the tokens' log-probabilities under the target, nats.
        agreement (`float`): Share of the plain greedy answer's 4-grams that this answer has, in [0, 1].
        stats ([`Stats`]): Of a judged run; empty otherwise.
    """

    decoding: str
    prompt: Prompt
    tokens: list[int]
    seconds: float
    rounds: int
    logprob: float
    agreement: float
    stats: Stats


def compare(
    target: PreTrainedModel,
    decodings: dict[str, tuple[PreTrainedModel | JudgedModel, PreTrainedModel | None]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
) -> Iterator[list[Run]]:
    """
    Answer each prompt with every decoding, in an order that rotates from prompt to prompt. Prompts that are too long
    are left out ([`fitting`] tells which).

    Args:
        target ([`~transformers.PreTrainedModel`]): What all of them decode with.
        decodings (`dict[str, tuple]`): Name -> the target or a [`JudgedModel`] of it, and a draft if there is one. The
            first is the reference of `agreement`.

    Yields:
        `list[Run]` in the order of `decodings`, for one prompt at a time.

    Raises:
        TooLong: If none fits.
        ValueError: If a prompt cannot be encoded; names it.
    """
    context = context_of(target)
    prompts, rows, left_out = fitting(tokenizer, prompts, context, max_new_tokens)
    if not prompts:
        raise none_fits(len(left_out), context, max_new_tokens)
    rows = [ids.to(target.device) for ids in rows]
    names = list(decodings)
    for name in names:  # warm up, so that no decoding pays for first touches of the weights
        _answer(target, *decodings[name], rows[0], 8)
    for turn, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
        order = [names[(turn + i) % len(names)] for i in range(len(names))]
        answers = {name: _answer(target, *decodings[name], ids, max_new_tokens) for name in order}
        reference = answers[names[0]][0]
        logprobs: dict[tuple[int, ...], float] = {}  # lossless runs give the same text: score it once
        runs = []
        for name in names:
            tokens, seconds, rounds, stats = answers[name]
            if tuple(tokens) not in logprobs:
                logprobs[tuple(tokens)] = answer_logprob(target, ids, tokens)
            agreement = reconvergence(reference, tokens)
            runs.append(Run(name, prompt, tokens, seconds, rounds, logprobs[tuple(tokens)], agreement, stats))
        yield runs


def _answer(
    target: PreTrainedModel,
    model: PreTrainedModel | JudgedModel,
    draft: PreTrainedModel | None,
    ids: torch.LongTensor,
    max_new_tokens: int,
) -> tuple[list[int], float, int, Stats]:
    assistant = {} if draft is None else {"assistant_model": draft}
    greedily = decoding_greedily(target, max_new_tokens)
    model = model.on(greedily) if isinstance(model, JudgedModel) else greedily
    forwards: list[None] = []
    start = time.perf_counter()
    with ForwardTap(target, lambda hidden, logits: forwards.append(None)):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **assistant)
    seconds = time.perf_counter() - start
    stats = model.stats if isinstance(model, JudgedModel) else Stats()
    return output[0, ids.shape[1] :].tolist(), seconds, len(forwards), stats


@torch.no_grad()
def answer_logprob(target: PreTrainedModel, ids: torch.LongTensor, tokens: list[int]) -> float:
    """Log-probability of `tokens` behind the prompt `ids` of shape `(1, prompt_length)` under the target, nats."""
    answer = torch.tensor([tokens], device=ids.device)
    keep = len(tokens) + 1
    logits = target(torch.cat([ids, answer], dim=1), logits_to_keep=keep).logits[:, -keep:-1]
    return logits.float().log_softmax(-1).gather(-1, answer[..., None]).sum().item()


def summarise(runs: list[Run]) -> list[dict]:
    """One `dict` for each decoding: the figures of `quickstart --json`. Where the seconds went is known of judged
    decodings only."""
    rows = []
    for decoding in dict.fromkeys(run.decoding for run in runs):
        mine = [run for run in runs if run.decoding == decoding]
        tokens, seconds = sum(len(run.tokens) for run in mine), sum(run.seconds for run in mine)
        rows.append(
            {
                "decoding": decoding,
                "tokens_per_second": tokens / seconds,
                "seconds_per_answer": seconds / len(mine),
                "tokens_per_answer": tokens / len(mine),
                "tokens_per_round": tokens / sum(run.rounds for run in mine),
                "judged_share": sum(run.stats.judged for run in mine) / tokens,
                "agreement": sum(run.agreement for run in mine) / len(mine),
                "logprob_per_token": sum(run.logprob for run in mine) / tokens,
            }
        )
        if any(run.stats.rounds for run in mine):
            for part in ("draft", "verify", "rule"):
                rows[-1][f"{part}_share"] = sum(vars(run.stats)[f"{part}_seconds"] for run in mine) / seconds
    return rows


def ratio_of_seconds(runs: list[Run], slow: str, fast: str, resamples: int = 2000) -> tuple[float, float, float]:
    """
    How many times as long one decoding took as another, over all prompts.

    Returns:
        The ratio of the sums of seconds, and its 95 % bootstrap interval over prompts.
    """
    seconds = np.array([[run.seconds for run in runs if run.decoding == name] for name in (slow, fast)])
    picks = np.random.default_rng(0).integers(seconds.shape[1], size=(resamples, seconds.shape[1]))
    low, high = np.quantile(seconds[0][picks].sum(1) / seconds[1][picks].sum(1), [0.025, 0.975])
    return float(seconds[0].sum() / seconds[1].sum()), float(low), float(high)


def results_table(rows: list[dict], title: str) -> Table:
    """The summary as a table for the console."""
    table = Table(title=in_terminal(title, "table.title"))
    headings = (
        "decoding",
        "tokens/s",
        "s/answer",
        "tokens/answer",
        "tokens/round",
        "judged",
        "agreement",
        "logprob/token",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "decoding" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            in_terminal(row["decoding"]), f"{row['tokens_per_second']:.2f}", f"{row['seconds_per_answer']:.1f}",
            f"{row['tokens_per_answer']:.0f}", f"{row['tokens_per_round']:.2f}", f"{row['judged_share']:.1%}",
            f"{row['agreement']:.3f}", f"{row['logprob_per_token']:.3f}",
        )  # fmt: skip
    return table


def print_speed(console: Console, runs: list[Run], rows: list[dict]) -> None:
    """How much faster than stock, and where the time goes."""
    for row in rows:
        if "draft_share" in row:
            ratio, low, high = ratio_of_seconds(runs, "assisted", row["decoding"])
            told = (
                f"{row['decoding']}: {ratio:.2f} times as fast as assisted [{low:.2f}, {high:.2f}]; of its time "
                f"{row['draft_share']:.0%} drafting, {row['verify_share']:.0%} verifying, {row['rule_share']:.1%} in "
                "the rule."
            )
            console.print(in_terminal(told), soft_wrap=True)


def print_answer(console: Console, run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """A judged answer, each token coloured by who decided it."""
    runs = [(source, len(list(same))) for source, same in itertools.groupby(run.stats.sources)]
    ends = list(itertools.accumulate(count for _, count in runs))
    text = Text()
    for (source, _), piece in zip(runs, pieces(tokenizer, run.tokens, ends), strict=True):
        text.append(in_terminal(piece, COLOURS[source]))
    legend = Text("target's own choice  ")
    legend.append("draft, matched  ", style=COLOURS["matched"]).append("draft, judged", style=COLOURS["judged"])
    console.print(in_terminal(f"\n{run.prompt.text}", "dim"), text, legend, sep="\n")
