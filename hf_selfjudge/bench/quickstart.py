"""In: a pair, a few prompts, a judge. Out: what forwards cost here; answers of four ways of decoding, one at a time
in turns; and their figures as numbers and for the terminal."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, encode
from ..judge.judge import Judge
from ..judge.threshold import Threshold
from ..models.pair import Pair
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.meaning import reconvergence
from ..scoring.statistics import Interval, draws, shown
from ..utils.progress import tracked
from ..utils.text import in_terminal, pieces
from .answers import AnswerRecord
from .methods import Method
from .runner import BenchConfig, decode


COLOURS = {"target": "default", "matched": "green", "judged": "bold yellow"}
# Columns of the table: heading, figure, format.
COLUMNS = (
    ("tokens/s", "tokens_per_second", ".2f"),
    ("× greedy", "speed_against_greedy", ".2f"),
    ("tokens/round", "tokens_per_round", ".2f"),
    ("judged", "judged_share", ".1%"),
    ("agreement", "agreement", ".2f"),
    ("same final answer", "final_answers", ""),
)
VERIFIED = 5  # candidates of the verification that is timed
FEW = 5  # prompts, below which a difference is not called clear
KEPT = 0.8  # assumed share of candidates that the target keeps


@dataclass(frozen=True)
class Prices:
    """Seconds of a target's forward with one token, of one with `VERIFIED` candidates more, and of a draft's step."""

    step: float
    verification: float
    draft: float

    @classmethod
    def measure(cls, target: PreTrainedModel, draft: PreTrainedModel) -> Prices:
        """Time forwards after a short text."""
        return cls(forward_seconds(target, 1), forward_seconds(target, 1 + VERIFIED), forward_seconds(draft, 1))

    def speed(self, length: int) -> float:
        """How many times as fast as greedy decoding drafts of this length would be."""
        row = max(0.0, self.verification - self.step) / VERIFIED
        tokens = (1 - KEPT ** (length + 1)) / (1 - KEPT)
        return tokens * self.step / (self.step + length * (row + self.draft))

    def sentences(self) -> str:
        """The prices, and what they mean for the length of drafts."""
        best = max(range(17), key=self.speed)
        advice = f"drafts of {best} tokens are the fastest: about {self.speed(best):.1f} times as fast as greedy"
        return (
            f"One token costs the target {1000 * self.step:.0f} ms. Checking {VERIFIED} drafted tokens costs "
            f"{self.verification / self.step:.2f} times as much, and drafting one {self.draft / self.step:.2f} times. "
            f"If {KEPT:.0%} of drafted tokens are kept, {advice if best else 'greedy decoding is the fastest'}."
        )


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, tokens: int) -> float:
    """Of a forward with this number of tokens after 64 others; the median of five."""
    ids = torch.arange(64 + tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    cache, seconds = DynamicCache(), []
    model(input_ids=ids[:, :64], past_key_values=cache, logits_to_keep=1)
    for _ in range(5):
        start = time.perf_counter()
        model(input_ids=ids[:, 64:], past_key_values=cache).logits.argmax(-1).tolist()  # waits for a GPU, too
        seconds.append(time.perf_counter() - start)
        cache.crop(-tokens)
    return float(np.median(seconds))


def visible_threshold(judge: Judge) -> Threshold:
    """The threshold at which a judge accepted about half of the mismatches that it was not trained on; its own where
    this was not measured. Short drafts show little of a careful one."""
    bins = judge.info.training.get("held_out", {}).get("reliability")
    return Threshold(float(f"{bins[len(bins) // 2]['probability']:.3g}")) if bins else judge.info.threshold


def run_quickstart(
    pair: Pair,
    prompts: Sequence[Prompt],
    judge: Judge,
    threshold: float | str | Threshold | None = None,
    draft_length: int | str = "auto",
    max_new_tokens: int = 96,
    fast_draft: PreTrainedModel | None = None,
) -> list[AnswerRecord]:
    """
    Answer prompts with greedy, stock assisted, lossless and judged decoding, with a progress bar.

    Args:
        threshold (`float`, `str` or [`Threshold`], *optional*): Used instead of the judge's own.
        draft_length (`int` or `"auto"`): Of lossless and judged decoding; stock decodes with its defaults.
        max_new_tokens (`int`): See [`BenchConfig`].
        fast_draft ([`~transformers.PreTrainedModel`], *optional*): For lossless and judged decoding, instead of the
            pair's.

    Returns:
        `list[AnswerRecord]`: With the log-probability of each answer. `method` is `"greedy"`, `"assisted"`,
        `"lossless"` or `"judged"`.

    Raises:
        TooLong, ValueError: See [`decode`].
    """
    drafts, name = ({}, None) if fast_draft is None else ({"fast": fast_draft}, "fast")
    methods = {
        Method("greedy"): "greedy",
        Method("stock", length="default"): "assisted",
        Method("lossless", draft=name): "lossless",
        Method("judge", () if threshold is None else (threshold,), judge="judge", draft=name): "judged",
    }
    config = BenchConfig("timing", max_new_tokens, draft_length)
    records = decode(pair, prompts, [*methods], {"judge": judge}, config, drafts=drafts)
    names, by_id = {method.name: name for method, name in methods.items()}, {prompt.id: prompt for prompt in prompts}

    @functools.cache  # decodings often give the same text
    def logprob(prompt_id: str, tokens: tuple[int, ...]) -> float:
        return answer_logprob(pair, by_id[prompt_id], tokens)

    for record in tracked(records, "Score"):
        record.method, record.logprob = names[record.method], logprob(record.prompt, tuple(record.tokens))
    return records


@torch.no_grad()
def answer_logprob(pair: Pair, prompt: Prompt, tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities of an answer's tokens under the target, nats."""
    ids = encode(pair.tokenizer, prompt.conversation, None, 0, prompt.tools)
    text = torch.cat([ids, torch.tensor([[*tokens]])], dim=1).to(pair.target.device)
    logits = pair.target(text, logits_to_keep=len(tokens) + 1).logits[0, -len(tokens) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, text[0, ids.shape[1] :, None]).sum().item()


def figures(records: Sequence[AnswerRecord], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> dict:
    """
    The figures of [`run_quickstart`].

    Returns:
        `dict`: `runs`, a `dict` for each decoding, and `judged_against_lossless`, the seconds of lossless decoding
        divided by those of judged decoding. Ratios of seconds are [`Interval`]s over prompts. `final_answers` has how
        many answers end in the number that greedy decoding ends in, and of how many.
    """
    by_name: dict[str, list[AnswerRecord]] = {}
    for record in records:
        by_name.setdefault(record.method, []).append(record)
    seconds = {name: np.array([record.seconds for record in answers]) for name, answers in by_name.items()}
    weights = draws(np.zeros(len(seconds["greedy"])), 2000, 0)

    def ratio(slow: str, fast: str) -> Interval:
        return Interval.of((weights @ seconds[slow]) / (weights @ seconds[fast]))

    runs = []
    for name, answers in by_name.items():
        tokens, total = sum(len(record.tokens) for record in answers), seconds[name].sum()
        beside = [*zip(by_name["greedy"], answers, strict=True)]
        agreement = [reconvergence(greedy.tokens, record.tokens) for greedy, record in beside]
        unchanged = [
            check_of(prompt, allow_code=False).unchanged(prompt, *(_checked(record, tokenizer) for record in records))
            for prompt, records in zip(prompts, beside, strict=True)
        ]
        run = {
            "decoding": name,
            "tokens_per_second": tokens / total,
            "speed_against_greedy": ratio("greedy", name),
            "seconds_per_answer": total / len(answers),
            "tokens_per_answer": tokens / len(answers),
            "tokens_per_round": tokens / sum(len(record.lengths) for record in answers),
            "judged_share": sum(record.stats.judged for record in answers) / tokens,
            "agreement": sum(agreement) / len(answers),
            "final_answers": [unchanged.count(True), len(unchanged) - unchanged.count(None)],
            "logprob_per_token": sum(record.logprob for record in answers) / tokens,
        }
        if any(record.stats.rounds for record in answers):  # where its seconds went is known of our decoding only
            for part in ("draft", "verify", "rule"):
                run[f"{part}_share"] = sum(getattr(r.stats, f"{part}_seconds") for r in answers) / total
        runs.append(run)
    return {"judged_against_lossless": ratio("lossless", "judged"), "runs": runs, "answers": len(weights[0])}


def _checked(record: AnswerRecord, tokenizer: PreTrainedTokenizerBase) -> CheckedAnswer:
    return CheckedAnswer(tokenizer.decode(record.tokens, skip_special_tokens=True), record.finished)


def quickstart_table(results: dict, title: str) -> Table:
    """`runs` of [`figures`] as a table for the terminal."""
    table = Table(title=in_terminal(title, "table.title"))
    table.add_column("decoding", no_wrap=True)
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for run in results["runs"]:
        cells = run | {"final_answers": "{} of {}".format(*run["final_answers"])}
        table.add_row(in_terminal(run["decoding"]), *(shown(cells[key], spec) for _, key, spec in COLUMNS))
    return table


def conclusions(results: dict) -> list[str]:
    """What [`figures`] say of this machine, in sentences."""
    runs = {run["decoding"]: run for run in results["runs"]}
    best = max(runs.values(), key=lambda run: run["speed_against_greedy"][0])
    speed, (kept, known) = Interval(*results["judged_against_lossless"]), runs["judged"]["final_answers"]
    if results["answers"] < FEW:
        clear = "too few prompts to tell"
    else:
        clear = "no clear difference" if speed.low <= 1 <= speed.high else "a clear difference"
    answers = f"{kept} of {known} final answers, and " if known else ""
    return [
        f"The fastest here: {best['decoding']} decoding, {best['speed_against_greedy']:.2f} times as fast as greedy.",
        f"The judge makes {speed:.2f} times the speed of lossless decoding ({clear}). It kept {answers}"
        f"{runs['judged']['agreement']:.0%} of the greedy answers' wording.",
        "Speed is by seconds for the same prompts, with 95 % bootstrap intervals over prompts. Agreement counts "
        "shared 4-grams, and is not quality.",
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
