"""Names of models, judges and prompts that can be published. In: a Hub id or a path. Out: the Hub id, or a name that
says nothing about the machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


# `name` or `organisation/name`, with the characters that the Hub allows.
_PART = r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_PART}/)?{_PART}", re.ASCII | re.IGNORECASE)
SEPARATOR = re.compile(r"[/\\]")
SNAPSHOT = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]\w+[/\\]?$")  # in the cache of the Hub
PATH = re.compile(r"[./~\\]|\w:\\")  # the beginning of a path


def is_hub_id(reference: str) -> bool:
    """Whether this can be the id of a repo on the Hub. The [`public_name`] of a folder cannot."""
    return HUB_ID.fullmatch(reference) is not None


def absolute_if_folder(reference: str) -> str:
    """The absolute path of a folder, which is valid in any working directory; a Hub id stays."""
    return os.path.abspath(reference) if reference and os.path.isdir(reference) else reference


def public_name(reference: str, here: bool = True) -> str:
    """
    The name of a model, judge or file for publication. The last part of a path is kept, after `./`, so that it cannot
    be taken for a Hub id; the rest of the path, and the name of the user, are removed. A snapshot in the cache of the
    Hub has the id of its repo.

    Args:
        reference (`str`): Hub id, folder or file. Anything else, such as `"prompt lookup"`, stays.
        here (`bool`): Whether a folder with this name on this machine is meant. `False` if the reference comes from
            another machine.
    """
    if (snapshot := SNAPSHOT.search(reference)) and is_hub_id(name := snapshot[1].replace("--", "/", 1)):
        return name
    if here and reference and os.path.isdir(reference):
        reference = os.path.abspath(reference)
    elif is_hub_id(reference) or not SEPARATOR.search(reference):
        return reference
    name = SEPARATOR.split(reference.rstrip("/\\"))[-1]
    return f"./{name if name.strip('.~') and name != Path.home().name else 'folder'}"


def public_mining(made: Mapping, here: bool = True) -> dict:
    """A record of how labels were mined (`mining.json`), with the [`public_name`] of every model, judge and file."""
    made = {key: value for key, value in made.items() if key != "source"}  # a folder of this machine
    for key in ("target", "draft"):
        if key in made:
            made[key] = public_name(made[key], here)
    if PATH.match(made.get("prompts_name") or ""):
        made["prompts_name"] = public_name(made["prompts_name"], here)
    if made.get("written_by"):
        judge, *weights = made["written_by"].rsplit(", weights ", maxsplit=1)
        made["written_by"] = ", weights ".join([public_name(judge, here), *weights])
    return made


def public_text(text: str, references: Sequence[str | None]) -> str:
    """A text, or JSON, in which each path among `references` is replaced by its [`public_name`]."""
    for reference in references:
        if reference and SEPARATOR.search(reference) and not is_hub_id(reference):
            for written in (reference, json.dumps(reference)[1:-1]):
                text = text.replace(written, public_name(reference))
    return text
