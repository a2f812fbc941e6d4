"""Converts records of common layouts to chat turns, ending before the assistant's answer, and tools.

Turns keep all their fields. A record that cannot be a prompt raises `Unusable`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]

TURNS = ("messages", "conversations", "conversation")
TEXTS = ("prompt", "question", "problem", "query", "instruction", "input")
COLUMNS = (*TURNS, *TEXTS, "chosen")
ANSWERS = ("answer", "response", "output", "completion", "solution", "chosen")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
PROMPTING = ("user", "tool", "function", "ipython", "observation")
"""Roles that the assistant answers, including tools."""
SYSTEM = ("system", "developer")
CALLS = ("function_call", "tool_call")
ROLES = {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "system": "system",
    "tool": "tool",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Role names found in data sets, in lower case; other names are kept."""
SHAREGPT_ROLES = ROLES | {"observation": "tool", "function": "tool"}


class Unusable(Exception):
    """A record that cannot be a prompt. The message completes the sentence "N records ..."."""


@dataclass(frozen=True)
class Conversation:
    turns: list[Turn]
    tools: list[dict[str, Any]]


def conversation(record: dict[str, Any], system_prompt: str = "") -> Conversation:
    """Return the turns up to the last non-assistant message, and the tools.

    The prompt is the first non-empty one of COLUMNS. The system message is a turn of the record, else its
    `system` (or `system_prompt`) column, else the argument `system_prompt`. Errors: `Unusable`.
    """
    for name in MEDIA:
        if record.get(name):
            raise Unusable(f"with {name} (only text is read)")
    name = next((each for each in COLUMNS if _is_filled(record.get(each))), "")
    if not name:
        is_known = any(each in record for each in COLUMNS)
        raise Unusable("with an empty prompt" if is_known else "without a column that holds a prompt")
    turns = _before_the_answer(_turns(name, record))
    system = _system(record) or system_prompt
    if system and not any(turn["role"] in SYSTEM for turn in turns):
        turns = [{"role": "system", "content": system}, *turns]
    return Conversation(turns, _tools(record))


def answer_of(record: dict[str, Any]) -> str:
    """Text of the answer that the record holds beside its prompt; "" if there is none, or it is not text."""
    names = (each for each in (*TURNS, *ANSWERS) if isinstance(record.get(each), str | list))
    name = next((each for each in names if record[each]), "")
    if not name:
        return ""
    value = record[name]
    try:
        if isinstance(value, str) and name not in TURNS:
            return value
        last = _turns(name, record)[-1]
    except (Unusable, IndexError):
        return ""
    content = _joined(last.get("content"))
    return content if last["role"] == "assistant" and isinstance(content, str) else ""


def plain(turns: list[Turn]) -> list[Turn]:
    """Join text parts and replace missing contents by "", for templates that accept only text."""
    return [turn | {"content": _joined(turn.get("content"))} for turn in turns]


def _joined(content: Any) -> Any:
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return "" if content is None else content


def _is_text(part: Any) -> bool:
    if not isinstance(part, dict):
        return isinstance(part, str)
    return isinstance(part.get("text"), str) and part.get("type") in (
        None,
        "text",
        "input_text",
        "output_text",
    )


def _is_filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _before_the_answer(turns: list[Turn]) -> list[Turn]:
    if not any(turn["role"] == "user" for turn in turns):
        raise Unusable("without a user turn")
    *_, asked = (turn for turn in turns if turn["role"] in PROMPTING)
    if asked["role"] == "user" and not _joined(asked.get("content")).strip():
        raise Unusable("with an empty prompt")
    last = max(i for i, turn in enumerate(turns) if turn["role"] in (*PROMPTING, *SYSTEM))
    return turns[: last + 1]


# --- columns ------------------------------------------------------------------------------------------------


def _turns(name: str, record: dict[str, Any]) -> list[Turn]:
    value = record[name]
    if isinstance(value, str) and name in TURNS:
        value = _from_json(value, f"whose {name} are text, but not JSON")
    if isinstance(value, str):
        if re.match(r"\s*Human:.*\n\nAssistant:", value, re.DOTALL):
            return _dialogue(value)
        if name == "chosen":
            raise Unusable("with an answer, but no prompt")
        return _instruction(value, record) if name == "instruction" else [{"role": "user", "content": value}]
    value = _rows(value)
    if not isinstance(value, list):
        raise Unusable(f"whose {name} is {type(value).__name__}, not text or turns")
    return [_turn(each) for each in value]


def _instruction(text: str, record: dict[str, Any]) -> list[Turn]:
    """Alpaca and Dolly: the pairs of `history`, then the instruction followed by `input` or `context`."""
    about = record.get("input") or record.get("context") or ""
    history = record.get("history") or []
    is_list = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not isinstance(about, str) or not is_list:
        raise Unusable("whose input, context or history are not text")
    turns = [
        _turn({"role": who, "content": said})
        for pair in history
        for who, said in zip(("user", "assistant"), pair)
    ]
    return [*turns, {"role": "user", "content": f"{text}\n\n{about}" if about.strip() else text}]


def _dialogue(text: str) -> list[Turn]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...`"""
    said = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": what.strip()} for who, what in zip(said[::2], said[1::2])]


def _system(record: dict[str, Any]) -> str:
    value = record.get("system") or record.get("system_prompt") or ""
    if not isinstance(value, str):
        raise Unusable("whose system message is not text")
    return value if value.strip() else ""


def _tools(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the `tools` unchanged, or OpenAI's older `functions` as tools."""
    name = "tools" if _is_filled(record.get("tools")) else "functions"
    value, why = record.get(name), f"whose {name} are not JSON objects"
    value = _rows(_from_json(value, why) if isinstance(value, str) and value else value) or []
    listed = value if isinstance(value, list) else [value]
    tools = [_from_json(each, why) if isinstance(each, str) else each for each in listed]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(why)
    return tools if name == "tools" else [{"type": "function", "function": tool} for tool in tools]


def _rows(value: Any) -> Any:
    """Convert a struct of equally long lists (how `datasets` stores a sequence of structs) back to a list."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if not lists or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return value
    return [{k: v for k, v in zip(value, row) if v is not None or k == "content"} for row in zip(*lists)]


def _from_json(text: str, why: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise Unusable(why) from None


# --- turns --------------------------------------------------------------------------------------------------


def _turn(value: Any) -> Turn:
    """Return the turn with the keys `role` and `content`; null fields are dropped."""
    if isinstance(value, str):
        value = _from_json(value, "whose turns are text, without a role")
    said = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
    role = said.get("role", said.get("from"))
    if not isinstance(role, str):
        raise Unusable("whose turns have no role")
    names = {"value": "content"} if "content" not in said else {}
    turn = {names.get(k, k): v for k, v in said.items() if k != "from"}
    turn["role"] = (ROLES if "role" in said else SHAREGPT_ROLES).get(role.lower(), role)
    if role in CALLS:
        turn |= {"role": "assistant", "content": "", "tool_calls": _calls(turn.get("content"))}
    if isinstance(turn.get("tool_calls"), str):
        turn["tool_calls"] = _from_json(turn["tool_calls"], "whose tool_calls are not JSON")
    if not turn.get("tool_calls", True):
        del turn["tool_calls"]
    if not {"tool_calls", "function_call"} & turn.keys():
        turn.setdefault("content", "")
    elif {"content", "value"} & value.keys():
        turn.setdefault("content", None)  # templates test it for None
    if isinstance(turn.get("content"), list):
        turn["content"] = [_without_empty(part) for part in turn["content"]]
    _check_content(turn)
    return turn


def _without_empty(part: Any) -> Any:
    """Drop a text part's empty fields: an empty `image` field would make templates render an image."""
    return (
        {k: v for k, v in part.items() if v or k == "text"}
        if isinstance(part, dict) and _is_text(part)
        else part
    )


def _calls(text: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a turn with a role in CALLS: one or several {name, arguments} as JSON."""
    why = "with a function_call that is not JSON with a name"
    value = _from_json(text, why) if isinstance(text, str) else text
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unusable(why)
    return [{"type": "function", "function": call} for call in calls]


def _check_content(turn: Turn) -> None:
    """Raise `Unusable` for images, audio, video, and anything else but text (unless the role is a tool)."""
    content = turn.get("content")
    for part in content if isinstance(content, list) else []:
        kind = str(part.get("type") or ", ".join(part)) if isinstance(part, dict) else type(part).__name__
        if re.search("image|audio|video", kind):
            raise Unusable(f"with content of type {kind} (only text is read)")
        if not _is_text(part) and turn["role"] not in PROMPTING[1:]:
            raise Unusable(f"with content of type {kind}, not text")
    if not isinstance(content, str | list | None) and turn["role"] not in PROMPTING[1:]:
        raise Unusable(f"whose content is {type(content).__name__}, not text")
