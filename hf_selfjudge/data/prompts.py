"""In: JSON lines, CSV, Parquet, a `datasets` dataset (local or on the Hub), or standard input. Out: [`Prompt`]s and
their tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..models.wheels import SourceError
from ..utils.files import is_text
from .chat import message_of
from .rows import Prompt, prompts_of


TABLES = {".parquet": "parquet", ".arrow": "arrow"}
LISTED = 5  # ids of prompts that are left out; more are only counted


class Prompts(list[Prompt]):
    """Prompts, and the `options` that they were read with, if these differ from the defaults."""

    options: dict


def fingerprint_of(prompts: Sequence[Prompt]) -> str:
    """A digest that differs between sets of prompts."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


def read_prompts(
    source: str | os.PathLike,
    limit: int | None = None,
    *,
    shuffle: int | None = None,
    column: str | None = None,
    answer_column: str | None = None,
    system: str | None = None,
    split: str = "train",
) -> Prompts:
    """
    Read prompts from a file (JSON lines, CSV, Parquet, Arrow), a `datasets` dataset (a folder or a Hub id, with
    `:config` if it has several), or `-`, standard input: JSON lines, or a plain prompt on each line.

    A row has one of `messages` or `conversations` (chat), `prompt` (text or chat), `question`, `instruction` with an
    optional `input` or `instances` (self-instruct), `turns` (the first one is used), or `text`. It may also have `id`,
    `category`, `check`, `tests`, and `reference` (one right answer or several; with `turns`, a list with one for each
    turn). A GSM8K answer (`#### 42`) is a reference too, and sets `check` to `"number"`. Messages may have
    `tool_calls`, and the row `tools`, for the chat template. Null inside an object of a table counts as missing.

    Args:
        limit (`int`, *optional*): Use only the first prompts.
        shuffle (`int`, *optional*): Seed to shuffle with, before `limit`.
        column (`str`, *optional*): Column of the prompt, instead of the above.
        answer_column (`str`, *optional*): Column of answers to use instead of the target's own.
        system (`str`, *optional*): A system message to put first.

    Raises:
        ValueError: If there is no prompt, a row is not one, or something is not UTF-8. It names the row.
        SourceError: If `source` does not exist.
    """
    row_options = {"column": column, "answer_column": answer_column, "system": system}
    for option, value in {"source": str(source), **row_options}.items():
        if value is not None and not is_text(value):
            raise ValueError(f"`{option}` {value!r} is not UTF-8 text. Write it in UTF-8.")
    with tempfile.TemporaryDirectory() as folder:
        name, path = str(source), Path(source)
        if name == "-":
            path = Path(folder) / "standard-input.jsonl"
            with path.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        table = None if path.is_file() and path.suffix.lower() not in TABLES else _load_table(path, name, split)
        rows = prompts_of(path, table, plain=name == "-", **row_options)
        if shuffle is None:
            prompts = Prompts(itertools.islice(rows, limit))
        else:
            every = list(rows)
            prompts = Prompts(every[i] for i in np.random.default_rng(shuffle).permutation(len(every))[:limit])
    options = {**row_options, "limit": limit, "shuffle": shuffle, "split": None if split == "train" else split}
    prompts.options = {name: value for name, value in options.items() if value is not None}
    return prompts


def _load_table(path: Path, name: str, split: str) -> datasets.Dataset:
    try:
        if path.is_file():
            return datasets.load_dataset(TABLES[path.suffix.lower()], data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(path)
        repo, _, config = name.partition(":")
        return datasets.load_dataset(repo, config or None, split=split)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise SourceError(
            f"The prompts {name} could not be read: {'' if path.is_file() else 'there is no such file, and '}"
            f"as a dataset it says {str(cause).splitlines()[0] if str(cause) else type(cause).__name__} "
            "Give a file (JSON lines, CSV, Parquet), a folder or the Hub id of a dataset, or - for standard input."
        ) from error


def balanced(prompts: Sequence[Prompt], per_category: int | None) -> list[Prompt]:
    """The first prompts of each category, in their order; all of them where `per_category` is `None`."""
    ranks: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    ranked = ((prompt, next(ranks[prompt.category])) for prompt in prompts)
    return [prompt for prompt, rank in ranked if per_category is None or rank < per_category]


class TooLong(ValueError):
    """A prompt does not fit into the context, or none of several prompts does."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    context: int | None,
    max_new_tokens: int,
    tools: list[dict] | None = None,
) -> torch.LongTensor:
    """
    The tokens of a prompt, of shape `(1, prompt_length)`, in the chat template if the tokenizer has one.

    Args:
        prompt (`str` or `list[dict]`): Text, or chat messages ([`Prompt.conversation`]).
        context (`int`, *optional*): Tokens that the target can attend to ([`context_of`]).
        max_new_tokens (`int`): Tokens to leave room for.

    Raises:
        ValueError: If the prompt is empty or not text, or the template does not take its messages.
        TooLong: If it does not fit into the context together with the answer.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        messages = [message_of(message) for message in messages]
    except ValueError as error:
        raise ValueError(f"`prompt`: {error}") from error
    if not messages or not (messages[-1]["content"] or "").strip():
        raise ValueError("`prompt` is empty. Give it text.")
    if not is_text(json.dumps(messages, ensure_ascii=False, default=str)):
        raise ValueError("`prompt` has half of a surrogate pair (such as \\ud800), which is no character. Remove it.")
    input_ids = _apply_template(tokenizer, messages, tools)
    if context is not None and input_ids.shape[1] + max_new_tokens > context:
        raise TooLong(
            f"`prompt` has {input_ids.shape[1]} tokens; with `max_new_tokens`={max_new_tokens} it exceeds the "
            f"target's context of {context} tokens. Shorten the prompt or lower `max_new_tokens`."
        )
    return input_ids


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None
) -> torch.LongTensor:
    needed = {"tools": bool(tools), "tool_calls": any("tool_calls" in message for message in messages)}
    template = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template else ""
    if missing := [name for name, is_needed in needed.items() if is_needed and name not in template]:
        raise ValueError(
            f"`prompt` has `{missing[0]}`, which the tokenizer's chat template does not know. Use another tokenizer "
            "or remove the prompt."
        )
    if not template:
        return tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt")["input_ids"]
    try:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return tokenizer.apply_chat_template(messages, tools=tools, **options)["input_ids"]
    except (TemplateError, TypeError, ValueError) as error:  # the last two come from operations in a template
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"`prompt`: the chat template does not take these messages ({roles}): {error}") from error


def fitting(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    context: int | None,
    max_new_tokens: int,
    may_be_empty: bool = False,
) -> tuple[list[Prompt], list[torch.LongTensor], list[str]]:
    """
    The prompts that fit into the context, the tokens of each (see [`encode`]), and the ids of prompts that are too
    long.

    Raises:
        ValueError: If a prompt cannot be encoded. It names the prompt.
        TooLong: If no prompt fits, unless the result `may_be_empty`.
    """
    kept, tokens, left_out = [], [], []
    for prompt in prompts:
        try:
            tokens.append(encode(tokenizer, prompt.conversation, context, max_new_tokens, prompt.tools))
            kept.append(prompt)
        except TooLong:
            left_out.append(prompt.id)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
    if not kept and not may_be_empty:
        raise TooLong(
            f"`prompts`: all {len(prompts)} are too long: with `max_new_tokens`={max_new_tokens} each exceeds the "
            f"context of {context} tokens. Shorten them or lower `max_new_tokens`."
        )
    return kept, tokens, left_out


def describe_left_out(left_out: Sequence[str]) -> str:
    """How many prompts were left out, and the ids of the first ones."""
    ids = ", ".join(left_out[:LISTED]) + (f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else "")
    return f"{len(left_out)} prompt{'s' * (len(left_out) != 1)} too long and left out: {ids}."
