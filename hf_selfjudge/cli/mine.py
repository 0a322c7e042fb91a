"""`mine`, `add-layer` and `compact`: labels, and the same labels with hidden states of another layer, or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..data.prompts import read_prompts
from ..decoding.judged_model import JudgedModel
from ..decoding.rules import JudgeRule
from ..judge.judge import Judge
from ..mining.compact import compact_labels
from ..mining.config import MiningConfig
from ..mining.job import counts_of, mine
from ..mining.label_files import read_mining
from ..mining.layers import add_layer_states
from ..models.load import fingerprint, load_model
from ..utils.files import check_writable
from ..utils.names import absolute_if_folder
from ..utils.processes import require_one_process, this_process
from .console import say, say_left_out
from .options import JudgeOptions, OutputOptions, PairOptions, PromptOptions, TargetOptions, option, reuse


@dataclass(frozen=True, kw_only=True)
class MineOptions(JudgeOptions, OutputOptions, PromptOptions, PairOptions):
    answer_column: str | None = option("Column of answers to use instead of the target's own.", None)


@dataclass(frozen=True, kw_only=True)
class AddLayerOptions(OutputOptions, TargetOptions):
    layer: int = reuse(MiningConfig, "layer")
    batch: int = option("Answers in a forward.", 4, min=1)
    prompts: str | None = reuse(PromptOptions, "prompts", None)


def mine_command(options: MineOptions, config: MiningConfig) -> None:
    """Mine labels: let the target finish its answer after each substitution. --judge decodes the answers with a
    judge."""
    process = this_process()
    if options.threshold is not None and options.judge is None:
        raise ValueError("`threshold` is that of a judge. Name the judge with `--judge`.")
    check_writable(options.output)
    prompts = options.read(options.answer_column)
    rule = name = None
    if options.judge is not None:
        judge = Judge.from_pretrained(options.judge)
        rule = JudgeRule(judge, options.threshold)
        name = f"{absolute_if_folder(options.judge)}, weights {fingerprint(judge)}, threshold {rule.threshold}"
    pair = options.load(with_draft=not config.lookup)
    judged = None if rule is None else JudgedModel(pair.target, rule)
    mine(pair, prompts, config, options.output, Path(options.prompts).name, judged, name)
    if not process.is_main_process:
        return
    counts = counts_of(options.output)
    say(
        f"{counts['substitutions']} substitutions ({counts['rewrites']} rewritten) of {counts['prompts']} prompts in "
        f"{options.output}; {counts['too_long']} prompts were too long. {counts['target_tokens']} tokens through the "
        f"target, {counts['seconds']:.0f} s."
    )
    say_left_out(counts["left_out"])


def add_layer_command(
    labels: Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge mine`.")], options: AddLayerOptions
) -> None:
    """Write mined labels again with the hidden states of another layer, for a judge that reads that layer. Labels made
    by `compact` also need the --prompts that they were mined on."""
    require_one_process("`add-layer`")
    record = read_mining(labels)
    prompts = None if options.prompts is None else read_prompts(options.prompts, **record["prompts_options"])
    dtype = options.torch_dtype(record["dtype"])
    target, tokenizer = load_model(record["target"], dtype, device_map=options.placement)
    rows = add_layer_states(target, labels, options.layer, options.output, options.batch, prompts, tokenizer)
    say(f"{len(rows)} substitutions in {options.output}, with the hidden states that enter layer {options.layer}.")


def compact_command(
    labels: Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge mine`.")], options: OutputOptions
) -> None:
    """Write mined labels again without hidden states and prompts, so that they can be kept in a repository.
    `add-layer --prompts` adds both again."""
    rows = compact_labels(labels, options.output)
    size = sum(path.stat().st_size for path in options.output.iterdir() if path.is_file())
    say(f"{len(rows)} substitutions in {options.output}, {size / 1e6:.1f} MB.")
