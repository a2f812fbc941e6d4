"""What ends a completion: ids below the cut, the teacher's end of a turn, and `eos_token`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.models import ends
from stages.runtime.config import Config, parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT

CHATML = (
    "{% for message in messages %}<|user|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model(
    folder: Path, *, add: tuple[str, ...] = (), eos: str | None = "<|end|>", template: str = "", ids: Any = 1
) -> str:
    """A folder with tokenizer and configurations but no weights; `ids` None: no generation_config.json."""
    shutil.copytree(ROOT / STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(add), special_tokens=True)
    tokenizer.eos_token = eos
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(folder)


def told(student: str, teacher: str, cut: int = 230, **values: Any) -> tuple[tuple[int, ...], list[str]]:
    config = config_of(student, teacher, **values)
    tokenizer = AutoTokenizer.from_pretrained(student)
    ends.check_ends(config, tokenizer, cut)
    return ends.student_ends(config, tokenizer, cut), ends.remarks(config, tokenizer, cut)


def config_of(student: str, teacher: str, **values: Any) -> Config:
    flags = {"student_model": student, "teacher_model": teacher, "chat_template_kwargs": "{}"} | values
    return parse_arguments([part for key, value in flags.items() for part in (f"--{key}", str(value))], "")


def test_equal_ends_are_not_mentioned(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    assert told(one, one) == ((1,), [])


def test_an_eos_beyond_the_cut_is_dropped_and_said(tmp_path: Path) -> None:
    student = model(tmp_path / "student", add=("<|im_end|>",), ids=[1, 230])
    found, (remark,) = told(student, model(tmp_path / "teacher"))
    assert found == (1,)
    assert "'<|im_end|>' (id 230) is never sampled" in remark
    assert "rollouts end at '<|end|>' (id 1)" in remark


def test_no_eos_below_the_cut_is_refused(tmp_path: Path) -> None:
    student = model(tmp_path / "student", add=("<|im_end|>",), eos="<|im_end|>", ids=230)
    with pytest.raises(
        UserError, match=r"EOS token '<\|im_end\|>' \(id 230\) can never be sampled: only ids below 230"
    ):
        told(student, model(tmp_path / "teacher"))


def test_a_student_without_any_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no EOS token.*eos_token"):
        told(model(tmp_path / "student", eos=None, ids=None), model(tmp_path / "teacher"))


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    student = model(tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text("{nope")
    with pytest.raises(UserError, match=r"student/generation_config\.json cannot be read"):
        told(student, student)


@pytest.mark.parametrize("value", ['"1"', "-1", "[[1]]", "1.5"])
def test_an_eos_id_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    student = model(tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match=r"generation_config\.json (has the eos_token_id|cannot be read)"):
        told(student, student)


def test_the_teachers_ids_that_the_student_lacks_are_named(tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "student", eos="<|pad|>", ids=0), model(tmp_path / "teacher")
    found, (remark,) = told(student, teacher)
    assert found == (0,)
    for part in (
        "teacher ends a turn at '<|end|>' (id 1)",
        "at '<|pad|>' (id 0) alone",
        "eos_token: '<|pad|>,<|end|>'",
    ):
        assert part in remark
    assert told(student, teacher, eos_token="<|pad|>,<|end|>") == ((0, 1), [])
    assert told(student, teacher, eos_token="<|end|>") == ((1,), [])


def test_the_turn_end_is_what_the_template_writes_after_an_answer(tmp_path: Path) -> None:
    """As ChatML on a base tokenizer: its EOS is <|endoftext|>, its turns end at <|im_end|>."""
    chat = model(tmp_path / "chat", add=("<|im_end|>",), template=CHATML)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    assert ends.turn_end(config_of(chat, chat), tokenizer) == (230,)
    assert told(chat, chat, 231)[0] == (1,)
    assert "teacher ends a turn at '<|im_end|>' (id 230)" in told(chat, chat, 231)[1][0]
    assert told(chat, chat, 231, eos_token="<|im_end|>") == ((230,), [])
    for template in ("{{ messages[0].content }}", "{{ raise_exception('no assistants') }}"):
        tokenizer.chat_template = template
        assert ends.turn_end(config_of(chat, chat), tokenizer) == ()


def test_a_turn_end_that_only_the_teacher_knows_is_said(tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", add=("<|im_end|>",), eos="<|im_end|>", template=CHATML, ids=230)
    found, (remark,) = told(model(tmp_path / "student"), teacher)
    assert found == (1,)
    assert "teacher ends a turn at '<|im_end|>' (id 230), which the student cannot sample" in remark


@pytest.mark.parametrize(
    ("text", "part"),
    [("<|nothing|>", "'<|nothing|>' is not a token"), ("<|end|>,<|im_end|>", "can never be sampled")],
)
def test_an_eos_token_that_cannot_be_is_refused(tmp_path: Path, text: str, part: str) -> None:
    student = model(tmp_path / "student", add=("<|im_end|>",))
    with pytest.raises(UserError) as caught:
        told(student, model(tmp_path / "teacher"), eos_token=text)
    assert part in str(caught.value)


def test_the_teachers_own_text_ends_at_its_own_ids(tmp_path: Path) -> None:
    student, teacher = (
        model(tmp_path / "student", eos="<|pad|>", ids=0),
        model(tmp_path / "teacher", ids=[1, 7, 400]),
    )
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert ends.teacher_ends(config_of(student, teacher), tokenizer, 230) == (0, 1, 7)


def test_eos_tokens_may_be_a_list_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("eos_token: ['<|end|>', '<|pad|>']\n")
    assert (
        parse_arguments(["--config", str(tmp_path / "own.yaml")], "").rollout.eos_token == "<|end|>,<|pad|>"
    )
