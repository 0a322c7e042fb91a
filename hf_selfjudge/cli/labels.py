"""`labels`: tables and examples of mined labels. `ceiling`: how much of a label can be known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from ..data.prompts import read_prompts
from ..mining.ceiling import agreement, label_again
from ..mining.config import MiningConfig
from ..mining.label_files import load_labels, mining_of, read_mining
from ..mining.report import TITLES, as_table, change_rates, examples, in_context, score_predictions, short_columns
from ..models.load import load_model, resolve_model
from ..utils.processes import require_one_process
from .console import console, say
from .options import JsonOptions, PromptOptions, TargetOptions, option, reuse


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(JsonOptions):
    examples: int = option("Harmless and harmful substitutions to show in context.", 5, min=0)
    seed: int = reuse(MiningConfig, "seed", 0)


@dataclass(frozen=True, kw_only=True)
class CeilingOptions(TargetOptions, JsonOptions):
    prompts: str | None = reuse(PromptOptions, "prompts")
    substitutions: int = option("How many of each category to label again.", 100, min=1)
    allow_code: bool = reuse(MiningConfig, "allow_code", False)
    answer_batch: int = reuse(MiningConfig, "answer_batch", 32)
    seed: int = reuse(MiningConfig, "seed", 0)


def labels_command(
    labels: Annotated[
        list[str], typer.Argument(help="Folders written by `hf-selfjudge mine`, or datasets on the Hub made of them.")
    ],
    options: LabelsOptions,
) -> None:
    """Show mined labels: how often answers change, how well scores predict it, substitutions in context."""
    rows = load_labels(labels)
    record = mining_of(rows)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(record["target"]))
    columns = short_columns(rows, tokenizer)
    rates = {by: change_rates(columns, by, seed=options.seed) for by in ("category", "kind", "replaced")}
    predictions = score_predictions(columns, seed=options.seed)
    say(
        f"{len(columns)} substitutions ({columns['changed'].count()} rewritten) of "
        f"{columns['prompt_id'].nunique()} prompts; {record['target']} + {record['draft']}. Intervals: 95 %, "
        "bootstrap over prompts.\n"
    )
    for by, found in rates.items():
        console.print(as_table(found, f"by {TITLES.get(by, by)}"))
    if predictions:
        console.print(as_table(predictions, "how well scores without a rewrite predict a changed answer"))
    for harmful in (False, True):
        console.rule("harmful" if harmful else "harmless")
        for index in examples(columns, harmful, options.examples, options.seed):
            console.print(in_context(rows[index], tokenizer), soft_wrap=True)
    options.write({"rates": rates, "predictors": predictions})


def ceiling_command(
    labels: Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge mine`.")], options: CeilingOptions
) -> None:
    """Make some labels once more, to see how much of a label is rounding. No judge can know that."""
    require_one_process("`ceiling`")
    record = read_mining(labels)
    prompts = read_prompts(options.prompts, **record["prompts_options"])
    target, tokenizer = load_model(
        record["target"], options.torch_dtype(record["dtype"]), device_map=options.placement
    )
    how = options.substitutions, options.allow_code, options.answer_batch, options.seed
    again = label_again(target, tokenizer, labels, prompts, *how)
    rows = agreement(again, seed=options.seed)
    console.print(as_table(rows, "labels of the same substitutions, made twice"))
    options.write({"agreement": rows})
