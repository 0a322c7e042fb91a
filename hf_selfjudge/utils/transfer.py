"""Folders -> the Hub, and files from it: whole or not at all.

In: files to publish, or a name on the Hub. Out: one commit, or a file that is no larger than it may be. Knows nothing
of what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import errors as hub_errors


# What it means that a file is missing; the first kind that an error belongs to counts.
MISSING = {
    hub_errors.LocalEntryNotFoundError: "{0} is neither a folder nor in the cache, and the Hub is out of reach.",
    hub_errors.EntryNotFoundError: "{0} has no {1}.",
    hub_errors.RevisionNotFoundError: "{0} has no revision {2!r}.",
    hub_errors.RepositoryNotFoundError: "{0} is neither a folder nor a repo on the Hub that you may see. A private "
    "one needs a token.",
}


class HubError(OSError):
    """The Hub refused, or could not be reached; says what was asked and what to do."""


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
    Publish files as one commit: contents first, then the commit that names them. Until that, and if it is refused,
    what the repo holds is as it was.

    Args:
        repo_id (`str`): Made if it is not there.
        files (`Mapping`): For each path in the repo a file, or its content.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*): If the repo is made now.
        revision (`str`, *optional*): Branch to commit to, made if it is not there.
        create_pr (`bool`): Open a pull request instead.
        tag (`str`, *optional*): To set on the commit.

    Raises:
        FileNotFoundError: If one of `files` is not there.
        ValueError: If there is such a tag already.
        HubError: If it was refused or interrupted.
    """
    api = HfApi(token=token)
    if missing := [path for path in files.values() if isinstance(path, Path) and not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not there.")
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
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=repo_type)
    except (hub_errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # the last: of an upload outside of git
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
    repo_type: str = "model",
) -> Path:
    """
    A file of a folder or of a Hub repo.

    Args:
        reference (`str`): Folder or Hub id.
        name (`str`): Of the file in it.
        limit (`int`): Bytes: a larger file is not fetched.

    Raises:
        FileNotFoundError: If there is no such folder, repo, revision or file.
        ValueError: If it is larger than `limit`, or `reference` can be neither.
        HubError: If the Hub could not be reached, or the file not be stored.
    """
    if Path(reference).is_dir():
        path = Path(reference) / name
        if not path.is_file():
            raise FileNotFoundError(f"{reference} has no {name}.")
        _check_size(reference, name, path.stat().st_size, limit)
        return path
    repo_id = str(reference)
    where = {"repo_type": repo_type, "revision": revision}
    try:
        if not local_files_only:
            try:
                size = get_hf_file_metadata(hf_hub_url(repo_id, name, **where), token=token).size
                _check_size(repo_id, name, size or 0, limit)
            except tuple(MISSING):
                raise
            except (hub_errors.OfflineModeIsEnabled, hub_errors.HTTPError):
                pass  # what was fetched before may do; the size is looked at again below
        where |= {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = Path(hf_hub_download(repo_id, name, **where))
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
