"""In: folders with a judge, labels, results or a Space. Out: a commit on the Hub. And back: a judge from its repo.

All `push_…` functions take `token`, `private`, `revision`, `create_pr` and `tag` as [`upload`] does, and raise a
`HubError` if a push was refused or interrupted; the repo is then unchanged.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
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
# Files that `pull` fetches beside the judge itself.
BESIDE = re.compile(
    r"README\.md|results\.json|[\w-]+\.png|custom_generate/(generate\.py|requirements\.txt)|\.eval_results/[\w-]+\.yaml"
)
BESIDE_LIMIT = 2**24  # bytes of one of them
TAGS = ("hf_selfjudge", "judge-decoding")


def push_judge(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """
    Publish a judge with the files of [`repo_files`].

    Raises:
        FileNotFoundError, ValueError: If the folder holds no judge, or a damaged one.
    """
    judge = Judge.from_pretrained(folder)
    return upload(repo_id, repo_files(folder, judge.info, fingerprint(judge), repo_id), "Upload judge", **options)


def pull_judge(
    repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> list[str]:
    """
    Fetch a judge with its card, plots, results and code into a new or empty folder. Other files stay in the repo, and
    no code is run.

    Returns:
        `list[str]`: The files.

    Raises:
        FileExistsError: If the folder is not empty.
        FileNotFoundError, ValueError: If there is no such repo, or it holds no judge of this version.
        HubError: If the Hub could not be reached.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"`folder`: {folder} is not empty. Choose another folder.")
    try:  # the commit first, so that all files are from the same one
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        revision, names = info.sha, [file.rfilename for file in info.siblings if BESIDE.fullmatch(file.rfilename)]
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        names = []  # loading the judge says what is wrong
    except (HTTPError, OSError) as error:
        raise HubError(f"{repo_id} could not be listed ({first_line(error)}). Try again.") from error
    judge = Judge.from_pretrained(repo_id, revision=revision, token=token)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "whole"
        judge.save_pretrained(whole)
        for name in names:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(download(repo_id, name, BESIDE_LIMIT, revision=revision, token=token), whole / name)
        if folder.is_dir():
            folder.rmdir()
        whole.rename(folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def push_labels(folders: Sequence[str | os.PathLike], repo_id: str, **options) -> CommitInfo:
    """
    Publish labels as a dataset with two configurations for each folder, `FOLDER` and `FOLDER-answers`.
    [`load_labels`] and `datasets.load_dataset` read it.

    Raises:
        FileNotFoundError, ValueError: If a folder has no labels, two folders have the same name, or the labels are of
            different pairs.
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
    pair = {model: parts[0][1][model] for model in ("target", "draft")}
    card = DatasetCard.from_template(
        DatasetCardData(license="other", configs=configs, tags=[*TAGS, "arxiv:2510.02329"]),
        template_path=str(HUB_CARDS / "labels_card.md"),
        **pair,
        parts=parts,
        repo_id=repo_id,
        on_hub=is_hub_id(pair["target"]),
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
    """
    bench = Path(bench)
    read_quality(bench)
    names = [f"{mode}{end}" for mode in ("quality", "timing") for end in (".jsonl", ".json", "-results.json")]
    paths = [path for name in (*names, "curve.png") if (path := bench / name).is_file()]
    files = {path.name: public_file(path).encode() if path.suffix == ".json" else path for path in paths}
    answers = {"config_name": "answers", "data_files": "quality.jsonl"}
    data = DatasetCardData(license="other", configs=[answers], tags=[*TAGS])
    tables = "\n\n".join(public_file(path) for path in sorted(bench.glob("*-results.md")))
    card = f"---\n{data}\n---\n\n# {in_markdown(bench.resolve().name)}\n\n![curve](curve.png)\n\n{tables}"
    files["README.md"] = card.encode()
    return upload(repo_id, files, "Upload results", repo_type="dataset", **options)


def push_space(name: str, repo_id: str, **options) -> CommitInfo:
    """
    Publish the folder `name` of `spaces/`, with a copy of this package, so that the Space runs the same code.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    known = sorted(path.parent.name for path in SPACES.glob("*/README.md"))
    if name not in known:
        raise FileNotFoundError(f"`name`: there is no Space {name!r}, only {', '.join(known)}.")
    files: dict[str, Path | bytes] = {**_files(SPACES / name)}
    package = _files(PACKAGE) | _files(HUB_CARDS, "hub_cards/") | _files(SPACES, "spaces/")
    files |= {f"{PACKAGE.name}/{path}": content for path, content in package.items()}
    needed = [line for line in requires("hf-selfjudge") if "extra ==" not in line]
    own = files.get("requirements.txt")
    files["requirements.txt"] = "\n".join([*needed, *(read_text(own).splitlines() if own else []), ""]).encode()
    return upload(repo_id, files, "Upload Space", repo_type="space", space_sdk="gradio", **options)


def _files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """The files in a folder, by their names in a repo."""
    return {
        f"{prefix}{path.relative_to(folder)}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
