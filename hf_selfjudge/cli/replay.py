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
from ..judge.shipped import shipped_for
from ..mining.label_files import load_answers, load_labels, mining_of
from ..models.pair import LOOKUP
from .bench import BenchOptions
from .console import console, say
from .options import JsonOptions, reuse


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(JsonOptions):
    rule: list[str] | None = reuse(BenchOptions, "rule", None)


def replay_command(
    labels: Annotated[list[str], typer.Argument(help="Folders written by `hf-selfjudge mine --rounds`.")],
    options: ReplayOptions,
) -> None:
    """Compare rules in seconds on rounds whose outcome was mined: tokens a round, and changed final answers."""
    rows = load_labels(labels)
    record = mining_of(rows)
    shipped = shipped_for(record["target"], record["draft"])
    methods = parse_methods(options.rule, None if shipped is None else str(shipped), record["draft"] == LOOKUP)
    others = [method.name for method in methods if FAMILIES[method.family].rule is None or method.like is not None]
    if options.rule and others:
        raise ValueError(
            f"`rule` {others[0]!r} cannot be replayed: it needs to decode. Leave it out. (A coin needs a share: "
            "coin=0.5.)"
        )
    methods = [method for method in methods if method.name not in others]
    judges = {name: Judge.from_pretrained(name) for name in {method.judge for method in methods} - {None}}
    for name, judge in judges.items():
        needs = judge.info.hidden_size, judge.info.layer, judge.info.adapter
        if needs != (record["hidden_size"], record["layer"], False):
            raise ValueError(
                f"`rule`: the labels have states of layer {record['layer']} (None: the last ones) of size "
                f"{record['hidden_size']}, without an adapter; the judge {name} needs other ones. Use another judge, "
                "or add its layer: `hf-selfjudge add-layer LABELS --layer …`."
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
