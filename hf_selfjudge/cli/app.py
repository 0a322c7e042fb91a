"""`hf-selfjudge quickstart | mine | reread | labels | train | bench | calibrate | card | push | pull | push-…`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from huggingface_hub import CommitInfo
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..bench.methods import COIN, DEFAULT_RULES, needs_draft, parse_settings
from ..bench.quick import Run, compare, print_answer, print_speed, ratio_of_seconds, results_table, summarise
from ..bench.record import heading, write_spec_bench
from ..bench.runner import BenchConfig, decode, readable
from ..bench.scores import Scorer, grid_of
from ..bench.summary import OPERATING_POINTS, operating_points, summarise_quality, summarise_timing
from ..bench.tables import family_of, markdown
from ..data.prompts import Prompt, balanced, counted, fitting, none_fits, read_prompts
from ..decoding.judged_model import JudgedModel
from ..hub.publish import pull_judge, push_judge, push_labels, push_results, push_space
from ..hub.results import add_results, family_in, read_quality
from ..judge.card import write_card
from ..judge.info import read_threshold
from ..judge.judge import Judge
from ..judge.shipped import SHIPPED, shipped_judge
from ..judge.threshold import Threshold
from ..mining.job import counts_of, judged_writer, mine, this_process
from ..mining.labels import MiningConfig, folders_of, mining_of
from ..mining.layers import add_layer_states
from ..mining.report import (
    Labels,
    correlations,
    correlations_table,
    distributions,
    distributions_table,
    examples,
    in_context,
    predictors,
    predictors_table,
    rates,
    rates_table,
)
from ..mining.report import plot as draw
from ..mining.report import plot as plot_curve
from ..models.cpu import precision
from ..models.load import fingerprint, load_model, resolve_model
from ..models.pair import DRAFT_MODEL, LOOKUP, PAIRS, load_draft, load_pair, parse_pair
from ..models.tokens import context_of
from ..models.wheels import SourceError
from ..scoring.quality import check_tasks, task_of
from ..training import script as training
from ..training.config import JudgeConfig
from ..training.evaluation import HeldOutConfig
from ..utils.files import check_writable, read_text, write_json, write_text
from ..utils.names import lasting
from ..utils.text import in_markdown, in_terminal


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=max(110, Console().width), markup=False, emoji=False)  # data is text

PROMPTS = Path(__file__).parents[1] / "data"
MINING = MiningConfig()
# Small enough for a first try on two cores.
QUICK_MINING = MiningConfig(max_new_tokens=96, per_answer=6, rewrites=6)

Pair = Annotated[str, typer.Option(help="A known pair or 'TARGET,DRAFT', each a Hub id or a folder.")]
DraftLength = Annotated[
    str, typer.Option(help="Tokens that the draft proposes in a round, or 'auto' (judged decoding only; stock: 5).")
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32; by default bfloat16 on a GPU, on a CPU what decodes fastest."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Limit of an answer, tokens.")]


@app.command()
def quickstart(
    pair: Pair = "qwen2.5-coder",
    dtype: Dtype = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `prompt`; by default eight that are shipped.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts of the file.")] = None,
    max_new_tokens: MaxNewTokens = 96,
    judge: Annotated[
        str | None, typer.Option(help="A judge: folder or Hub id. By default the one shipped for the pair.")
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="0 (lossless) to 1, 0.03/token (for each token gained) or an operating point; by default the judge's."
        ),
    ] = None,
    draft_length: DraftLength = "5",
    int8_draft: Annotated[
        bool, typer.Option("--int8-draft", help="Also judged decoding with a draft whose weights are int8 (CPU).")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Mine labels and train a judge first, on prompts that are shipped.")
    ] = False,
    output: Annotated[Path, typer.Option(help="With --train: folder for the labels and the judge.")] = Path(
        "selfjudge-quickstart"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Plain greedy, stock assisted and judged decoding side by side, on a real pair."""
    if train and judge is not None:
        raise ValueError("`--train` makes a judge and `--judge` names one. Use one of the two.")
    if json_file is not None:
        check_writable(json_file.parent)
    if train:
        check_writable(output)
    asked = read_prompts(prompts or PROMPTS / "quickstart.jsonl", limit)
    source = judge if judge is not None else output / "judge" if train else shipped_judge(pair)
    length, floats = read_length(draft_length), read_dtype(dtype)
    loaded = load_pair(pair, length, floats)
    target, draft, tokenizer = loaded.target, loaded.draft, loaded.tokenizer
    questions, left_out = say_fitting(tokenizer, asked, context_of(target), max_new_tokens)
    if train:
        own = PROMPTS / "train.jsonl"
        mine(target, draft, tokenizer, read_prompts(own), QUICK_MINING, output / "labels", own.name)
        train_judge(
            training.ScriptArguments([str(output / "labels")]), JudgeConfig(str(output / "judge"), components=16)
        )
    judged = JudgedModel.from_pretrained(
        target, str(source), threshold=read_threshold(threshold), allow_other_weights=True, draft_length=length
    )

    decodings = {"greedy": (target, None), "assisted": (target, draft), "judged": (judged, draft)}
    if int8_draft:
        decodings["judged, int8 draft"] = (
            judged,
            load_draft(parse_pair(pair)[1], target, tokenizer, length, int8=True),
        )
    runs: list[Run] = []
    for number, answers in enumerate(compare(target, decodings, tokenizer, questions, max_new_tokens), start=1):
        runs += answers
        speeds = ", ".join(f"{run.decoding} {len(run.tokens) / run.seconds:.1f} tokens/s" for run in answers)
        console.print(in_terminal(f"[{number}/{len(questions)}] {answers[0].prompt.id}: {speeds}"))
    print_answer(console, max((r for r in runs if r.decoding == "judged"), key=lambda r: r.stats.judged), tokenizer)
    rows = summarise(runs)
    console.print()
    console.print(
        results_table(rows, f"{target.config.name_or_path} + {draft.config.name_or_path}, {len(questions)} prompts")
    )
    print_speed(console, runs, rows)
    if json_file is not None:
        write_json(
            json_file,
            {
                "pair": pair if pair in PAIRS else ",".join(map(lasting, parse_pair(pair))),
                "prompts": len(questions),
                "left_out": left_out,
                "max_new_tokens": max_new_tokens,
                "draft_length": draft_length,
                "threshold": Threshold.parse(judged.threshold).json(),
                "dtype": precision(target),
                "speed_against_assisted": {
                    row["decoding"]: ratio_of_seconds(runs, "assisted", row["decoding"]) for row in rows
                },
                "device": str(target.device),
                "runs": rows,
            },
        )


@app.command("mine")
def mine_command(
    prompts: Annotated[
        str,
        typer.Option(help="JSON lines, CSV or Parquet; a folder or Hub id of a dataset; or - for standard input."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the labels; started again, mining goes on there.")],
    pair: Pair = "qwen2.5-coder",
    dtype: Dtype = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffle the prompts first, with --seed.")] = False,
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    column: Annotated[str | None, typer.Option(help="Where the prompt is, if it is not found by itself.")] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Where answers are that shall be taken instead of the target's own.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message for all prompts.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a judge: mine along text decoded with it.")
    ] = None,
    max_new_tokens: MaxNewTokens = MINING.max_new_tokens,
    top: Annotated[int, typer.Option(min=1, help="Choices of the draft to substitute at each place.")] = MINING.top,
    floor: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability of a choice of the draft but its first.")
    ] = MINING.floor,
    runners_up: Annotated[
        int, typer.Option(min=0, help="Next choices of the target itself to substitute at each place.")
    ] = MINING.runners_up,
    lookup: Annotated[
        int, typer.Option(min=0, help="Draft by prompt lookup, so many tokens a round, instead of the draft model.")
    ] = MINING.lookup,
    per_answer: Annotated[
        int, typer.Option(min=1, help="Substitutions to score in each answer, mismatches first.")
    ] = MINING.per_answer,
    rewrites: Annotated[int, typer.Option(min=0, help="How many of these to rewrite.")] = MINING.rewrites,
    window: Annotated[
        int, typer.Option(min=0, help="Tokens behind a substitution that likelihood and confidence look at.")
    ] = MINING.window,
    ask: Annotated[bool, typer.Option("--ask", help="Ask the target whether rewritten text says the same.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the code of answers to prompts with `tests` on this machine.")
    ] = False,
    shard: Annotated[int, typer.Option(min=1, help="Prompts whose labels are written together.")] = MINING.shard,
    answer_batch: Annotated[int, typer.Option(min=1, help="Answers decoded at a time.")] = MINING.answer_batch,
    forward_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens of one forward over substitutions: the limit of memory.")
    ] = MINING.forward_tokens,
    answers_at_once: Annotated[
        int, typer.Option(min=1, help="Answers whose substitutions share a forward.")
    ] = MINING.answers_at_once,
    seed: Annotated[int, typer.Option(help="Of all samples.")] = MINING.seed,
) -> None:
    """Label substitutions by letting the target finish its answer after each."""
    process = this_process()
    if prompts == "-" and process.num_processes > 1:
        raise ValueError("`prompts`: several processes cannot share standard input. Give a file.")
    check_writable(output)
    questions = read_prompts(
        prompts,
        limit,
        shuffle=seed if shuffle else None,
        column=column,
        answer_column=answer_column,
        system=system,
        split=split,
    )
    loaded = load_pair(pair, 5, read_dtype(dtype), with_draft=not lookup)
    target, draft, tokenizer = loaded.target, loaded.draft, loaded.tokenizer
    config = MiningConfig(
        max_new_tokens=max_new_tokens,
        top=top,
        floor=floor,
        runners_up=runners_up,
        lookup=lookup,
        per_answer=per_answer,
        rewrites=rewrites,
        window=window,
        ask=ask,
        allow_code=allow_code,
        shard=shard,
        answer_batch=answer_batch,
        forward_tokens=forward_tokens,
        answers_at_once=answers_at_once,
        seed=seed,
    )
    writer = name = None
    if judge is not None:
        judged = JudgedModel.from_pretrained(target, judge)
        writer = judged_writer(judged, draft, lookup)
        name = f"{lasting(judge)}, weights {fingerprint(judged.rule.judge)}, threshold {judged.threshold}"
    mine(target, draft, tokenizer, questions, config, output, Path(prompts).name, writer, name)
    if not process.is_main_process:
        return
    counts = counts_of(output)
    console.print(
        f"{counts['substitutions']} substitutions ({counts['rewrites']} rewritten) of {counts['prompts']} prompts in "
        f"{output}; {counts['too_long']} prompts were too long. {counts['target_tokens']} tokens through the target, "
        f"{counts['seconds']:.0f} s.",
        soft_wrap=True,
        highlight=False,
    )
    say_left_out(counts["left_out"])


@app.command("reread")
def reread_command(
    labels: Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge mine`.")],
    layer: Annotated[int, typer.Option(min=1, help="How many of the target's layers are below the states to read.")],
    output: Annotated[Path, typer.Option(help="Folder for the labels with them; started again, it goes on.")],
    dtype: Annotated[str | None, typer.Option(help="By default the one that the labels were mined with.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers in a forward.")] = 4,
) -> None:
    """Write mined labels again with hidden states from midway in the target, for a judge that looks there."""
    (mining,) = mining_of([labels])
    mined = mining["dtype"] if mining["dtype"] in DTYPES else None  # otherwise what a CPU loads by default
    target, _ = load_model(mining["target"], read_dtype(dtype or mined))
    found = add_layer_states(target, labels, layer, output, batch)
    console.print(f"{len(found)} substitutions in {output}, with what enters layer {layer}.", highlight=False)


@app.command("labels")
def labels_command(
    labels: Annotated[
        list[str], typer.Argument(help="Folders written by `hf-selfjudge mine`, or datasets on the Hub made of them.")
    ],
    examples_shown: Annotated[
        int, typer.Option("--examples", min=0, help="Harmless and harmful substitutions to show in context.")
    ] = 5,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the distributions of scores to this file (.png, .svg, .pdf).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the tables to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the examples and the intervals.")] = 0,
) -> None:
    """Look at mined labels: rates, scores beside each other, substitutions in context."""
    for file in filter(None, (plot, json_file)):
        check_writable(file.parent)
    labels = folders_of(labels)
    made = mining_of(labels)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(made[0]["target"]))
    found, config = Labels.load(labels, tokenizer), HeldOutConfig(seed=seed)
    by = {name: rates(found, name, config) for name in ("category", "kind", "replaced")}
    spread = {name: distributions(found, name) for name in ("category", "replaced")}
    names, matrix = correlations(found)
    scores = predictors(found, config)
    console.print(
        f"{len(found)} substitutions ({int(found.rewritten.sum())} rewritten) of "
        f"{len(set(found.columns['prompt_id']))} prompts; {made[0]['target']} + {made[0]['draft']}. Intervals: 95 %, "
        "bootstrap over prompts.\n",
        highlight=False,
        soft_wrap=True,
    )
    for name, rows in by.items():
        console.print(rates_table(rows, name))
    for name, rows in spread.items():
        console.print(distributions_table(rows, name))
    console.print(correlations_table(names, matrix))
    console.print(predictors_table(scores))
    for harmful in (False, True):
        console.rule("harmful" if harmful else "harmless")
        for index in examples(found, harmful, examples_shown, seed):
            console.print(in_context(found, index, tokenizer), soft_wrap=True)
    if plot is not None:
        draw(found, plot)
    if json_file is not None:
        write_json(
            json_file,
            {
                "rates": by,
                "distributions": spread,
                "correlations": {"scores": names, "matrix": np.where(np.isnan(matrix), None, matrix).tolist()},
                "predictors": scores,
            },
        )


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def train(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Train a judge on mined labels and write its card: --labels FOLDERS --output_dir FOLDER; all options: --help."""
    # The parser knows `--config FILE` alone.
    arguments = [
        part for word in arguments or [] for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if arguments[-1:] == ["--config"]:
        raise ValueError("`config`: no file is named. Write `--config FILE`.")
    if "--config" in arguments:
        check_yaml(arguments[arguments.index("--config") + 1])
    train_judge(*training.make_parser(prog="hf-selfjudge train").parse_args_and_config(arguments))


@app.command("bench")
def bench_command(
    prompts: Annotated[
        str, typer.Option(help="Spec-Bench, GSM8K or chat rows: a file, or a folder or Hub id of a dataset.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for answers and results; started again, the bench goes on.")],
    pair: Pair = "qwen2.5-coder",
    dtype: Dtype = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare, with thresholds: margin=0.5,1 top-k=2 judge=0.2,0.4 judge:FOLDER=0.3 coin (thrown "
            "as often as the judge accepts) … By default every rule with three."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="quality: many answers side by side, for text and rounds; timing: one at a time.")
    ] = "quality",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    per_category: Annotated[int | None, typer.Option(min=1, help="Use only so many prompts of each category.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    system: Annotated[str | None, typer.Option(help="A system message for all prompts.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    draft_length: DraftLength = "5",
    lookup: Annotated[
        bool, typer.Option("--lookup", help="Draft by prompt lookup instead of the draft model.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="With timing: how often.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="With quality: answers under way at a time.")] = 48,
    ask: Annotated[bool, typer.Option("--ask", help="Ask the target whether answers say the same.")] = False,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="For similarity: a sentence-transformers model (folder or Hub id), such as "
            "sentence-transformers/all-MiniLM-L6-v2."
        ),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the code of answers to prompts with `tests` on this machine.")
    ] = False,
    spec_bench: Annotated[
        bool, typer.Option("--spec-bench", help="With timing: also write the answers as Spec-Bench does.")
    ] = False,
) -> None:
    """What each rule buys, and what it costs: speed and quality of many decodings of the same prompts."""
    drafts = LOOKUP if lookup else DRAFT_MODEL
    shipped = str(shipped_judge(pair, drafts)) if (pair, drafts) in SHIPPED else None
    rules = rule or [*DEFAULT_RULES, *(["judge=0.2,0.35,0.5", COIN] if shipped else [])]
    settings = parse_settings([r for r in rules if rule or not (lookup and needs_draft(r))], shipped, lookup)
    length = read_length(draft_length)
    config = BenchConfig(mode, max_new_tokens, length, lookup, repeats, at_once)
    if spec_bench and mode != "timing":
        raise ValueError("`spec-bench` files have the seconds of each answer. Ask for them with `mode` timing.")
    check_writable(output)
    questions = balanced(read_prompts(prompts, limit, system=system, split=split), per_category)
    check_tasks([task_of(question, allow_code) for question in questions], embeddings)
    judges = {name: Judge.from_pretrained(name) for name in {setting.judge for setting in settings} - {None}}
    for setting in settings:
        if setting.judge is not None:
            setting.rule(judges)  # refuse unknown operating points now
    loaded = load_pair(pair, length, read_dtype(dtype), with_draft=not lookup)
    target, draft, tokenizer = loaded.target, loaded.draft, loaded.tokenizer
    context = readable(target, draft, settings)
    if context != context_of(target):
        console.print(f"`draft` answers alone: prompts have to fit into its context of {context} tokens.")
    questions, left_out = say_fitting(tokenizer, questions, context, max_new_tokens)

    lines = decode(target, draft, tokenizer, questions, settings, judges, config, output)
    local = prompts == "-" or Path(prompts).exists()
    if mode == "quality":
        scorer = Scorer(tokenizer, output, allow_code, target if ask else None, embeddings)
        found = summarise_quality(grid_of(lines, questions, settings, scorer), lines)
        judged = [setting for setting in settings if setting.judge is not None]
        found["judges"] = {family_of(setting): fingerprint(judges[setting.judge]) for setting in judged}
        found["thresholds"] = {
            setting.name: Threshold.parse(setting.rule(judges).threshold).json() for setting in judged
        }
        found["dataset"] = None if local or split != "test" else prompts.partition(":")[0]
        plot_curve(found, output / "curve.png")
    else:
        found = summarise_timing(lines, questions, settings)
    name = Path(prompts).name if local else f"{prompts} ({split})"
    name += f" ({len(left_out)} more were too long)" if left_out else ""
    found["heading"] = heading(output / f"{mode}.json", name, len(questions))
    found["left_out"] = left_out
    write_json(output / f"{mode}-results.json", {mode: found})
    text = f"{in_markdown(found['heading'])}\n\n{markdown({mode: found})}"
    write_text(output / f"{mode}-results.md", text)
    if spec_bench:
        write_spec_bench(lines, questions, tokenizer, output / "spec-bench")
    console.print(Markdown(text))
    console.print(f"Written to {output}: {mode}-results.json, {mode}-results.md.", soft_wrap=True, highlight=False)


@app.command("calibrate")
def calibrate_command(
    judge: Annotated[Path, typer.Argument(help="Folder of a judge.")],
    bench: Annotated[Path, typer.Option(help="Folder of `hf-selfjudge bench` with several thresholds of this judge.")],
) -> None:
    """Give thresholds names: the fastest that keep 99, 97 and 90 % of the quality of a bench's lossless answers. The
    second becomes the judge's own."""
    found = Judge.from_pretrained(judge)
    quality = read_quality(bench)
    family = family_in(quality, fingerprint(found), bench)
    points = operating_points(quality, family)
    if not points:
        raise ValueError(f"`bench`: no threshold in {bench} keeps 90 % of the quality. Measure lower ones.")
    made = {"prompts": quality["prompts"], "categories": quality["categories"], "heading": quality["heading"]}
    own = points.get("balanced", points["fast"])["threshold"]
    training_info = found.info.training | {"calibration": made}
    found.info = replace(found.info, threshold=own, operating_points=points, training=training_info)
    found.save_pretrained(judge)
    write_card(judge, found.info, fingerprint(found))
    for name, point in points.items():
        console.print(
            f"{name}: threshold {point['threshold']}, {point['tokens_per_round'][0]:.2f} tokens a round, retention "
            f"{point['retention'][0]:.3f}",
            highlight=False,
        )
    if missing := [name for name in OPERATING_POINTS if name not in points]:
        console.print(f"No threshold keeps enough for {', '.join(missing)}.", style="yellow")


@app.command()
def card(
    judge: Annotated[Path, typer.Argument(help="Folder of a judge.")],
    results: Annotated[Path | None, typer.Option(help="What `quickstart --json` wrote.")] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="Folder of `hf-selfjudge bench` with this judge. May be given again.")
    ] = None,
) -> None:
    """Write a judge's card anew, with results of decoding; they are kept beside it."""
    found = Judge.from_pretrained(judge)
    if results or bench:
        add_results(judge, fingerprint(found), results, bench or [])
    console.print(f"Card written to {write_card(judge, found.info, fingerprint(found))}", soft_wrap=True)


Repo = Annotated[str, typer.Argument(help="USER/NAME on the Hub.")]
Private = Annotated[bool, typer.Option("--private", help="Should the repo be made now, make it private.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
CreatePR = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
Tag = Annotated[str | None, typer.Option(help="To set on the commit.")]


@app.command()
def push(
    judge: Annotated[Path, typer.Argument(help="Folder of a judge.")],
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePR = False,
    tag: Tag = None,
) -> None:
    """Publish a judge on the Hub: weights, card, plots, results, and the code for `custom_generate`."""
    say_pushed(push_judge(judge, repo, private=private, revision=revision, create_pr=create_pr, tag=tag))


@app.command()
def pull(
    repo: Repo,
    output: Annotated[Path, typer.Argument(help="New folder for it.")],
    revision: Revision = None,
) -> None:
    """Fetch a judge from the Hub, with its card, plots and results."""
    for name in pull_judge(repo, output, revision=revision):
        console.print(f"{output}/{name}", highlight=False)


@app.command("push-labels")
def push_labels_command(
    labels: Annotated[list[Path], typer.Argument(help="Folders written by `hf-selfjudge mine`.")],
    repo: Annotated[str, typer.Option(help="USER/NAME of a dataset on the Hub.")],
    private: Private = False,
    create_pr: CreatePR = False,
) -> None:
    """Publish labels as a dataset."""
    say_pushed(push_labels(labels, repo, private=private, create_pr=create_pr))


@app.command("push-results")
def push_results_command(
    bench: Annotated[Path, typer.Argument(help="Folder of `hf-selfjudge bench`.")],
    repo: Repo,
    private: Private = False,
    create_pr: CreatePR = False,
) -> None:
    """Publish what a bench measured as a dataset: answers, tables, curve."""
    say_pushed(push_results(bench, repo, private=private, create_pr=create_pr))


@app.command("push-space")
def push_space_command(
    name: Annotated[str, typer.Argument(help="Its folder in `spaces/`.")],
    repo: Repo,
    private: Private = False,
    create_pr: CreatePR = False,
) -> None:
    """Publish one of the Spaces of this repository."""
    say_pushed(push_space(name, repo, private=private, create_pr=create_pr))


@app.command()
def demo(
    pair: Pair = "qwen2.5-coder",
    dtype: Dtype = None,
    judge: Annotated[
        str | None, typer.Option(help="A judge: folder or Hub id. By default the one shipped for the pair.")
    ] = None,
    int8_draft: Annotated[bool, typer.Option("--int8-draft", help="Draft with int8 weights (CPU).")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, help="Port to listen on.")] = 7860,
) -> None:
    """Open the playground: judged text in colours, beside lossless text, in a browser."""
    try:
        from ..demo.page import build, folder_of  # needs gradio, which is an extra
    except ModuleNotFoundError as error:
        raise ValueError("The demo needs gradio. Install it: pip install 'hf-selfjudge[demo]'.") from error
    source = judge if judge is not None else str(shipped_judge(pair))
    folder = folder_of(source)
    found = Judge.from_pretrained(folder)
    target_id, draft_id = parse_pair(pair)
    target, tokenizer = load_model(target_id, read_dtype(dtype))
    found.check_target(target, allow_other_weights=True)
    draft = load_draft(draft_id, target, tokenizer, 5, read_dtype(dtype), int8_draft)
    page = build(target, draft, tokenizer, found, source, folder)
    page.launch(server_name=host, server_port=port, ssr_mode=False)


# ---------------------------------------------------------------------------------------------------------------------


def read_length(text: str) -> int | str:
    """`--draft-length`: a number of tokens, or `auto`."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`draft-length` must be a number of tokens, 1 or more, or 'auto', got {text!r}.")
    return int(text)


def read_dtype(text: str | None) -> torch.dtype | None:
    """`--dtype`: a name of a floating-point type of torch, or nothing."""
    if text is not None and text not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {text!r}.")
    return None if text is None else DTYPES[text]


def check_yaml(path: str) -> None:
    """`--config`: a file of YAML. The parser behind it names neither the file nor the line."""
    try:
        yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"`config`: {path} is not YAML ({error}).") from error


def say_fitting(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int | None, max_new_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """Prompts that fit, and the ids of those that are too long, of which it is told."""
    kept, _, left_out = fitting(tokenizer, prompts, context, max_new_tokens)
    if not kept:
        raise none_fits(len(left_out), context, max_new_tokens)
    say_left_out(left_out)
    return kept, left_out


def say_left_out(left_out: Sequence[str]) -> None:
    """Which prompts are too long, if any is."""
    if left_out:
        console.print(counted(left_out), soft_wrap=True, highlight=False, markup=False)


def train_judge(script_args: training.ScriptArguments, training_args: JudgeConfig) -> None:
    """Train, save, write the card, say what was measured."""
    check_writable(Path(training_args.output_dir))
    measured = training.main(script_args, training_args).info.training["held_out"]
    accepted = measured["scores"]["judge"]["mean_label_among_accepted"]["0.5"]
    if this_process().is_main_process:
        console.print(
            f"Judge in {training_args.output_dir}: {measured['rows']} substitutions from {measured['prompts']} "
            f"prompts; held out, the mean label is {measured['mean_label']:.3f}, among the half that the judge "
            f"accepts {accepted:.3f}.",
            soft_wrap=True,
            highlight=False,
        )


def say_pushed(made: CommitInfo) -> None:
    """Where it can be seen."""
    console.print(f"Pushed: {made.pr_url or made.commit_url}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line; the user's mistakes end in one sentence, not in a traceback."""
    if "OMP_NUM_THREADS" not in os.environ:  # a launcher of several processes sets it
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        app()
    except (SourceError, ValueError, OSError, ImportError) as error:  # the last of what an option needs
        Console(stderr=True, soft_wrap=True).print(in_terminal(f"hf-selfjudge: {error}", "red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
