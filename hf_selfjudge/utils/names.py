"""What models, judges and prompts are called where others read it.

In: what somebody wrote to load them by. Out: the same if it is a Hub id, else a name that tells nothing of the machine
that they are on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


# `name` or `organisation/name`, of what the Hub allows in each.
_PART = r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?"
HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_PART}/)?{_PART}", re.ASCII | re.IGNORECASE)
SEPARATOR = re.compile(r"[/\\]")
PATH = re.compile(r"[./~\\]|\w:\\")  # how one begins


def is_hub_id(reference: str) -> bool:
    """Whether this can be the id of a repo on the Hub. What [`public_name`] makes of a folder cannot."""
    return HUB_ID.fullmatch(reference) is not None


def absolute_if_folder(reference: str) -> str:
    """The absolute path of a folder, so that it is found from any working directory; a Hub id stays."""
    return os.path.abspath(reference) if reference and os.path.isdir(reference) else reference


def public_name(reference: str, here: bool = True) -> str:
    """
    What a reference is called where others read it. A Hub id stays. A folder or file becomes its last part behind
    `./`, so that nobody takes it for a Hub id: neither the path to it nor the user's name remains.

    Args:
        reference (`str`): Hub id, folder or file. Anything else, such as `"prompt lookup"`, stays.
        here (`bool`): Whether a folder of this machine that is called so is what it means. `False` for what comes from
            elsewhere.
    """
    if here and reference and os.path.isdir(reference):
        reference = os.path.abspath(reference)
    elif is_hub_id(reference) or not SEPARATOR.search(reference):
        return reference
    name = SEPARATOR.split(reference.rstrip("/\\"))[-1]
    return f"./{name if name.strip('.~') and name != Path.home().name else 'folder'}"


def public_mining(made: Mapping, here: bool = True) -> dict:
    """How labels were mined (content of `mining.json`), with a [`public_name`] in the place of every reference."""
    made = {key: value for key, value in made.items() if key != "source"}  # a folder of this machine
    for key in ("target", "draft"):
        if key in made:
            made[key] = public_name(made[key], here)
    if PATH.match(made.get("prompts_name") or ""):
        made["prompts_name"] = public_name(made["prompts_name"], here)
    if made.get("written_by"):
        judge, *told = made["written_by"].rsplit(", weights ", maxsplit=1)
        made["written_by"] = ", weights ".join([public_name(judge, here), *told])
    return made


def public_text(text: str, references: Sequence[str | None]) -> str:
    """A text, or JSON, in which these references stand, with a [`public_name`] in the place of each path."""
    for reference in references:
        if reference and SEPARATOR.search(reference) and not is_hub_id(reference):
            for written in (reference, json.dumps(reference)[1:-1]):
                text = text.replace(written, public_name(reference))
    return text
