"""Judges, labels, results and Spaces to repos on the Hub, and a judge back from one.

Which files the repo of a judge has is decided by `repo_files` in `judge/card.py`.
"""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import CommitInfo, DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from ..judge.card import repo_files
from ..judge.judge import Judge
from ..judge.shipped import HUB_CARDS
from ..mining.label_files import answers_beside, load_labels, read_mining, shards_of
from ..models.load import fingerprint
from ..utils.files import json_text, read_text, shipped
from ..utils.names import is_hub_id, public_mining
from ..utils.text import in_markdown, in_shell
from ..utils.transfer import HubError, download, first_line, upload
from .results import public_file, read_quality


SPACES = shipped("spaces")
PACKAGE = Path(__file__).resolve().parents[1]
# What `pull` takes beside the judge itself.
BESIDE = re.compile(
    r"README\.md|results\.json|[\w-]+\.png|custom_generate/(generate\.py|requirements\.txt)|\.eval_results/[\w-]+\.yaml"
)
BESIDE_LIMIT = 2**24  # bytes of one of them


def push_judge(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """
    Publish a judge: its weights, the card, plots and results, and the code for `generate(custom_generate=repo_id)`.

    Args:
        options: `token`, `private`, `revision`, `create_pr`, `tag` of [`upload`].

    Raises:
        FileNotFoundError, ValueError: If the folder holds no judge, or a damaged one.
        HubError: If it was refused or interrupted; what the repo holds is as it was.
    """
    judge = Judge.from_pretrained(folder)
    return upload(repo_id, repo_files(folder, judge.info, fingerprint(judge), repo_id), "Upload judge", **options)


def pull_judge(
    repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> list[str]:
    """
    Fetch a judge and what belongs to it into a new or empty folder. Files of other names are left where they are, and
    nothing is run.

    Returns:
        `list[str]`: The files.

    Raises:
        FileExistsError: If the folder holds something.
        FileNotFoundError, ValueError: If the repo is not there, or holds no judge of this version.
        HubError: If the Hub could not be reached.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"`output`: {folder} is not empty. Choose another folder.")
    api = HfApi(token=token)
    try:  # the commit first, so that everything is of one
        commit = api.model_info(repo_id, revision=revision).sha
        names = [name for name in api.list_repo_files(repo_id, revision=commit) if BESIDE.fullmatch(name)]
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        commit, names = revision, []  # loading says what is wrong
    except (HTTPError, OSError) as error:
        raise HubError(f"{repo_id} could not be listed ({first_line(error)}). Try again.") from error
    judge = Judge.from_pretrained(repo_id, revision=commit, token=token)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "whole"
        judge.save_pretrained(whole)
        for name in names:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            content = download(repo_id, name, BESIDE_LIMIT, revision=commit, token=token).read_bytes()
            (whole / name).write_bytes(content)
        if folder.is_dir():
            folder.rmdir()
        whole.rename(folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def push_labels(folders: Sequence[str | os.PathLike], repo_id: str, **options) -> CommitInfo:
    """
    Publish labels as a dataset with two configurations for each folder, `FOLDER` and `FOLDER-answers`.
    [`load_labels`] and `datasets.load_dataset` read it.

    Args:
        folders (`Sequence[str]`): Written by [`mine`], all of one pair.
        options: See [`push_judge`].

    Raises:
        FileNotFoundError, ValueError: If a folder has no labels, or they are of different pairs.
        HubError: If it was refused or interrupted; what the repo holds is as it was.
    """
    folders, files, parts, configs = [Path(folder) for folder in folders], {}, [], []
    names = [folder.resolve().name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"`labels`: two folders are named {twice[0]!r}. Rename one of them.")
    counts = Counter(load_labels(folders)["source"])
    for name, folder in zip(names, folders, strict=True):
        for shard in shards_of(folder):
            files |= {f"{name}/{path.name}": path for path in (answers_beside(shard), shard)}
        record = public_mining(read_mining(folder))
        files[f"{name}/mining.json"] = json_text(record).encode()
        parts.append((name, record, counts[str(folder)]))
        for kind, end in (("labels", ""), ("answers", "-answers")):
            path = f"{glob.escape(name)}/{kind}-*.parquet"
            configs.append({"config_name": f"{name}{end}", "data_files": path})
    data = DatasetCardData(
        license="other", configs=configs, tags=["hf_selfjudge", "judge-decoding", "arxiv:2510.02329"]
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(HUB_CARDS / "labels_card.md"),
        target=parts[0][1]["target"],
        draft=parts[0][1]["draft"],
        parts=parts,
        repo_id=repo_id,
        on_hub=is_hub_id(parts[0][1]["target"]),
        md=in_markdown,
        shell=in_shell,
    )
    files["README.md"] = str(card).encode()
    return upload(repo_id, files, "Upload labels", repo_type="dataset", **options)


def push_results(bench: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """
    Publish what a bench measured as a dataset: every answer, the tables and the curve.

    Raises:
        FileNotFoundError: If the folder holds no results.
        HubError: If it was refused or interrupted; what the repo holds is as it was.
    """
    bench = Path(bench)
    read_quality(bench)
    modes = ("quality", "timing")
    names = [*(f"{mode}.jsonl" for mode in modes), "curve.png"]
    files: dict[str, Path | bytes] = {name: bench / name for name in names if (bench / name).is_file()}
    described = [bench / f"{mode}{end}" for mode in modes for end in (".json", "-results.json")]
    files |= {path.name: public_file(path).encode() for path in described if path.is_file()}
    answers = {"config_name": "answers", "data_files": "quality.jsonl"}
    data = DatasetCardData(license="other", configs=[answers], tags=["hf_selfjudge", "judge-decoding"])
    tables = "\n\n".join(public_file(path) for path in sorted(bench.glob("*-results.md")))
    card = f"---\n{data}\n---\n\n# {in_markdown(bench.resolve().name)}\n\n![curve](curve.png)\n\n{tables}"
    files["README.md"] = card.encode()
    return upload(repo_id, files, "Upload results", repo_type="dataset", **options)


def push_space(name: str, repo_id: str, **options) -> CommitInfo:
    """
    Publish one of the Spaces, with this package as it is installed here, so that a Space runs the code that it was
    tried with, whether or not that is on the package index.

    Args:
        name (`str`): Its folder in `spaces/`.

    Raises:
        FileNotFoundError: If there is none of this name.
        HubError: If it was refused or interrupted; what the repo holds is as it was.
    """
    known = sorted(path.parent.name for path in SPACES.glob("*/README.md"))
    if name not in known:
        raise FileNotFoundError(f"`name`: there is no Space {name!r}, only {', '.join(known)}.")
    files: dict[str, Path | bytes] = dict(_files(SPACES / name))
    package = _files(PACKAGE) | _files(HUB_CARDS, "hub_cards/") | _files(SPACES, "spaces/")
    files |= {f"{PACKAGE.name}/{path}": content for path, content in package.items()}
    needed = [line for line in requires("hf-selfjudge") if "extra ==" not in line]
    own = files.get("requirements.txt")
    files["requirements.txt"] = "\n".join([*needed, *(read_text(own).splitlines() if own else []), ""]).encode()
    return upload(repo_id, files, "Upload Space", repo_type="space", space_sdk="gradio", **options)


def _files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """By the name that each is to have."""
    return {
        f"{prefix}{path.relative_to(folder)}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
