"""`labels`: tables and examples of mined labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from transformers import AutoTokenizer

from ..mining.config import MiningConfig
from ..mining.label_files import load_labels, mining_of
from ..mining.report import TITLES, as_table, change_rates, examples, in_context, score_predictions, short_columns
from ..models.load import resolve_model
from .console import console, say
from .options import JsonOptions, option, reuse


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(JsonOptions):
    examples: int = option("Harmless and harmful substitutions to show in context.", 5, min=0)
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
