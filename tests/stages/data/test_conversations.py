"""Records of the layouts that people have become turns up to where an assistant speaks; what is no prompt
says why.
"""

import json
from typing import Any

import pytest

from stages.data.conversations import Unusable, conversation


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "name": "get_weather", "content": "21 C"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"default": None}}}
HI = [user("Hi")]


def turns(record: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return conversation(record, **values).turns


def reason(record: dict[str, Any]) -> str:
    with pytest.raises(Unusable) as caught:
        conversation(record)
    return str(caught.value)


def test_turns_end_with_the_last_user_message_and_keep_all_fields() -> None:
    whole = [
        SYSTEM,
        user("a", name="x"),
        assistant(None, tool_calls=[CALL]),
        RESULT,
        assistant("b", reasoning_content="because"),
        user("c"),
        assistant("d"),
    ]
    assert turns({"messages": whole}) == whole[:6]


def test_a_tools_result_is_answered_as_a_message_is() -> None:
    whole = [user("Weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("21 C.")]
    assert turns({"messages": whole}) == whole[:3]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_before_the_answer_stays_and_is_the_only_one(role: str) -> None:
    whole = [*HI, {"role": role, "content": "In French."}, assistant("Salut")]
    assert turns({"messages": whole, "system": "Other."}, system_prompt="Be brief.") == whole[:2]
    assert reason({"messages": [user(" "), whole[1]]}) == "with an empty prompt"


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "human", "value": "Hi", "role": None, "content": None},
        {"from": None, "value": None, "role": "user", "content": "Hi"},
        {"role": "user", "content": None, "value": "Hi"},
    ],
)
def test_null_fields_of_a_turn_do_not_count(turn: dict[str, Any]) -> None:
    assert turns({"messages": [turn]}) == HI


def test_calls_keep_the_null_beside_them_and_get_none() -> None:
    with_null, without = assistant(None, tool_calls=[CALL]), {"role": "assistant", "tool_calls": [CALL]}
    assert turns({"messages": [*HI, with_null, RESULT, without, RESULT]}) == [
        *HI,
        with_null,
        RESULT,
        without,
        RESULT,
    ]


@pytest.mark.parametrize("empty", [None, "", False, 0, [], {}])
def test_media_count_where_they_are_filled(empty: Any) -> None:
    assert turns({"prompt": "Hi", "image": empty, "audio": empty}) == HI
    part = {"type": "text", "text": "Hi"}
    assert turns({"messages": [user([part | {"image": empty}])]}) == [user([part])]
    assert turns({"messages": [user([{"text": "Hi", "image": empty, "type": None}])]}) == [
        user([{"text": "Hi"}])
    ]


def test_the_first_filled_column_wins() -> None:
    assert turns({"messages": [], "prompt": "a", "question": "b"}) == [user("a")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": HI, "completion": [assistant("x")]}, HI),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, HI),
        ({"chosen": [*HI, assistant("a")], "rejected": [*HI, assistant("b")]}, HI),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Go\n\nAssistant: a"},
            [*HI, assistant("Yes"), user("Go")],
        ),
        ({"problem": "Hi", "solution": "x"}, HI),
        ({"query": "Hi", "response": "x"}, HI),
        ({"input": HI, "output": "x"}, HI),
        ({"messages": json.dumps(HI)}, HI),
        ({"messages": [json.dumps(HI[0])]}, HI),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "x"]}}, HI),
        (
            {
                "conversation": [
                    {"from": "Human", "value": "Hi", "weight": None},
                    {"from": "gpt", "value": "x"},
                ]
            },
            HI,
        ),
        ({"conversations": [*HI, assistant("x")]}, HI),
        ({"instruction": "Hi", "input": "", "output": "x"}, HI),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [user("Add.\n\n1 and 2")]),
        ({"instruction": "Add.", "context": "1 and 2", "response": "3"}, [user("Add.\n\n1 and 2")]),
        ({"instruction": "Hi", "history": [["a", "b"]], "output": "x"}, [user("a"), assistant("b"), *HI]),
        ({"instruction": "Hi", "history": [["a", None]], "output": "x"}, [user("a"), assistant(""), *HI]),
        ({"system": "Be brief.", "prompt": "Hi"}, [SYSTEM, *HI]),
        ({"system_prompt": "Be brief.", "question": "Hi", "response": "x"}, [SYSTEM, *HI]),
        ({"system": "Other.", "messages": [SYSTEM, *HI]}, [SYSTEM, *HI]),
        (
            {"messages": [*HI, assistant(None, tool_calls=None, name=None), user("b")]},
            [*HI, assistant(""), user("b")],
        ),
        ({"messages": [user([{"type": "text", "text": "Hi"}])]}, [user([{"type": "text", "text": "Hi"}])]),
    ],
)
def test_layouts_of_public_data_sets(record: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert turns(record) == expected


def test_calls_and_observations_of_sharegpt_are_tool_calls_and_results() -> None:
    said = [
        ("human", "Weather?"),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "21 C"),
        ("gpt", "21 C."),
    ]
    record = {
        "conversations": [{"from": role, "value": text} for role, text in said],
        "system": "",
        "tools": "[]",
    }
    assert turns(record) == [
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "21 C"},
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
    ],
)
def test_tools_are_what_the_record_says(value: dict[str, Any]) -> None:
    assert conversation({"prompt": "Hi", **value}).tools == [TOOL]


def test_a_system_prompt_gives_way_to_the_records_own() -> None:
    assert turns({"prompt": "Hi"}, system_prompt="Be brief.") == [SYSTEM, *HI]
    developer = {"role": "developer", "content": "x"}
    assert turns({"messages": [developer, *HI]}, system_prompt="Be brief.") == [developer, *HI]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({}, "without a column that holds a prompt"),
        ({"text": "x"}, "without a column that holds a prompt"),
        ({"prompt": None, "messages": None}, "with an empty prompt"),
        ({"prompt": " \n"}, "with an empty prompt"),
        ({"messages": [SYSTEM, user([])]}, "with an empty prompt"),
        ({"messages": [assistant("x")]}, "without a user turn"),
        ({"messages": [{"speaker": "a"}]}, "whose turns have no role"),
        ({"messages": ["Hi"]}, "whose turns are text, without a role"),
        ({"messages": "Hi"}, "whose messages are text, but not JSON"),
        ({"prompt": 5}, "whose prompt is int, not text or turns"),
        ({"messages": [user(5)]}, "whose content is int, not text"),
        ({"prompt": "Hi", "images": ["x.png"]}, "with images (only text is read)"),
        (
            {"messages": [user([{"type": "input_audio", "input_audio": {}}])]},
            "with content of type input_audio (only text is read)",
        ),
        ({"messages": [user([{"image": "x"}])]}, "with content of type image (only text is read)"),
        (
            {"messages": [user([{"type": "thinking", "thinking": "x"}])]},
            "with content of type thinking, not text",
        ),
        ({"prompt": "Hi", "tools": "none"}, "whose tools are not JSON objects"),
        ({"prompt": "Hi", "tools": [3]}, "whose tools are not JSON objects"),
        ({"prompt": "Hi", "system": ["x"]}, "whose system message is not text"),
        ({"instruction": "Hi", "input": 5}, "whose input, context or history are not text"),
        ({"instruction": "Hi", "history": 5}, "whose input, context or history are not text"),
        ({"instruction": "Hi", "history": [["a", 5]]}, "whose content is int, not text"),
        ({"chosen": "an answer"}, "with an answer, but no prompt"),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            "with a function_call that is not JSON with a name",
        ),
    ],
)
def test_what_is_no_prompt_says_why(record: dict[str, Any], why: str) -> None:
    assert reason(record) == why
