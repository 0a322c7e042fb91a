"""`labels`: tables and examples of mined labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from transformers import AutoTokenizer

from ..mining import report
from ..mining.config import MiningConfig
from ..mining.label_files import load_labels, mining_of
from ..models.load import resolve_model
from ..utils.files import check_writable
from .console import console, say
from .options import JsonOptions, option, reuse


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(JsonOptions):
    examples: int = option("Harmless and harmful substitutions to show in context.", 5, min=0)
    plot: Path | None = option("Draw the distributions of scores to this file (.png, .svg, .pdf).", None)
    seed: int = reuse(MiningConfig, "seed", 0)


def labels_command(
    labels: Annotated[
        list[str], typer.Argument(help="Folders written by `hf-selfjudge mine`, or datasets on the Hub made of them.")
    ],
    options: LabelsOptions,
) -> None:
    """Show mined labels: rates, scores beside each other, substitutions in context."""
    if options.plot is not None:
        check_writable(options.plot.parent)
    rows = load_labels(labels)
    record = mining_of(rows)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(record["target"]))
    columns = report.LabelColumns.of(rows, tokenizer)
    rates = {by: report.change_rates(columns, by, seed=options.seed) for by in ("category", "kind", "replaced")}
    quantiles = {by: report.score_quantiles(columns, by) for by in ("category", "replaced")}
    names, matrix = report.score_correlations(columns)
    predictions = report.score_predictions(columns, seed=options.seed)
    say(
        f"{len(columns)} substitutions ({int(columns.rewritten.sum())} rewritten) of "
        f"{len(set(columns.columns['prompt_id']))} prompts; {record['target']} + {record['draft']}. Intervals: 95 %, "
        "bootstrap over prompts.\n"
    )
    tables = [report.rates_table(rows, by) for by, rows in rates.items()]
    tables += [report.quantiles_table(rows, by) for by, rows in quantiles.items()]
    for table in [*tables, report.correlations_table(names, matrix), report.predictions_table(predictions)]:
        console.print(table)
    for harmful in (False, True):
        console.rule("harmful" if harmful else "harmless")
        for index in report.examples(columns, harmful, options.examples, options.seed):
            console.print(report.in_context(columns, index, tokenizer), soft_wrap=True)
    if options.plot is not None:
        report.plot_scores(columns, options.plot)
    correlations = {"scores": names, "matrix": np.where(np.isnan(matrix), None, matrix).tolist()}
    options.write(
        {"rates": rates, "distributions": quantiles, "correlations": correlations, "predictors": predictions}
    )
