"""How options of dataclasses become commands, and what all commands have in common."""

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, get_args, get_origin

import pytest
import typer

from hf_selfjudge.cli.app import app
from hf_selfjudge.cli.options import as_command, option, reuse


GROUP = typer.main.get_command(app)
COMMANDS = {name: command for name, command in GROUP.commands.items() if name != "train"}  # its parser is TRL's


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith((".", "…")), parameter.name


def test_the_same_option_is_the_same_in_every_command():
    seen = defaultdict(set)
    for command in COMMANDS.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                kind = parameter.type_descriptor.annotation
                kind = get_args(kind)[0] if get_origin(kind) is list else kind  # some may be repeated
                seen[tuple(parameter.opts)].add((parameter.help, kind))
    assert len(seen) > 40
    assert {name: kinds for name, kinds in seen.items() if len(kinds) > 1} == {}
    names = {name for (name,) in seen}
    assert {"--output", "--lookup", "--draft-length", "--judge", "--threshold", "--pair", "--dtype"} <= names
    assert {"--max-new-tokens", "--limit", "--json", "--seed"} <= names


def test_repositories_are_the_last_argument():
    for name, command in COMMANDS.items():
        arguments = [p.name for p in command.params if p.param_type_name == "argument"]
        if name.startswith("push"):
            assert arguments[-1] == "repo"
        assert "repo" not in {p.name for p in command.params if p.param_type_name == "option"}


@dataclass(frozen=True)
class First:
    count: int = option("How many.", 2, min=1)
    length: int | str = option("How long.", "auto")
    names: list[str] | None = option("Which.", None)


@dataclass(frozen=True, kw_only=True)
class Second:
    count: int = reuse(First, "count", 2)
    be_quiet: bool = option("Say nothing.", False)
    target: str = option("What for.")


@pytest.fixture
def call():
    """Call a command made of two dataclasses and an argument; returns what it got."""
    received = []

    def function(first: First, path: Annotated[str, typer.Argument(help="Where.")], second: Second) -> None:
        received.append((first, path, second))

    # Annotations of local names cannot be found again by typing.
    function.__annotations__ = {
        "first": First,
        "path": Annotated[str, typer.Argument(help="Where.")],
        "second": Second,
    }
    small = typer.Typer()
    small.command()(as_command(function))

    def call(*arguments):
        small(arguments, standalone_mode=False)
        return received.pop()

    return call


def test_fields_become_options(call):
    assert call("here", "--target", "x") == (First(), "here", Second(target="x"))
    first, _, second = call(
        *("here", "--target", "x", "--count", "7", "--length", "12", "--names", "a", "--names", "b", "--be-quiet")
    )
    assert first == First(7, 12, ["a", "b"])
    assert second == Second(count=7, be_quiet=True, target="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here",), "Missing parameter: target"),
        (("here", "--target", "x", "--count", "0"), "greater than or equal to 1"),
        (("here", "--target", "x", "--no-be-quiet"), "--no-be-quiet"),
    ],
)
def test_options_are_checked(call, arguments, message):
    with pytest.raises(Exception, match=message):
        call(*arguments)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hf_selfjudge", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in GROUP.commands)
