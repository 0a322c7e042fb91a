"""`bench`: speed and quality of many ways of decoding the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.markdown import Markdown

from ..bench.methods import parse_methods
from ..bench.report import plot_tradeoff, write_results, write_spec_bench
from ..bench.runner import BenchConfig, decode, readable_context
from ..bench.summary import Scorer, grid_of, summarise_quality, summarise_timing
from ..data.prompts import balanced, fitting
from ..judge.judge import Judge
from ..judge.shipped import SHIPPED, shipped_judge
from ..mining.config import MiningConfig
from ..models.pair import DRAFT_MODEL, LOOKUP
from ..scoring.asking import Asked
from ..scoring.checks import check_can_score
from ..utils.files import check_writable
from ..utils.processes import this_process
from .console import console, say, say_left_out
from .options import OutputOptions, PairOptions, PromptOptions, option, reuse


@dataclass(frozen=True, kw_only=True)
class BenchOptions(OutputOptions, PromptOptions, PairOptions):
    rule: list[str] | None = option(
        "What to compare, with thresholds: margin=0.5,1 top-k=2 judge=0.2,0.4 judge:FOLDER=0.3 coin (accepts as often "
        "as the judge does) … By default every rule with three thresholds. lossless@16 drafts 16 tokens in a round, "
        "stock@default as many as transformers chooses.",
        None,
    )
    per_category: int | None = option("Use only the first prompts of each category.", None, min=1)
    lookup: int = reuse(MiningConfig, "lookup", 0)
    low_bit_draft: bool = option("Give the draft int4 and int8 weights, which makes it faster on a CPU.", False)
    compile_draft: bool = option("With timing: compile the draft's step, on a GPU as a CUDA graph.", False)
    ask: bool = reuse(MiningConfig, "ask", False)
    embeddings: str | None = option(
        "For similarity: a sentence-transformers model (folder or Hub id), such as "
        "sentence-transformers/all-MiniLM-L6-v2.",
        None,
    )
    allow_code: bool = reuse(MiningConfig, "allow_code", False)
    spec_bench: bool = option("With timing: also write the answers in the format of Spec-Bench.", False)


def bench_command(options: BenchOptions, config: BenchConfig) -> None:
    """Measure what each rule gains and costs: speed and quality of many decodings of the same prompts."""
    process = this_process()
    if config.mode == "timing" and process.num_processes > 1:
        raise ValueError(f"`mode` timing: {process.num_processes} processes would slow each other down. Start one.")
    if options.lookup:
        if config.draft_length not in (BenchConfig.draft_length, options.lookup):
            raise ValueError("`draft-length` is a draft model's; with `--lookup N` it is N. Give one of the two.")
        config = replace(config, draft_length=options.lookup)
    drafts = LOOKUP if options.lookup else DRAFT_MODEL
    shipped = str(shipped_judge(options.pair, drafts)) if (options.pair, drafts) in SHIPPED else None
    methods = parse_methods(options.rule, shipped, bool(options.lookup))
    if options.spec_bench and config.mode != "timing":
        raise ValueError("`spec-bench` files have the seconds of each answer. Ask for them with `mode` timing.")
    if options.compile_draft and (config.mode != "timing" or options.lookup):
        raise ValueError(
            "`compile-draft` compiles a draft model that answers one prompt at a time. Use it with `mode` timing, "
            "without `lookup`."
        )
    check_writable(options.output)
    prompts = balanced(options.read(), options.per_category)
    check_can_score(prompts, options.embeddings)
    judges = {name: Judge.from_pretrained(name) for name in {method.judge for method in methods} - {None}}
    for method in methods:
        if method.judge is not None:
            method.rule(judges)  # refuses unknown operating points before models load
    pair = options.load(None, not options.lookup, options.low_bit_draft, options.compile_draft)
    prompts, _, left_out = fitting(pair.tokenizer, prompts, readable_context(pair, methods), config.max_new_tokens)
    if process.is_main_process:
        say_left_out(left_out)

    records = decode(pair, prompts, methods, judges, config, options.output)
    if not process.is_main_process:
        return
    local = options.prompts == "-" or Path(options.prompts).exists()
    if config.mode == "quality":
        asked = Asked(pair.target, pair.tokenizer)
        scorer = Scorer(asked, options.output, options.allow_code, options.ask, options.embeddings)
        results = summarise_quality(grid_of(records, prompts, methods, scorer), records, methods, judges)
        results["dataset"] = None if local or options.split != "test" else options.prompts.partition(":")[0]
    else:
        results = summarise_timing(records, prompts, methods)
    name = Path(options.prompts).name if local else f"{options.prompts} ({options.split})"
    text = write_results(options.output, config.mode, results, name, left_out)
    if config.mode == "quality":
        plot_tradeoff(results, options.output / "curve.png")
    if options.spec_bench:
        write_spec_bench(records, prompts, pair.tokenizer, options.output / "spec-bench")
    console.print(Markdown(text))
    say(f"Written to {options.output}: {config.mode}-results.json, {config.mode}-results.md.")
