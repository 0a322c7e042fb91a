"""In: JSON lines, CSV, Parquet, a `datasets` dataset (local or on the Hub), or standard input. Out: [`Prompt`]s, read
from disk as they are needed, and their tokens.
"""

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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..models.wheels import SourceError
from ..utils import files
from ..utils.files import is_text
from . import chat, rows
from .chat import message_of
from .rows import normalised


TABLES = {".parquet": "parquet", ".arrow": "arrow"}
LISTED = 5  # ids of prompts that are left out; more are only counted


@dataclass(frozen=True)
class Prompt:
    """
    One prompt.

    Args:
        id (`str`): Unique in its file.
        text (`str`): The user's (last) message.
        category (`str`): For tables; the name of the file if a row names none.
        check (`str`): How answers are checked: `"number"` (the final number), `"tests"` (code that passes `tests`), or
            `"text"`.
        subcategory (`str`, *optional*): The row's own category, where `category` joins several (MT-Bench).
        messages (`list[dict]`, *optional*): The conversation, where it is more than `text`: `role` and `content`, and
            of tools `tool_calls`, `tool_call_id` and `name`.
        tests (`str`, *optional*): Python code that runs after the answer's and raises unless that is right. It must
            call the tests that it defines, and must not end the process (as `unittest.main()` does): that is a
            failure.
        references (`list[str]`, *optional*): Right answers, each of them enough, to score answers by. Mining does not
            look at them.
        answer (`str`, *optional*): An answer to use instead of the target's own.
        tools (`list[dict]`, *optional*): Tools for the chat template, as JSON schemas.
    """

    id: str
    text: str
    category: str = "-"
    check: str = "text"
    subcategory: str | None = None
    messages: list[dict] | None = None
    tests: str | None = None
    references: list[str] | None = None
    answer: str | None = None
    tools: list[dict] | None = None

    @property
    def said(self) -> list[dict]:
        """The conversation, with `text` as its last message."""
        return self.messages or [{"role": "user", "content": self.text}]


class Prompts(Sequence[Prompt]):
    """
    Prompts on disk.

    Args:
        rows (`datasets.Dataset`): A column for each field of [`Prompt`].
        fingerprint (`str`): Digest of the content and of the options it was read with.
        options (`dict`): The options it was read with, where they differ from the defaults.
    """

    def __init__(self, rows: datasets.Dataset, fingerprint: str, options: dict):
        self.rows, self.fingerprint, self.options = rows, fingerprint, options

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [_from_row(row) for row in self.rows.select(range(len(self))[index])]
        return _from_row(self.rows[index])


def fingerprint_of(prompts: Sequence[Prompt]) -> str:
    """A digest that differs between sets of prompts."""
    if isinstance(prompts, Prompts):
        return prompts.fingerprint
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
    optional `input` or `instances` (self-instruct), `turns` (the first one), or `text`; and optional `id`,
    `category`, `check`, `tests`, `reference` (text, or several that are right; of `turns`, a list with one for each).
    A GSM8K answer (`#### 42`) is a reference too, and sets `check` to `"number"`. Chat may have `tool_calls`, and the
    row `tools`, which go to the chat template; in tables, null inside an object counts as missing.

    Args:
        source (`str` or `os.PathLike`): A file, a folder, a Hub id, or `-`.
        limit (`int`, *optional*): Use only the first ones.
        shuffle (`int`, *optional*): Seed to shuffle with, before `limit`.
        column (`str`, *optional*): Column of the prompt, instead of the above.
        answer_column (`str`, *optional*): Column of answers to use instead of the target's own.
        system (`str`, *optional*): A system message to put first.
        split (`str`, defaults to `"train"`): Split of a dataset.

    Raises:
        ValueError: If there is no prompt, a row is none, or something is not UTF-8; names the row.
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
        content = [_file_digest(path) if path.is_file() else table._fingerprint]
        # Rows that another version of this code cached are not used.
        content += [_file_digest(Path(code)) for code in (__file__, rows.__file__, chat.__file__, files.__file__)]
        fingerprint = hashlib.sha256(json.dumps([content[0], row_options, limit, shuffle]).encode()).hexdigest()
        try:
            prompts = datasets.Dataset.from_generator(
                normalised,
                features=datasets.Features({field.name: datasets.Value("string") for field in fields(Prompt)}),
                gen_kwargs={"path": path, "table": table, "plain": name == "-", "reading_options": row_options},
                fingerprint=hashlib.sha256(json.dumps([content, row_options, path.stem]).encode()).hexdigest()[:32],
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    if shuffle is not None:
        prompts = prompts.shuffle(seed=shuffle)
    options = {**row_options, "limit": limit, "shuffle": shuffle, "split": None if split == "train" else split}
    options = {name: value for name, value in options.items() if value is not None}
    return Prompts(prompts.select(range(min(limit or len(prompts), len(prompts)))), fingerprint, options)


def _from_row(row: dict) -> Prompt:
    return Prompt(**row | {name: row[name] and json.loads(row[name]) for name in ("messages", "tools", "references")})


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


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def balanced(prompts: Sequence[Prompt], per_category: int | None) -> list[Prompt]:
    """The first prompts of each category, in their order; all of them where `per_category` is `None`."""
    ranks: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    ranked = ((prompt, next(ranks[prompt.category])) for prompt in prompts)
    return [prompt for prompt, rank in ranked if per_category is None or rank < per_category]


class TooLong(ValueError):
    """A prompt does not fit into the context, or none of several does."""


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
        prompt (`str` or `list[dict]`): Text, or chat messages ([`Prompt.said`]).
        context (`int`, *optional*): Tokens that the target can attend to ([`context_of`]).
        max_new_tokens (`int`): Tokens to leave room for.
        tools (`list[dict]`, *optional*): See [`Prompt`].

    Raises:
        ValueError: If the prompt is empty or not text, or the template does not take its messages.
        TooLong: If it does not fit into the context together with the answer.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [message_of(message, "`prompt`") for message in messages]
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
    except (TemplateError, TypeError, ValueError) as error:  # the last two: from operations within a template
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"`prompt`: the chat template does not take these messages ({roles}): {error}") from error


class Fitting(NamedTuple):
    """Prompts that fit into a context, their tokens (`(1, prompt_length)` each), and the ids of those too long."""

    prompts: list[Prompt]
    tokens: list[torch.LongTensor]
    left_out: list[str]


def fitting(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    context: int | None,
    max_new_tokens: int,
    may_be_empty: bool = False,
) -> Fitting:
    """[`encode`] many prompts, and leave out those that are too long. The error names a prompt that cannot be encoded
    at all; [`TooLong`] if none fits, unless the result `may_be_empty`."""
    fit = Fitting([], [], [])
    for prompt in prompts:
        try:
            fit.tokens.append(encode(tokenizer, prompt.said, context, max_new_tokens, prompt.tools))
            fit.prompts.append(prompt)
        except TooLong:
            fit.left_out.append(prompt.id)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
    if not fit.prompts and not may_be_empty:
        raise TooLong(
            f"`prompts`: all {len(prompts)} are too long: with `max_new_tokens`={max_new_tokens} each exceeds the "
            f"context of {context} tokens. Shorten them or lower `max_new_tokens`."
        )
    return fit


def describe_left_out(left_out: Sequence[str]) -> str:
    """How many prompts were left out, and the ids of the first ones."""
    ids = ", ".join(left_out[:LISTED]) + (f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else "")
    return f"{len(left_out)} prompt{'s' * (len(left_out) != 1)} too long and left out: {ids}."
