"""Turns of a chat, read back from a rendered prompt of the common templates."""

from __future__ import annotations

import re

Message = dict[str, str]
_TEMPLATES = [
    r"<\|im_start\|>(?P<role>\w+)\n(?P<content>.*?)(?:<\|im_end\|>\n?|\Z)",
    r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n(?P<content>.*?)(?:<\|eot_id\|>|\Z)",
    r"<start_of_turn>(?P<role>\w+)\n(?P<content>.*?)(?:<end_of_turn>\n?|\Z)",
    r"<\|(?P<role>system|user|assistant)\|>\n?(?P<content>.*?)"
    r"(?:<\|end\|>\n?|(?=<\|(?:user|assistant)\|>)|\Z)",
]
_TURNS = [re.compile(template, re.DOTALL) for template in _TEMPLATES]
_START = re.compile(r"\A(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")


def messages_of(prompt: str) -> list[Message] | None:
    """`role` and `content` of each turn, without the empty one that the completion fills; None if unknown.

    The turns must make up the whole prompt, apart from a token that starts a sequence: a template of another
    form is not guessed at.
    """
    start = _START.match(prompt)
    assert start is not None
    for turns in _TURNS:
        found, place = list[Message](), start.end()
        while turn := turns.match(prompt, place):
            if turn.end() == place:
                break
            found.append({"role": turn["role"], "content": turn["content"]})
            place = turn.end()
        if found and place == len(prompt):
            last = found[-1]
            is_open = last["role"] in ("assistant", "model") and not last["content"].strip()
            return found[:-1] if is_open else found
    return None
