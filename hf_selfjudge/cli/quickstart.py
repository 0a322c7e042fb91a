"""`quickstart`: plain, stock assisted and judged decoding of a few prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bench.quickstart import (
    Prices,
    coloured_answer,
    conclusions,
    figures,
    quickstart_table,
    run_quickstart,
    visible_threshold,
)
from ..bench.runner import BenchConfig
from ..data.prompts import fitting, read_prompts
from ..judge.judge import Judge
from ..judge.shipped import shipped_judge
from ..judge.threshold import Threshold
from ..mining.config import MiningConfig
from ..mining.job import mine
from ..models.cpu import precision
from ..models.offload import is_offloaded
from ..models.pair import PAIRS, parse_pair, with_fast_draft
from ..training.config import JudgeConfig
from ..training.script import ScriptArguments
from ..utils.files import check_writable
from ..utils.names import absolute_if_folder
from .console import console, say, say_left_out
from .options import JsonOptions, JudgeOptions, OutputOptions, PairOptions, PromptOptions, option, reuse
from .train import train_judge


PROMPTS = Path(__file__).parents[1] / "data"
OFFLOADED_PROMPTS = 4  # a forward of an offloaded target takes seconds
# Small enough for a first try on two cores.
QUICK_MINING = MiningConfig(max_new_tokens=96, per_answer=6, rewrites=6)


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(JsonOptions, OutputOptions, JudgeOptions, PromptOptions, PairOptions):
    prompts: str | None = reuse(PromptOptions, "prompts", None)
    max_new_tokens: int = reuse(BenchConfig, "max_new_tokens", 96)
    draft_length: int | str = reuse(BenchConfig, "draft_length", "auto")
    train: bool = option("First mine labels of shipped prompts and train a judge, in the folder --output.", False)
    output: Path = reuse(OutputOptions, "output", Path("selfjudge-quickstart"))


def quickstart_command(options: QuickstartOptions) -> None:
    """Compare plain greedy, stock assisted, lossless and judged decoding of a real pair on this machine."""
    if options.train and options.judge is not None:
        raise ValueError("`--train` makes a judge and `--judge` names one. Use one of the two.")
    if options.train:
        check_writable(options.output)
    BenchConfig("timing", options.max_new_tokens, options.draft_length)  # refuses wrong values before models load
    prompts = options.read(default=PROMPTS / "quickstart.jsonl")
    if options.offload and options.limit is None and options.prompts is None:
        prompts = prompts[:OFFLOADED_PROMPTS]
    judge = None if options.train else Judge.from_pretrained(options.judge or shipped_judge(options.pair))
    # A judge that is trained now has no operating points.
    named = {} if judge is None else judge.info.thresholds
    threshold = None if options.threshold is None else Threshold.parse(options.threshold, named)
    pair, names = options.load(draft_length=None), parse_pair(options.pair)
    prompts, _, left_out = fitting(pair.tokenizer, prompts, pair.context, options.max_new_tokens)
    say_left_out(left_out)
    if judge is None:
        labels, trained = options.output / "labels", options.output / "judge"
        mine(pair, read_prompts(PROMPTS / "train.jsonl"), QUICK_MINING, labels, "train.jsonl")
        train_judge(ScriptArguments([str(labels)]), JudgeConfig(str(trained), components=16))
        judge = Judge.from_pretrained(trained)
    threshold = threshold or visible_threshold(judge)
    fast = with_fast_draft(pair, names[1])
    say(Prices.measure(fast.target, fast.draft).sentences())
    records = run_quickstart(pair, prompts, judge, threshold, options.draft_length, options.max_new_tokens, fast.draft)
    shown = max((record for record in records if record.method == "judged"), key=lambda record: record.stats.judged)
    (prompt,) = (prompt for prompt in prompts if prompt.id == shown.prompt)
    console.print(coloured_answer(shown, prompt, pair.tokenizer))
    console.print()
    results = figures(records, prompts, pair.tokenizer)
    console.print(quickstart_table(results, f"{' + '.join(names)}, {len(prompts)} prompts"))
    for line in conclusions(results):
        say(line)
    draft = "the draft" if fast is pair else "a low-bit draft"
    say(f"Stock decodes with its defaults, lossless and judged with {draft}; the judge's threshold is {threshold}.")
    record = {
        "pair": options.pair if options.pair in PAIRS else ",".join(map(absolute_if_folder, names)),
        "prompts": len(prompts),
        "left_out": left_out,
        "max_new_tokens": options.max_new_tokens,
        "draft_length": options.draft_length,
        "threshold": threshold.json(),
        "dtype": precision(pair.target),
        "offloaded": is_offloaded(pair.target),
        "low_bit_draft": fast is not pair,
        "device": str(pair.target.device),
    }
    options.write(record | results)
