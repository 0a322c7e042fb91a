"""`quickstart`: plain, stock assisted and judged decoding of a few prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bench.quickstart import coloured_answer, figures, quickstart_table, run_quickstart, speed_lines
from ..bench.runner import BenchConfig
from ..data.prompts import fitting, read_prompts
from ..judge.judge import Judge
from ..judge.shipped import shipped_judge
from ..judge.threshold import Threshold
from ..mining.config import MiningConfig
from ..mining.job import mine
from ..models.cpu import precision
from ..models.pair import PAIRS, Pair, parse_pair
from ..training.config import JudgeConfig
from ..training.script import ScriptArguments
from ..utils.files import check_writable
from ..utils.names import absolute_if_folder
from .console import console, say, say_left_out
from .options import Int8Options, JsonOptions, JudgeOptions, OutputOptions, PromptOptions, option, reuse
from .train import train_judge


PROMPTS = Path(__file__).parents[1] / "data"
# Small enough for a first try on two cores.
QUICK_MINING = MiningConfig(max_new_tokens=96, per_answer=6, rewrites=6)


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(JsonOptions, OutputOptions, JudgeOptions, PromptOptions, Int8Options):
    """What is compared, with which judge."""

    prompts: str | None = reuse(PromptOptions, "prompts", None)
    max_new_tokens: int = reuse(BenchConfig, "max_new_tokens", 96)
    draft_length: int | str = reuse(BenchConfig, "draft_length", 5)
    train: bool = option(
        "Mine labels and train a judge first, in the folder --output, on prompts that come with the package.", False
    )
    output: Path = reuse(OutputOptions, "output", Path("selfjudge-quickstart"))


def quickstart_command(options: QuickstartOptions) -> None:
    """Compare plain greedy, stock assisted and judged decoding on a real pair."""
    if options.train and options.judge is not None:
        raise ValueError("`--train` makes a judge and `--judge` names one. Use one of the two.")
    if options.train:
        check_writable(options.output)
    BenchConfig("timing", options.max_new_tokens, options.draft_length)  # refuses wrong values before models load
    prompts = options.read(default=PROMPTS / "quickstart.jsonl")
    judge = None if options.train else Judge.from_pretrained(options.judge or shipped_judge(options.pair))
    # A judge that is trained now has no operating points.
    named = {} if judge is None else judge.info.thresholds
    threshold = None if options.threshold is None else Threshold.parse(options.threshold, named)
    pair = options.load(options.draft_length)
    prompts, _, left_out = fitting(pair.tokenizer, prompts, pair.context, options.max_new_tokens)
    say_left_out(left_out)
    if judge is None:
        judge = _train(pair, options.output)
    int8_draft = options.load_int8_draft(pair, options.draft_length) if options.int8_draft else None
    records = run_quickstart(pair, prompts, judge, threshold, options.draft_length, options.max_new_tokens, int8_draft)
    shown = max((record for record in records if record.method == "judged"), key=lambda record: record.stats.judged)
    (prompt,) = (prompt for prompt in prompts if prompt.id == shown.prompt)
    console.print(coloured_answer(shown, prompt, pair.tokenizer))
    console.print()
    names, results = " + ".join(model.config.name_or_path for model in (pair.target, pair.draft)), figures(records)
    console.print(quickstart_table(results, f"{names}, {len(prompts)} prompts"))
    for line in speed_lines(results):
        say(line)
    is_known = options.pair in PAIRS
    record = {
        "pair": options.pair if is_known else ",".join(map(absolute_if_folder, parse_pair(options.pair))),
        "prompts": len(prompts),
        "left_out": left_out,
        "max_new_tokens": options.max_new_tokens,
        "draft_length": options.draft_length,
        "threshold": (threshold or judge.info.threshold).json(),
        "dtype": precision(pair.target),
        "device": str(pair.target.device),
    }
    options.write(record | results)


def _train(pair: Pair, folder: Path) -> Judge:
    """A judge for the pair, from labels that are mined on the prompts of the package."""
    prompts = PROMPTS / "train.jsonl"
    mine(pair, read_prompts(prompts), QUICK_MINING, folder / "labels", prompts.name)
    train_judge(ScriptArguments([str(folder / "labels")]), JudgeConfig(str(folder / "judge"), components=16))
    return Judge.from_pretrained(folder / "judge")
