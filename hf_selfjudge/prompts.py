"""Where prompts come from: any file or dataset, of any shape that is in use.

In: JSON lines, CSV, Parquet, a `datasets` dataset (local or on the Hub), or standard input. Out: [`Prompt`]s, read
from disk as they are needed, and the target's tokens of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .sources import SourceError


CHECKS = ("number", "tests", "text")
# What a row's prompt may be called, in this order.
COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "turns", "text")
# Spec-Bench has these categories of MT-Bench as one.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TABLES = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Prompt:
    """
    One prompt.

    Args:
        id (`str`): Unique in its file.
        text (`str`): What the user says (last).
        category (`str`): For tables; the name of the file if a row names none.
        subcategory (`str`, *optional*): What the row itself says, where `category` puts several together (MT-Bench).
        check (`str`): How two answers are compared: `"number"` (the final number), `"tests"` (code that passes
            `tests`), or `"text"`.
        messages (`list[dict]`, *optional*): The conversation, where it is more than `text`: `role` and `content`.
        tests (`str`, *optional*): Python code that is run behind the answer's and raises unless that is right. It
            calls the tests that it defines, and does not end the process (as `unittest.main()` does): that is no
            pass.
        references (`list[str]`, *optional*): Right answers, each of them enough, to score answers by. Mining does not
            look at them.
        answer (`str`, *optional*): An answer to take instead of the target's own.
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

    @property
    def said(self) -> list[dict]:
        """The conversation, `text` as its last message."""
        return self.messages or [{"role": "user", "content": self.text}]


class Prompts(Sequence[Prompt]):
    """
    Prompts on disk.

    Args:
        rows (`datasets.Dataset`): A column for each field of [`Prompt`].

    Attributes:
        fingerprint (`str`): Of the content (for a dataset: as `datasets` tells it) and of how it was read.
        options (`dict`): How it was read, where that differs from the default.
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
    """Tells one set of prompts from another."""
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
    `:config` if it has several), or `-`, standard input: JSON lines, or a plain prompt a line.

    A row has one of `messages` or `conversations` (chat), `prompt` (text or chat), `question`, `instruction` with an
    optional `input` or `instances` (self-instruct), `turns` (the first one), or `text`; and optional `id`,
    `category`, `check`, `tests`, `reference` (text, or several that are right; of `turns`, a list with one for each).
    A GSM8K answer (`#### 42`) is a reference too, and sets `check` to `"number"`.

    Args:
        limit (`int`, *optional*): Use only the first ones.
        shuffle (`int`, *optional*): Seed to shuffle with, before `limit`.
        column (`str`, *optional*): Where the prompt is, instead of the above.
        answer_column (`str`, *optional*): Where answers are that shall be taken instead of the target's own.
        system (`str`, *optional*): A system message to put first.
        split (`str`, defaults to `"train"`): Of a dataset.

    Raises:
        ValueError: If there is no prompt, or a row is none; names the row.
        SourceError: If `source` does not exist.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = str(source)
        path = Path(folder) / "standard-input.jsonl" if name == "-" else Path(source)
        if name == "-":
            with path.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
        table = None if path.is_file() and path.suffix not in TABLES else _load_table(path, name, split)
        how = {"column": column, "answer_column": answer_column, "system": system}
        # What is cached is as good as the code that made it.
        content = [_file_digest(path) if path.is_file() else table._fingerprint, _file_digest(Path(__file__))]
        fingerprint = hashlib.sha256(json.dumps([content[0], how, limit, shuffle]).encode()).hexdigest()
        try:
            rows = datasets.Dataset.from_generator(
                _normalised,
                features=datasets.Features(
                    {key: datasets.Value("string") for key in ("id", "text", "category", "check", "subcategory")}
                    | {key: datasets.Value("string") for key in ("messages", "tests", "references", "answer")}
                ),
                gen_kwargs={"path": path, "table": table, "plain": name == "-", "how": how},
                fingerprint=hashlib.sha256(json.dumps([content, how, path.stem]).encode()).hexdigest()[:32],
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    if shuffle is not None:
        rows = rows.shuffle(seed=shuffle)
    options = {**how, "limit": limit, "shuffle": shuffle, "split": None if split == "train" else split}
    options = {name: value for name, value in options.items() if value is not None}
    return Prompts(rows.select(range(min(limit or len(rows), len(rows)))), fingerprint, options)


def _from_row(row: dict) -> Prompt:
    return Prompt(**row | {name: row[name] and json.loads(row[name]) for name in ("messages", "references")})


def _load_table(path: Path, name: str, split: str) -> datasets.Dataset:
    try:
        if path.is_file():
            return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(path)
        repo, _, config = name.partition(":")
        return datasets.load_dataset(repo, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(
            f"The prompts {name} could not be read: there is no such file, and as a dataset it says "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} Give a file (JSON lines, CSV, "
            "Parquet), a folder or the Hub id of a dataset, or - for standard input."
        ) from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _normalised(path: Path, table: datasets.Dataset | None, plain: bool, how: dict) -> Iterator[dict]:
    """Rows of any shape as rows of [`Prompt`]."""
    places: dict[str, str] = {}
    for number, row in enumerate(table if table is not None else _lines(path, plain), start=1):
        if row is None:
            continue
        where = f"{path.name}:{number}"
        try:
            prompt = _prompt_row(row, where, f"{path.stem}-{number}", **how)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: no prompt of a known shape ({error}), found {str(row)[:200]}.") from error
        if prompt["id"] in places:
            raise ValueError(f"{where}: the id {prompt['id']!r} was used before, in {places[prompt['id']]}.")
        places[prompt["id"]] = where
        yield prompt
    if not places:
        raise ValueError(f"The prompts {path.name} are empty. Write one JSON object with `prompt` a line.")


def _lines(path: Path, plain: bool) -> Iterator[dict | None]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                yield None
            elif plain and not line.lstrip().startswith("{"):
                yield {"prompt": line.strip()}
            else:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path.name}:{number}: not a JSON object ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path.name}:{number}: expected a JSON object, got {type(row).__name__}.")
                yield row


def _prompt_row(
    row: dict, where: str, default_id: str, column: str | None, answer_column: str | None, system: str | None
) -> dict:
    for needed in filter(None, (column, answer_column)):
        if needed not in row:
            raise ValueError(f"{where}: has no column `{needed}`, found {sorted(row)}.")
    column = column or next((name for name in COLUMNS if row.get(name)), None)
    if column is None:
        raise ValueError(f"{where}: needs one of `{'`, `'.join(COLUMNS)}`, found {sorted(row)} (or they are empty).")
    said = row[column]
    if column == "turns":
        said = said[0]
    elif column == "instruction":
        given = row.get("input") or (row.get("instances") or [{}])[0].get("input", "")
        said = f"{said}\n\n{given}" if given else said
    messages = _messages(said, where)
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    text = messages[-1]["content"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the prompt is empty. Remove the row or give it text.")
    tests = row.get("tests")
    tests = "\n".join(tests) if isinstance(tests, list) else tests
    references = _references(row, column)
    gsm8k = any("####" in reference for reference in references)
    check = row.get("check") or ("tests" if tests else "number" if gsm8k else "text")
    if check not in CHECKS or (check == "tests" and not tests):
        raise ValueError(f"{where}: `check` must be one of {CHECKS}, 'tests' with `tests`; found {check!r}.")
    category = str(row.get("category") or "") or default_id.rpartition("-")[0]
    merged = column == "turns" and category in MT_BENCH
    return {
        "id": str(next((row[name] for name in ("id", "question_id") if row.get(name) is not None), default_id)),
        "text": text,
        "category": "mt_bench" if merged else category,
        "subcategory": category if merged else None,
        "check": check,
        "messages": json.dumps(messages) if len(messages) > 1 else None,
        "tests": tests,
        "references": json.dumps(references) if references else None,
        "answer": None if answer_column is None or row[answer_column] is None else str(row[answer_column]),
    }


def _references(row: dict, column: str) -> list[str]:
    """What is right, of the shapes that Spec-Bench and GSM8K have."""
    right = row.get("reference")
    if column == "turns" and right:
        right = right[0]
    if right is None and "####" in str(row.get("answer", "")):
        right = row["answer"]
    return [str(one) for one in (right if isinstance(right, list) else [right]) if one]


def _messages(said: str | list, where: str) -> list[dict]:
    """Chat messages up to the last one of the user."""
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    messages = []
    for message in said if isinstance(said, list) else [said]:
        try:
            if "from" in message:  # ShareGPT
                role = {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"])
                messages.append({"role": role, "content": message["value"]})
            else:
                messages.append({"role": message["role"], "content": message["content"]})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: expected text or chat messages with `role` and `content`, got {message!r}."
            ) from error
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: the conversation has no message of the user.")
    return messages


def balanced(prompts: Sequence[Prompt], per_category: int | None) -> list[Prompt]:
    """The first prompts of each category, in their order; all of them where `per_category` is `None`."""
    seen: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.category] += 1
        if per_category is None or seen[prompt.category] <= per_category:
            kept.append(prompt)
    return kept


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model can attend to; `None` if its positions have no end."""
    # Some kinds of config know it by another name, others not at all.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


class TooLong(ValueError):
    """A prompt that does not fit into the target's context."""


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], context: int | None, max_new_tokens: int
) -> torch.LongTensor:
    """
    Apply the chat template (plain text where the tokenizer has none).

    Args:
        prompt (`str` or `list[dict]`): Text, or chat messages ([`Prompt.said`]).
        context (`int`, *optional*): Tokens the target can attend to ([`context_of`]).
        max_new_tokens (`int`): Tokens to leave room for.

    Returns:
        `torch.LongTensor` of shape `(1, prompt_length)`.

    Raises:
        ValueError: If the prompt is empty, or the template does not take its messages.
        TooLong: If it does not fit into the context together with the answer.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages[-1]["content"].strip():
        raise ValueError("`prompt` is empty. Give it text.")
    if tokenizer.chat_template:
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"`prompt`: the chat template does not take these messages ({roles}): {error}") from error
    else:
        encoded = tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt")
    input_ids = encoded["input_ids"]
    if context is not None and input_ids.shape[1] + max_new_tokens > context:
        raise TooLong(
            f"`prompt` has {input_ids.shape[1]} tokens; with `max_new_tokens`={max_new_tokens} it exceeds the "
            f"target's context of {context} tokens. Shorten the prompt or lower `max_new_tokens`."
        )
    return input_ids
