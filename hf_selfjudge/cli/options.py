"""How options become commands, and the options that several commands share.

Options are fields of dataclasses. Each is written once, with its help, in the metadata of its field. A command is a
function that takes such dataclasses; [`as_command`] makes of it what typer needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from transformers import PreTrainedModel

from ..data.prompts import Prompts, read_prompts
from ..mining.config import MiningConfig
from ..models.pair import Pair, load_draft, load_pair, parse_pair
from ..utils.files import check_writable, write_json


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Positional arguments.
JudgeFolder = Annotated[Path, typer.Argument(metavar="judge", help="Folder of a judge.")]
LabelsFolders = Annotated[list[Path], typer.Argument(help="Folders written by `hf-selfjudge mine`.")]
BenchFolder = Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge bench`.")]
Repo = Annotated[str, typer.Argument(help="USER/NAME on the Hub.")]


def option(text: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is an option with this help. Without a default it must be given. `details` are those of
    `typer.Option`, such as `min=1`."""
    return field(default=default, metadata={"help": text, **details})


def reuse(group: type, name: str, default: Any = MISSING) -> Any:
    """The option `name` of another dataclass, with a default of its own."""
    return field(default=default, metadata=group.__dataclass_fields__[name].metadata)


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function that takes dataclasses into one that takes their fields, for typer to make a command of. A field
    that several of them have is one option, and all get its value. Other parameters stay as they are."""
    hints, own_parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    groups = {name: hints[name] for name in own_parameters if is_dataclass(hints[name])}
    parameters = {}
    for name, parameter in own_parameters.items():
        if name in groups:
            types = get_type_hints(groups[name])
            parameters |= {own.name: _parameter(own, types[own.name]) for own in fields(groups[name])}
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    def command(**values: Any) -> None:
        arguments = {name: values[name] for name in own_parameters if name not in groups}
        for name, group in groups.items():
            arguments[name] = group(**{own.name: values[own.name] for own in fields(group)})
        function(**arguments)

    command.__doc__, command.__signature__ = function.__doc__, inspect.Signature([*parameters.values()])
    return command


def _parameter(own: Field, hint: Any) -> inspect.Parameter:
    """A field as a keyword-only parameter in the form that typer reads."""
    names = [f"--{own.name.replace('_', '-')}"] if hint is bool else []  # typer would add `--no-…`
    details = dict(own.metadata)
    if hint == int | str:
        hint, details = str, {"parser": _number_or_text, "metavar": "<int|str>"} | details
    default = inspect.Parameter.empty if own.default is MISSING else own.default
    annotation = Annotated[hint, typer.Option(*names, **details)]
    return inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_or_text(value: int | str) -> int | str:
    return int(value) if str(value).isdecimal() else value


@dataclass(frozen=True, kw_only=True)
class DtypeOptions:
    """The type of a model's weights."""

    dtype: str | None = option(
        "bfloat16, float16 or float32. By default the type that labels were mined with; without labels bfloat16 on a "
        "GPU, and on a CPU what decodes fastest.",
        None,
    )

    def torch_dtype(self, default: str | None = None) -> torch.dtype | None:
        """The type by its name, or else by the name `default`; a `ValueError` if it is none of the three."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        return DTYPES.get(self.dtype or default)


@dataclass(frozen=True, kw_only=True)
class PairOptions(DtypeOptions):
    """A target and its draft."""

    pair: str = option("A known pair or 'TARGET,DRAFT', each a Hub id or a folder.", "qwen2.5-coder")

    def load(self, draft_length: int | str = 5, with_draft: bool = True) -> Pair:
        """See [`load_pair`]."""
        return load_pair(self.pair, draft_length, self.torch_dtype(), with_draft)


@dataclass(frozen=True, kw_only=True)
class Int8Options(PairOptions):
    """A pair whose draft may have int8 weights."""

    int8_draft: bool = option("Use a draft with int8 weights (CPU); `quickstart` also uses one without.", False)

    def load_int8_draft(self, pair: Pair, draft_length: int | str = 5) -> PreTrainedModel:
        """The draft with int8 weights, for a pair that is loaded; see [`load_draft`]."""
        return load_draft(parse_pair(self.pair)[1], pair.target, pair.tokenizer, draft_length, int8=True)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Which prompts, and how they are read."""

    prompts: str | None = option(
        "JSON lines, CSV or Parquet; a folder or Hub id of a dataset; or - for standard input. `quickstart` has eight "
        "prompts of its own."
    )
    limit: int | None = option("Use only the first prompts.", None, min=1)
    shuffle: bool = option("Shuffle the prompts first, with --seed.", False)
    seed: int = reuse(MiningConfig, "seed", 0)
    split: str = option("Split of a dataset.", "train")
    column: str | None = option("Column that holds the prompts, if it is not found without this.", None)
    system: str | None = option("A system message for all prompts.", None)

    def read(self, answer_column: str | None = None, default: Path | None = None) -> Prompts:
        """Read them, or where none are given the file `default`; see [`read_prompts`]."""
        reading = {"column": self.column, "answer_column": answer_column, "system": self.system, "split": self.split}
        shuffle = self.seed if self.shuffle else None
        return read_prompts(self.prompts or default, self.limit, shuffle=shuffle, **reading)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge and its threshold."""

    judge: str | None = option(
        "Folder or Hub id of a judge. By default the judge shipped for the pair; `mine` by default uses none.", None
    )
    threshold: str | None = option(
        "0 (lossless) to 1, 0.03/token (for each token gained) or the name of an operating point. By default the "
        "judge's own.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a command writes."""

    output: Path = option("Folder for the results. Started again, the command goes on there.")


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """Figures for other programs."""

    json: Path | None = option("Write the figures to this file, too.", None)

    def __post_init__(self):
        if self.json is not None:
            check_writable(self.json.parent)

    def write(self, figures: dict) -> None:
        """Write the file, if one was given."""
        if self.json is not None:
            write_json(self.json, figures)
