"""Chat messages and tools of any shape that is in use -> what chat templates expect, or an error that names the place.

Knows nothing of files or tokens. `where` is always the place in a file, for errors.
"""

from __future__ import annotations

import json

from ..utils.files import json_object


# What chat templates know of a message.
KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
SHAREGPT = {"human": "user", "gpt": "assistant"}


def message_of(value: dict, where: str) -> dict:
    """A message with `KEYS` alone; a `ValueError` if `value` is none. Parts of text are joined. Keys without a value
    are left out, except the `content` beside `tool_calls`, which is then `None`."""
    message = {}
    if isinstance(value, dict):
        if value.get("function_call"):
            raise ValueError(
                f"{where}: a message has `function_call`, the older form, which chat templates do not know. Write it "
                "as `tool_calls`, and what the function returns as a message of the `role` tool."
            )
        if "from" in value:
            value = {"role": SHAREGPT.get(str(value["from"]), value["from"]), "content": value.get("value")}
        message = {key: value[key] for key in KEYS if value.get(key) is not None}
    calls = json_list(message.pop("tool_calls", []), "tool_calls", where)
    if "role" not in message or ("content" not in message and not calls):
        raise ValueError(
            f"{where}: expected text or chat messages with `role` and `content` (which may be null beside `tool_calls`"
            f" only), got {value!r:.200}."
        )
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_of(part, where) for part in message["content"])
    for key, content in message.items():
        if not isinstance(content, str):
            raise ValueError(f"{where}: `{key}` of a message must be text, found {content!r:.200}.")
    if calls:
        message = {"content": None, **message, "tool_calls": [_call_of(call, where) for call in calls]}
    return message


def _text_of(part: dict, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: a message may have parts of text only, found {part!r:.200}. Remove the row.")
    return part["text"]


def _call_of(call: dict, where: str) -> dict:
    """A tool call with its arguments as an object: templates write them as JSON, which would quote text once more."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: `tool_calls` must have a `function` with a `name`, found {call!r:.200}.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json_object(arguments, f"{where}: `arguments` of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: `arguments` of {function['name']} must be an object, found {arguments!r:.200}.")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def tools_of(value: str | list, where: str) -> list[dict]:
    """A row's tools as JSON schemas; a `ValueError` if `value` is no list of objects."""
    tools = json_list(value, "tools", where)
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: `tools` must be JSON schemas, found {tools!r:.200}.")
    return tools


def json_list(value: str | list, name: str, where: str) -> list:
    """The list in the column `name`, which tables of text have as JSON; a `ValueError` if it is none."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        raise ValueError(f"{where}: `{name}` must be a list, found {value!r:.200}.")
    return items
