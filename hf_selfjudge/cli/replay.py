"""`replay`: what rules would make of rounds that were mined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markdown import Markdown

from ..bench.methods import FAMILIES, parse_methods
from ..bench.replay import read_rounds, replay
from ..bench.report import replay_tables
from ..bench.summary import summarise_replay
from ..judge.judge import Judge
from ..mining.label_files import load_answers, load_labels, mining_of
from .console import console, say
from .options import JsonOptions, option


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(JsonOptions):
    rule: list[str] = option(
        "Rules to compare, with thresholds, as for `bench`: judge:FOLDER=0.01,0.03 margin=0.5,1 …"
    )


def replay_command(
    labels: Annotated[list[str], typer.Argument(help="Folders written by `hf-selfjudge mine --rounds`.")],
    options: ReplayOptions,
) -> None:
    """Compare rules in seconds on rounds whose outcome was mined: tokens a round, and changed final answers."""
    methods = [method for method in parse_methods(options.rule) if method.like is None]
    for method in methods:
        if FAMILIES[method.family].rule is None:
            raise ValueError(f"`rule` {method.name!r} does not decide about mismatches. Leave it out.")
    judges = {name: Judge.from_pretrained(name) for name in {method.judge for method in methods} - {None}}
    rows = load_labels(labels)
    layer = mining_of(rows)["layer"]
    for name, judge in judges.items():
        if judge.info.layer != layer or judge.adapter is not None:
            raise ValueError(
                f"`rule`: the judge {name} does not look at layer {layer} of the target (None: the last states), "
                "which the labels have. Add its layer with `hf-selfjudge add-layer`, or use another judge."
            )
    rules = [method.rule(judges) for method in methods]
    names, curves = zip(*((method.name, method.curve) for method in methods), strict=True)
    results = summarise_replay(replay(read_rounds(rows, load_answers(labels)), rules, names, curves), methods)
    say(
        f"{results['rounds']} rounds of answers to {results['prompts']} prompts whose final answers are known. In "
        "brackets: 95 % bootstrap intervals over prompts.\n"
    )
    console.print(Markdown(replay_tables(results)))
    options.write(results)
