"""In: files to publish, or the name of a file on the Hub. Out: one commit, or the file, if it is not too large."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors


# Errors that mean that a file is missing. The first class that an error belongs to gives the message.
MISSING = {
    hub_errors.LocalEntryNotFoundError: "{0} is neither a folder nor in the cache, and the Hub is out of reach.",
    hub_errors.EntryNotFoundError: "{0} has no {1}.",
    hub_errors.RevisionNotFoundError: "{0} has no revision {2!r}.",
    hub_errors.RepositoryNotFoundError: "{0} is neither a folder nor a repo on the Hub that you may see. A private "
    "one needs a token.",
}


class HubError(OSError):
    """The Hub refused, or could not be reached."""


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    repo_type: str = "model",
    space_sdk: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> CommitInfo:
    """
    Publish files as one commit. If it is refused or interrupted, the content of the repo does not change.

    Args:
        repo_id (`str`): It is created if it does not exist.
        files (`Mapping`): For each path in the repo a file, or its content.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*): For a repo that is created.
        revision (`str`, *optional*): Branch to commit to. It is created if it does not exist.
        create_pr (`bool`): Open a pull request instead.
        tag (`str`, *optional*): Tag for the commit.

    Raises:
        ValueError: If a file or the repo's name is not valid, or there is such a tag already.
        HubError: If the Hub refused, or the connection was interrupted.
    """
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api = HfApi(token=token)
    try:
        exists = api.repo_exists(repo_id, repo_type=repo_type)
        tags = api.list_repo_refs(repo_id, repo_type=repo_type).tags if tag is not None and exists else []
    except (hub_errors.HTTPError, OSError, ValueError) as error:
        raise HubError(f"`repo_id`: {repo_id} could not be looked at ({first_line(error)}).") from error
    if tag in {ref.name for ref in tags}:
        raise ValueError(f"`tag`: {repo_id} has a tag {tag!r} already. Choose another one.")
    try:
        if not (create_pr and exists):
            api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=space_sdk, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        where = {"repo_type": repo_type, "revision": revision}
        commit = api.create_commit(repo_id, operations, commit_message=message, create_pr=create_pr, **where)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=repo_type)
    except (hub_errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: from large files
        raise HubError(
            f"`repo_id`: {repo_id} could not be written ({first_line(error)}). Log in with `hf auth login`, or pass a "
            "token that may write there."
        ) from error
    return commit


def download(
    reference: str | os.PathLike,
    name: str,
    limit: int,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """
    A file in a folder or a Hub repo.

    Args:
        reference (`str`): Folder or Hub id.
        limit (`int`): Size in bytes. A larger file is not fetched.

    Raises:
        FileNotFoundError: If there is no such folder, repo, revision or file.
        ValueError: If the file is larger than `limit`, or `reference` cannot be a Hub id.
        HubError: If the Hub could not be reached, or the file could not be stored.
    """
    if Path(reference).is_dir():
        path = Path(reference) / name
        if not path.is_file():
            raise FileNotFoundError(f"{reference} has no {name}.")
        _check_size(reference, name, path.stat().st_size, limit)
        return path
    repo_id = str(reference)
    access = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        _check_size(repo_id, name, hf_hub_download(repo_id, name, dry_run=True, **access).file_size or 0, limit)
        path = Path(hf_hub_download(repo_id, name, **access))
    except tuple(MISSING) as error:
        sentence = next(text for kind, text in MISSING.items() if isinstance(error, kind))
        raise FileNotFoundError(sentence.format(repo_id, name, revision)) from error
    except hub_errors.HFValidationError as error:
        raise ValueError(f"{repo_id} is neither a folder nor a name on the Hub ({error}).") from error
    except (hub_errors.HTTPError, OSError) as error:
        raise HubError(f"{name} of {repo_id} could not be fetched ({first_line(error)}). Try again.") from error
    _check_size(repo_id, name, path.stat().st_size, limit)
    return path


def _check_size(reference: str | os.PathLike, name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{name} of {reference} has {size:,} bytes; no such file has more than {limit:,}. It was not read."
        )


def first_line(error: Exception) -> str:
    """The first line of an error's text; the others repeat addresses."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
