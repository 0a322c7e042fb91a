"""`push`, `push-labels`, `push-results`, `push-space` and `pull`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import CommitInfo

from ..hub.publish import pull_judge, push_judge, push_labels, push_results, push_space
from .console import say
from .options import JudgeFolder, option


LabelsFolders = Annotated[list[Path], typer.Argument(help="Folders written by `hf-selfjudge mine`.")]
BenchFolder = Annotated[Path, typer.Argument(help="Folder written by `hf-selfjudge bench`.")]
SpaceFolder = Annotated[str, typer.Argument(help="Folder of the Space in `spaces/`.")]
Repo = Annotated[str, typer.Argument(help="USER/NAME on the Hub.")]


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    private: bool = option("Make the repository private, if it does not exist yet.", False)
    create_pr: bool = option("Open a pull request instead.", False)
    tag: str | None = option("Tag to set on the commit.", None)


def push_command(judge: JudgeFolder, repo: Repo, options: PushOptions) -> None:
    """Publish a judge: weights, card, plots, results, and the code for `custom_generate`."""
    _say_pushed(push_judge(judge, repo, **asdict(options)))


def push_labels_command(labels: LabelsFolders, repo: Repo, options: PushOptions) -> None:
    """Publish labels as a dataset."""
    _say_pushed(push_labels(labels, repo, **asdict(options)))


def push_results_command(bench: BenchFolder, repo: Repo, options: PushOptions) -> None:
    """Publish the results of a bench as a dataset: answers, tables, curve."""
    _say_pushed(push_results(bench, repo, **asdict(options)))


def push_space_command(name: SpaceFolder, repo: Repo, options: PushOptions) -> None:
    """Publish one of the Spaces of this package."""
    _say_pushed(push_space(name, repo, **asdict(options)))


def pull_command(
    repo: Repo,
    folder: Annotated[Path, typer.Argument(help="New folder for the judge.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Fetch a judge from the Hub, with its card, plots and results."""
    for name in pull_judge(repo, folder, revision=revision):
        say(f"{folder}/{name}")


def _say_pushed(commit: CommitInfo) -> None:
    say(f"Pushed: {commit.pr_url or commit.commit_url}")
