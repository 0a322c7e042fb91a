"""How options become commands, and the options that several commands share.

An option is a field of a dataclass, with its help in the metadata of the field. A command is a function that takes
such dataclasses; [`as_command`] turns it into a function for typer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer

from ..data.prompts import Prompts, read_prompts
from ..mining.config import MiningConfig
from ..models.pair import Pair, load_pair
from ..utils.files import check_writable, write_json
from ..utils.processes import this_process


JudgeFolder = Annotated[Path, typer.Argument(metavar="judge", help="Folder of a judge.")]
# `load_model` takes a type, or chooses the fastest itself.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fastest": None}


def option(text: str, default: Any = MISSING, **details: Any) -> Any:
    """A field that is an option with this help. Without a default it is required. `details` are arguments of
    `typer.Option`, such as `min=1`."""
    return field(default=default, metadata={"help": text, **details})


def reuse(group: type, name: str, default: Any = MISSING) -> Any:
    """The option `name` of another dataclass, with its own default."""
    return field(default=default, metadata=group.__dataclass_fields__[name].metadata)


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass by its fields, as typer reads them. A field that several dataclasses
    have is one option, and all of them get its value."""
    hints = get_type_hints(function, include_extras=True)
    groups, parameters = {}, {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(group := hints[name]):
            groups[name], types = group, get_type_hints(group)
            parameters |= {own.name: _parameter(own, types[own.name]) for own in fields(group)}
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    def command(**values: Any) -> None:
        made = {name: group(**{own.name: values[own.name] for own in fields(group)}) for name, group in groups.items()}
        function(**made, **{name: values[name] for name in hints if name in values})

    command.__doc__, command.__signature__ = function.__doc__, inspect.Signature([*parameters.values()])
    return command


def _parameter(own: Field, hint: Any) -> inspect.Parameter:
    names = [f"--{own.name.replace('_', '-')}"] if hint is bool else []  # typer would add `--no-…`
    details = dict(own.metadata)
    if hint == int | str:  # typer takes one type only
        hint, details = str, {"parser": _number_or_text, "metavar": "<int|str>"} | details
    default = inspect.Parameter.empty if own.default is MISSING else own.default
    annotation = Annotated[hint, typer.Option(*names, **details)]
    return inspect.Parameter(own.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _number_or_text(value: int | str) -> int | str:
    return int(value) if str(value).isdecimal() else value


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    dtype: Literal["bfloat16", "float16", "float32", "fastest"] | None = option(
        "By default the type that labels were mined with, without labels the fastest: bfloat16 on a GPU or if the "
        "target is offloaded, on a CPU packed float16 with float32 arithmetic.",
        None,
    )
    offload: bool = option(
        "Keep the target's layers on disk and read them in each forward, for a target that does not fit into memory.",
        False,
    )
    device_map: str | None = option(
        "Where the target's modules are: auto, balanced, … as in `from_pretrained` of transformers.", None
    )

    def torch_dtype(self, default: str | None = None) -> torch.dtype | None:
        """The type of the weights, or the type named `default`; `None` if that is not one of them."""
        return DTYPES.get(self.dtype or default)

    @property
    def placement(self) -> str | None:
        """The `device_map` of [`load_model`]."""
        if self.offload and self.device_map is not None:
            raise ValueError("`--offload` and `--device-map` both say where the target is. Use one of the two.")
        if self.device_map is not None and (count := this_process().num_processes) > 1:
            raise ValueError(f"`--device-map` would put {count} targets on the same devices. Start one process.")
        return "disk" if self.offload else self.device_map


@dataclass(frozen=True, kw_only=True)
class PairOptions(TargetOptions):
    pair: str = option("A known pair or 'TARGET,DRAFT', each a Hub id or a folder.", "qwen2.5-coder")

    def load(
        self,
        draft_length: int | str | None = 5,
        with_draft: bool = True,
        low_bit_draft: bool = False,
        compile_draft: bool = False,
    ) -> Pair:
        """See [`load_pair`]."""
        how = low_bit_draft, compile_draft
        return load_pair(self.pair, draft_length, self.torch_dtype(), with_draft, self.placement, *how)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
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
        """Read the prompts, or the file `default` if none are given; see [`read_prompts`]."""
        if self.prompts == "-" and this_process().num_processes > 1:
            raise ValueError("`prompts`: several processes cannot share standard input. Give a file.")
        shuffle = self.seed if self.shuffle else None
        columns = {"column": self.column, "answer_column": answer_column}
        return read_prompts(
            self.prompts or default, self.limit, shuffle=shuffle, split=self.split, system=self.system, **columns
        )


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    judge: str | None = option(
        "Folder or Hub id of a judge. By default the judge shipped for the pair; `mine` by default uses none.", None
    )
    threshold: str | None = option(
        "0 (lossless) to 1, 0.03/token (for each token gained) or the name of an operating point. By default the "
        "judge's own; `quickstart` and the page of `demo` begin with the one at which it accepts about half of "
        "held-out mismatches.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    output: Path = option("Folder for the results. The command continues there if it is started again.")


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    json: Path | None = option("Write the figures to this file, too.", None)

    def __post_init__(self):
        if self.json is not None:
            check_writable(self.json.parent)

    def write(self, figures: dict) -> None:
        """Write the file if `--json` is given."""
        if self.json is not None:
            write_json(self.json, figures)
