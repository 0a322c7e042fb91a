"""The files of a bench: results that are written and read again, and answers in the format of Spec-Bench."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..models.pair import LOOKUP
from ..utils.files import read_json, write_json, write_text
from ..utils.names import public_name
from ..utils.text import in_markdown
from .answers import AnswerRecord
from .tables import quality_tables, timing_tables


def write_results(folder: Path, mode: str, results: dict, prompts_name: str, left_out: Sequence[str] = ()) -> str:
    """Write `results` of [`summarise_quality`] or [`summarise_timing`] to `MODE-results.json` and `MODE-results.md`
    beside the answers. `left_out` are the ids of prompts that were too long. Returns the tables in Markdown, under a
    sentence that says what was measured."""
    prompts_name += f" ({len(left_out)} more were too long)" if left_out else ""
    results |= {"heading": heading(folder / f"{mode}.json", prompts_name, results["prompts"]), "left_out": [*left_out]}
    tables = quality_tables(results) if mode == "quality" else timing_tables(results)
    text = f"{in_markdown(results['heading'])}\n\n{tables}"
    write_json(folder / f"{mode}-results.json", {mode: results})
    write_text(folder / f"{mode}-results.md", text)
    return text


def heading(path: Path, prompts_name: str, count: int) -> str:
    """What was measured, in a sentence: `path` is the `quality.json` or `timing.json` of [`decode`], `count` is how
    many prompts there were."""
    run = read_json(path)
    draft = LOOKUP if run["draft"] is None else f"{public_name(run['draft'])} ({run['draft_dtype']})"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{public_name(run['target'])} ({run['target_dtype']}) with {draft}, {run['draft_length']} drafted tokens, "
        f"answers of at most {run['max_new_tokens']} tokens to {count} prompts of {prompts_name}; {run['machine']}; "
        f"{versions}; {time.strftime('%Y-%m-%d')}. In brackets: 95 % bootstrap intervals over prompts."
    )


def write_spec_bench(
    records: Sequence[AnswerRecord], prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the answers of mode timing in the format of Spec-Bench (https://github.com/hemingkx/Spec-Bench), a file
    for each method; repeats are `choices` of one line. Only the first turn of a question is answered."""
    folder.mkdir(parents=True, exist_ok=True)
    timestamp = time.time()
    for method in dict.fromkeys(record.method for record in records):
        rows = []
        for prompt in prompts:
            choices = [
                {
                    "index": record.repeat,
                    "turns": [tokenizer.decode(record.tokens, skip_special_tokens=True)],
                    "decoding_steps": [len(record.lengths)],
                    "new_tokens": [len(record.tokens)],
                    "wall_time": [record.seconds],
                    "accept_lengths": record.lengths,
                }
                for record in records
                if (record.method, record.prompt) == (method, prompt.id)
            ]
            row = {
                "question_id": int(prompt.id) if prompt.id.isdecimal() else prompt.id,
                "category": prompt.subcategory or prompt.category,
                "answer_id": hashlib.sha256(f"{method} {prompt.id}".encode()).hexdigest()[:22],
                "model_id": method,
                "choices": choices,
                "tstamp": timestamp,
            }
            rows.append(json.dumps(row))
        write_text(folder / f"{method.replace('/', '-').replace(' ', '-')}.jsonl", "\n".join(rows) + "\n")
