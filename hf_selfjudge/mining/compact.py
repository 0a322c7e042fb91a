"""In: a folder of labels. Out: the same labels without hidden states and without the prompts' tokens, small enough for
a repository. Prompts are found again by their ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, encode
from ..judge.features import STATES
from ..utils.files import atomic_write, read_json, write_json
from .label_files import answers_beside, load_labels, read_mining, shards_of


PROMPT = "prompt_ids"
DIGEST = "prompts_digest"  # of the prompts' tokens, in the file of counts


def compact_labels(folder: str | os.PathLike, output: str | os.PathLike) -> datasets.Dataset:
    """
    Write labels again without [`STATES`] and without the tokens of prompts, which may be long and belong to others.
    Files that are there are kept, so that new shards can be added. [`add_layer_states`] adds both again.

    Args:
        folder (`str`): Labels that [`mine`] wrote.

    Returns:
        `datasets.Dataset`: what [`load_labels`] returns for `output`.

    Raises:
        FileNotFoundError: If `folder` has no labels.
        ValueError: If `output` is `folder`, or holds labels that were mined in another way.
    """
    folder, output = Path(folder), Path(output)
    if output.resolve() == folder.resolve():
        raise ValueError(f"`output` is the folder of the labels, {folder}. Choose another one.")
    record = read_mining(folder)
    if (output / "mining.json").is_file() and read_mining(output) != record:
        raise ValueError(f"`output`: {output} has labels that were mined in another way. Choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "mining.json", record)
    for shard in shards_of(folder):
        if (output / shard.name).is_file():
            continue
        counts = read_json(shard.with_suffix(".json"))
        if DIGEST not in counts:  # a shard may be small already, in a folder that was kept and mined on
            counts[DIGEST] = _digest(pyarrow.parquet.read_table(answers_beside(shard), columns=[PROMPT]))
        write_json(output / shard.with_suffix(".json").name, counts)
        for path, columns in ((answers_beside(shard), [PROMPT]), (shard, STATES)):  # the labels make it complete
            table = pyarrow.parquet.read_table(path)
            for name in columns:
                place = table.column_names.index(name)
                table = table.set_column(place, name, pyarrow.nulls(len(table), table.schema.field(name).type))
            with atomic_write(output / path.name) as incomplete:
                pyarrow.parquet.write_table(table, incomplete, compression="zstd", compression_level=19)
    return load_labels(output)


def with_prompts(
    shard: Path, prompts: Sequence[Prompt] | None, tokenizer: PreTrainedTokenizerBase | None
) -> pyarrow.Table:
    """
    The answers of a shard ([`ANSWER_FEATURES`](label_files.py)) with the tokens of their prompts. If these are
    missing, the prompts are found by their ids.

    Raises:
        ValueError: If a prompt is missing, or its tokens are not those that the labels were mined on.
    """
    answers = pyarrow.parquet.read_table(answers_beside(shard))
    if not answers[PROMPT].null_count:
        return answers
    known = {prompt.id: prompt for prompt in prompts or ()}
    ids = answers["prompt_id"].to_pylist()
    if missing := [each for each in ids if each not in known]:
        raise ValueError(
            f"`prompts`: the labels come without the tokens of their prompts, and {len(missing)} of these are not "
            f"given, the first of them {missing[0]!r}. Give the file that they were mined on."
        )
    tokens = [encode(tokenizer, known[each].conversation, None, 0, known[each].tools)[0].tolist() for each in ids]
    column = pyarrow.array(tokens, type=answers.schema.field(PROMPT).type)
    answers = answers.set_column(answers.column_names.index(PROMPT), PROMPT, column)
    if _digest(answers) != read_json(shard.with_suffix(".json"))[DIGEST]:
        raise ValueError(
            f"`prompts` have the ids of those that {shard} was mined on, but other tokens. Give the same file, and "
            "the same version of the tokenizer."
        )
    return answers


def prompt_tokens(
    folder: str | os.PathLike, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """The tokens of the prompts of labels, by the ids of the prompts; see [`with_prompts`]."""
    found = {}
    for shard in shards_of(folder):
        answers = with_prompts(shard, prompts, tokenizer)
        found |= zip(answers["prompt_id"].to_pylist(), answers[PROMPT].to_pylist(), strict=True)
    if missing := found.keys() - {prompt.id for prompt in prompts}:
        raise ValueError(f"`prompts`: {len(missing)} of those that the labels were mined on are not given.")
    return found


def _digest(answers: pyarrow.Table) -> str:
    """Of the tokens of all prompts."""
    return hashlib.sha256(json.dumps(answers[PROMPT].to_pylist()).encode()).hexdigest()
