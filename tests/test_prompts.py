"""Data sets of several shapes become tokenized prompts; checkers tell right answers; token maps must agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import prompts as prompts_module
from stages.data.prompts import (
    PromptSet,
    check_gsm8k,
    encode,
    heldout_prompts,
    load_checker,
    template_fingerprint,
    training_prompts,
    turns_of,
    vocabulary_fingerprint,
)
from stages.models.checkpoints import load_tokenizer, vocabulary_cut
from stages.runtime.errors import UserError
from tests.helpers import ROOT, STUDENT, make_config

TULU3 = [
    {
        "id": f"source_{i}",
        "messages": [
            {"role": "user", "content": f"How many pens are {i} pens?"},
            {"role": "assistant", "content": f"The answer is {i}."},
        ],
        "source": "ai2-adapt-dev/some_source",
    }
    for i in range(2, 9)
]


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def taken(folder: Path, tokenizer: Any, dataset: str, **values: Any) -> PromptSet:
    defaults = {"dataset": dataset, "num_prompts": 0, "max_prompt_tokens": 1000}
    return training_prompts(make_config(folder, **(defaults | values)), tokenizer)


def refusal(folder: Path, tokenizer: Any, dataset: str, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        taken(folder, tokenizer, dataset, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Shapes of data sets


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "answer": "4"},
        {"prompt": "How many?", "extra": 1},
        {"prompt": [{"role": "user", "content": "How many?"}]},
        {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]},
    ],
    ids=["question", "prompt", "prompt turns", "messages"],
)
def test_the_same_question_in_any_column_is_the_same_prompt(
    tmp_path: Path, tokenizer: Any, write: Any, row: dict[str, Any]
) -> None:
    found = taken(tmp_path, tokenizer, write(tmp_path, [row])).prompts
    expected = encode([{"role": "user", "content": "How many?"}], {}, tokenizer, {})
    assert [prompt.prompt_id for prompt in found] == [expected.prompt_id]
    assert found[0].text == expected.text == "<|user|>How many?<|assistant|>"
    assert {name: value for name, value in found[0].row.items() if value is not None} == row


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_local_file_of_tulu3s_schema_gives_one_prompt_a_row(tmp_path: Path, tokenizer: Any, write: Any) -> None:
    found = taken(tmp_path, tokenizer, write(tmp_path, TULU3))
    assert sorted(p.text for p in found.prompts) == [
        f"<|user|>How many pens are {i} pens?<|assistant|>" for i in range(2, 9)
    ]
    assert all(prompt.row["source"] == "ai2-adapt-dev/some_source" for prompt in found.prompts)


def test_tulu3_is_the_name_of_a_hub_data_set(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, *, split: str) -> Any:
        from datasets import Dataset

        asked.append((name, split))
        return Dataset.from_list(TULU3)

    monkeypatch.setattr(prompts_module, "load_dataset", load)
    assert len(taken(tmp_path, tokenizer, "tulu3").prompts) == len(TULU3)
    assert asked == [("allenai/tulu-3-sft-mixture", "train")]


def test_turns_end_with_the_last_user_message() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert turns_of({"messages": turns}) == turns[:4]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "x"},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"prompt": ""},
        {"prompt": None, "messages": None},
    ],
)
def test_a_record_without_a_user_turn_has_no_prompt(row: dict[str, Any]) -> None:
    assert turns_of(row) is None


def test_the_first_column_that_is_filled_wins() -> None:
    assert turns_of({"messages": [], "prompt": "a", "question": "b"}) == [{"role": "user", "content": "a"}]


def test_turns_of_another_shape_are_a_sentence_not_a_crash(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"from": "human", "value": "How many?"}]}]
    assert "data.jsonl" in refusal(tmp_path, tokenizer, jsonl(tmp_path, rows))


def test_a_template_that_refuses_the_turns_is_a_sentence(tmp_path: Path) -> None:
    strict = load_tokenizer(str(ROOT / STUDENT), "main")
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    rows = [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    assert "System role not supported" in refusal(tmp_path, strict, jsonl(tmp_path, rows))


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    thinking = load_tokenizer(str(ROOT / STUDENT), "main")
    thinking.chat_template = "{% if enable_thinking %}think{% else %}plain{% endif %}"
    path = jsonl(tmp_path, [{"prompt": "a"}])
    texts = [
        taken(tmp_path, thinking, path, chat_template_kwargs=f"{{enable_thinking: {value}}}").prompts[0].text
        for value in ("true", "false")
    ]
    assert texts == ["think", "plain"]


def test_a_tokenizer_without_a_template_gets_the_plain_text(tmp_path: Path) -> None:
    plain = load_tokenizer(str(ROOT / STUDENT), "main")
    plain.chat_template = None
    assert taken(tmp_path, plain, jsonl(tmp_path, [{"question": "How many?"}])).prompts[0].text == "How many?"


# Identity and order


def test_a_prompt_id_depends_on_the_tokens_alone(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "How many pens?"}]
    first, again = encode(turns, {"a": 1}, tokenizer, {}), encode(turns, {}, tokenizer, {})
    assert first.prompt_id == again.prompt_id == "181d3cd44b43a8a0"  # stable over versions: caches hold it
    assert encode([{"role": "user", "content": "How many cups?"}], {}, tokenizer, {}).prompt_id != first.prompt_id
    assert first.ids.dtype == np.int32


def test_the_order_of_prompts_is_seeded(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, TULU3)
    orders = [[p.prompt_id for p in taken(tmp_path, tokenizer, path, seed=seed).prompts] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_num_prompts_takes_the_first_of_the_seeded_order(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, TULU3)
    everything = [p.prompt_id for p in taken(tmp_path, tokenizer, path).prompts]
    assert [p.prompt_id for p in taken(tmp_path, tokenizer, path, num_prompts=3).prompts] == everything[:3]


def test_held_out_prompts_follow_the_training_prompts_where_no_file_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, [*TULU3, *TULU3])  # every prompt twice
    config = make_config(tmp_path, dataset=path, num_prompts=7, eval_dataset="", eval_prompts=7, max_prompt_tokens=1000)
    seen = {p.prompt_id for p in training_prompts(config, tokenizer).prompts}
    heldout = heldout_prompts(config, tokenizer).prompts
    assert not seen & {p.prompt_id for p in heldout}


def test_a_data_set_used_up_by_training_leaves_no_held_out_prompts(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, TULU3)
    for num_prompts in (0, 7):
        config = make_config(tmp_path, dataset=path, num_prompts=num_prompts, eval_dataset="", max_prompt_tokens=1000)
        with pytest.raises(UserError, match="eval_dataset"):
            heldout_prompts(config, tokenizer)


def test_duplicates_of_training_prompts_alone_leave_no_held_out_prompts(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, [TULU3[0]] * 6)
    config = make_config(tmp_path, dataset=path, num_prompts=3, eval_dataset="", eval_prompts=3, max_prompt_tokens=1000)
    with pytest.raises(UserError, match="eval_dataset"):
        heldout_prompts(config, tokenizer)


def test_held_out_prompts_of_a_file_come_in_its_order(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(tmp_path, eval_dataset=jsonl(tmp_path, TULU3), eval_prompts=4, max_prompt_tokens=1000)
    texts = [p.text for p in heldout_prompts(config, tokenizer).prompts]
    assert texts == [f"<|user|>How many pens are {i} pens?<|assistant|>" for i in range(2, 6)]


# Mistakes


def test_overlong_prompts_are_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "pens " * n} for n in (1, 2, 40, 50)]
    found = taken(tmp_path, tokenizer, jsonl(tmp_path, rows), max_prompt_tokens=20)
    assert len(found.prompts) == 2
    assert found.num_skipped == 2


def test_a_prompt_of_exactly_the_limit_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, [{"prompt": "pens"}])
    length = len(taken(tmp_path, tokenizer, path).prompts[0].ids)
    assert taken(tmp_path, tokenizer, path, max_prompt_tokens=length).num_skipped == 0
    assert "all 1 are longer" in refusal(tmp_path, tokenizer, path, max_prompt_tokens=length - 1)


def test_an_overlong_prompt_is_an_error_where_that_is_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, [{"prompt": "pens " * 50}])
    message = refusal(tmp_path, tokenizer, path, max_prompt_tokens=20, overlong="error")
    for part in (path, "a prompt has", "max_prompt_tokens is 20", "overlong: skip", "pens pens"):
        assert part in message


def test_a_data_set_without_prompts_names_its_columns(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, jsonl(tmp_path, [{"text": "a", "label": 1}]))
    for part in ("gave no prompts", "`messages`", "`prompt`", "`question`", "text, label"):
        assert part in message


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, "nowhere/data.jsonl")
    assert message == f"dataset nowhere/data.jsonl does not exist (looked in {ROOT})."


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "{not json\n"), ("a.jsonl", ""), ("a.parquet", "PAR")])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert str(tmp_path / name) in refusal(tmp_path, tokenizer, str(tmp_path / name))


def test_a_data_set_that_is_nowhere_is_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, "nobody/nothing-of-this-name")
    assert (
        "nobody/nothing-of-this-name (split train) is neither a local .jsonl/.parquet nor found on the hub" in message
    )


# Answer checkers


@pytest.mark.parametrize(
    ("completion", "accepted"),
    [
        ("... so she has 1,234 left.", True),
        ("#### 1234", True),
        ("The answer is 1234.", True),
        ("The answer is 1234.0.", True),
        ("1234 and then 5", False),
        ("1233", False),
        ("no number", False),
        ("", False),
        ("-1234", False),
    ],
)
def test_the_gsm8k_checker_takes_the_last_number(completion: str, accepted: bool) -> None:
    assert check_gsm8k({"answer": "Some steps 7*8=56\n#### 1,234"}, completion) is accepted


def test_the_gsm8k_checker_is_known_by_name() -> None:
    assert load_checker("gsm8k") is check_gsm8k
    assert load_checker("") is None


def test_a_checker_of_ones_own_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def right(row, completion):\n    return row['answer'] in completion\n")
    checker = load_checker(f"{path}:right")
    assert checker is not None
    assert checker({"answer": "4"}, "it is 4")
    assert not checker({"answer": "4"}, "it is 5")


def test_the_demo_checker_is_loaded_by_path() -> None:
    checker = load_checker("examples/word_problems.py:check")
    assert checker is not None
    assert checker({"answer": 4}, "2 + 2 = 4. The answer is 4.")


@pytest.mark.parametrize("spec", ["nowhere.py:check", "gsm9k", "examples/word_problems.py", ":check"])
def test_a_checker_that_is_not_there_says_what_is_expected(spec: str) -> None:
    with pytest.raises(UserError, match=r"expected gsm8k or path/to/file.py:function"):
        load_checker(spec)


def test_a_checker_file_without_the_function_names_it() -> None:
    with pytest.raises(UserError, match="has no function nothing"):
        load_checker("examples/word_problems.py:nothing")


def test_a_checker_file_that_does_not_import_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(UserError, match=r"broken\.py"):
        load_checker(f"{path}:check")


# Token maps


class Map:
    """A tokenizer that is nothing but its token -> id map."""

    def __init__(self, num_ids: int, **changed: str) -> None:
        self._map = {f"t{i}": i for i in range(num_ids)}
        for key, token in changed.items():
            del self._map[key]
            self._map[token] = int(key[1:])

    def get_vocab(self) -> dict[str, int]:
        return self._map


def test_padding_of_the_embeddings_alone_is_cut() -> None:
    tokens = Map(151_669)
    assert vocabulary_cut(tokens, tokens, 151_936, 152_064) == 151_669
    assert vocabulary_cut(tokens, tokens, 152_064, 151_936) == 151_669


def test_ids_known_to_one_side_only_are_cut() -> None:
    assert vocabulary_cut(Map(103), Map(100), 128, 104) == 100
    assert vocabulary_cut(Map(100), Map(103), 104, 128) == 100


def test_the_same_id_for_two_tokens_is_refused_with_both() -> None:
    with pytest.raises(UserError) as caught:
        vocabulary_cut(Map(100), Map(100, t7="other", t9="more"), 104, 104)
    for part in ("disagree on 2 of 100 ids", "id 7", "'t7' against 'other'"):
        assert part in str(caught.value)


def test_a_tokenizer_with_more_ids_than_its_model_is_refused() -> None:
    with pytest.raises(UserError, match="teacher's tokenizer has id 99, but its model has only 64"):
        vocabulary_cut(Map(60), Map(100), 64, 64)


def test_the_embedded_models_share_their_whole_vocabulary(tokenizer: Any) -> None:
    assert vocabulary_cut(tokenizer, tokenizer, 230, 230) == len(tokenizer) == 230


def test_the_vocabulary_fingerprint_looks_below_the_cut_only() -> None:
    below, above = Map(100, t7="other"), Map(100, t97="other")
    prints = [vocabulary_fingerprint(tokens, 90) for tokens in (Map(100), Map(90), above, below)]
    assert prints[0] == prints[1] == prints[2]
    assert prints[3] != prints[0]


def test_the_template_fingerprint_changes_with_the_template(tokenizer: Any) -> None:
    other = load_tokenizer(str(ROOT / STUDENT), "main")
    assert template_fingerprint(other) == template_fingerprint(tokenizer)
    other.chat_template = other.chat_template + " "
    assert template_fingerprint(other) != template_fingerprint(tokenizer)
