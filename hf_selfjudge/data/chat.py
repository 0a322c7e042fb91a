"""Chat messages and tools in any common shape -> the shape that chat templates expect, or a `ValueError`. The caller
adds where they were found."""

from __future__ import annotations

import json

from ..utils.files import json_object


# The keys of a message that chat templates know.
KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
SHAREGPT = {"human": "user", "gpt": "assistant"}


def message_of(value: dict) -> dict:
    """A message that has only `KEYS`. Text in several parts is joined. Keys without a value are left out, except
    `content` next to `tool_calls`, which is then `None`."""
    message = {}
    if isinstance(value, dict):
        if value.get("function_call"):
            raise ValueError(
                "a message has `function_call`, an old form that chat templates do not know. Write it as `tool_calls`,"
                " and the result of the function as a message with the `role` tool."
            )
        if "from" in value:
            value = {"role": SHAREGPT.get(str(value["from"]), value["from"]), "content": value.get("value")}
        message = {key: value[key] for key in KEYS if value.get(key) is not None}
    calls = json_list(message.pop("tool_calls", []), "tool_calls")
    if "role" not in message or ("content" not in message and not calls):
        raise ValueError(
            "expected text or chat messages with `role` and `content` (which may be null only next to `tool_calls`), "
            f"got {value!r:.200}."
        )
    if isinstance(message.get("content"), list):
        message["content"] = "".join(map(_text_of, message["content"]))
    for key, content in message.items():
        if not isinstance(content, str):
            raise ValueError(f"`{key}` of a message must be text, found {content!r:.200}.")
    return {"content": None, **message, "tool_calls": [*map(_call_of, calls)]} if calls else message


def _text_of(part: dict) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"a message may have parts of text only, found {part!r:.200}. Remove the row.")
    return part["text"]


def _call_of(call: dict) -> dict:
    """A tool call whose arguments are an object, since a template would quote JSON text a second time."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"`tool_calls` must have a `function` with a `name`, found {call!r:.200}.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json_object(arguments, f"`arguments` of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"`arguments` of {function['name']} must be an object, found {arguments!r:.200}.")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def json_list(value: str | list, name: str) -> list:
    """The list in the column `name`. In tables of text it is written as JSON."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        raise ValueError(f"`{name}` must be a list, found {value!r:.200}.")
    return items
