"""Datasets of several shapes become tokenized prompts; checkers recognise right answers; token maps agree."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.prompts import (
    PromptSet,
    encode,
    heldout_prompts,
    template_fingerprint,
    training_prompts,
    vocabulary_fingerprint,
)
from stages.models.pretrained import load_tokenizer, vocabulary_cut
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, make_config

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
def test_a_local_file_of_tulu3s_schema_gives_one_prompt_a_row(
    tmp_path: Path, tokenizer: Any, write: Any
) -> None:
    found = taken(tmp_path, tokenizer, write(tmp_path, TULU3))
    assert sorted(p.text for p in found.prompts) == [
        f"<|user|>How many pens are {i} pens?<|assistant|>" for i in range(2, 9)
    ]
    assert all(prompt.row["source"] == "ai2-adapt-dev/some_source" for prompt in found.prompts)


def test_a_hub_data_set_has_a_name_and_perhaps_a_configuration_and_a_split(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(TULU3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(taken(tmp_path, tokenizer, "tulu3").prompts) == len(TULU3)
    for name in ("openai/gsm8k:main", "openai/gsm8k:main:test", "openai/gsm8k::train[:10%]"):
        assert len(taken(tmp_path, tokenizer, name).prompts) == len(TULU3)
    assert asked == [
        ("allenai/tulu-3-sft-mixture", None, "train"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", None, "train[:10%]"),
    ]


def test_turns_of_another_shape_are_a_sentence_not_a_crash(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"speaker": "human", "says": "How many?"}]}]
    assert (
        "data.jsonl gave no prompts (1 of 1 records skipped: 1 whose turns have no role, such as record 1)"
        in refusal(tmp_path, tokenizer, jsonl(tmp_path, rows))
    )


def test_a_template_that_refuses_the_turns_is_a_sentence(tmp_path: Path) -> None:
    strict = load_tokenizer(str(ROOT / STUDENT))
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    rows = [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    path = jsonl(tmp_path, [*rows * 3, {"text": "a"}])
    assert refusal(tmp_path, strict, path) == (
        f"the chat template fails on 3 of 4 records of dataset {path}, which gave no prompts (System role"
        " not supported). Mend the template, chat_template_kwargs or the records."
    )


def test_template_arguments_reach_the_template(tmp_path: Path) -> None:
    thinking = load_tokenizer(str(ROOT / STUDENT))
    thinking.chat_template = "{% if enable_thinking %}think{% else %}plain{% endif %}"
    path = jsonl(tmp_path, [{"prompt": "a"}])
    texts = [
        taken(tmp_path, thinking, path, chat_template_kwargs=f"{{enable_thinking: {value}}}").prompts[0].text
        for value in ("true", "false")
    ]
    assert texts == ["think", "plain"]


def test_a_tokenizer_without_a_template_gets_the_plain_text(tmp_path: Path) -> None:
    plain = load_tokenizer(str(ROOT / STUDENT))
    plain.chat_template = None
    assert taken(tmp_path, plain, jsonl(tmp_path, [{"question": "How many?"}])).prompts[0].text == "How many?"


# Identity and order


def test_a_prompt_id_depends_on_the_tokens_alone(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "How many pens?"}]
    first, again = encode(turns, {"a": 1}, tokenizer, {}), encode(turns, {}, tokenizer, {})
    assert first.prompt_id == again.prompt_id == "181d3cd44b43a8a0"  # stable over versions: caches hold it
    assert (
        encode([{"role": "user", "content": "How many cups?"}], {}, tokenizer, {}).prompt_id
        != first.prompt_id
    )
    assert first.ids.dtype == np.int32


def test_the_order_of_prompts_is_seeded(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, TULU3)
    orders = [
        [p.prompt_id for p in taken(tmp_path, tokenizer, path, seed=seed).prompts] for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_num_prompts_takes_the_first_of_the_seeded_order(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, TULU3)
    everything = [p.prompt_id for p in taken(tmp_path, tokenizer, path).prompts]
    assert [p.prompt_id for p in taken(tmp_path, tokenizer, path, num_prompts=3).prompts] == everything[:3]


def test_held_out_prompts_follow_the_training_prompts_where_no_file_is_named(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = jsonl(tmp_path, [*TULU3, *TULU3])  # every prompt twice
    config = make_config(
        tmp_path, dataset=path, num_prompts=7, eval_dataset="", eval_prompts=7, max_prompt_tokens=1000
    )
    seen = {p.prompt_id for p in training_prompts(config, tokenizer).prompts}
    heldout = heldout_prompts(config, tokenizer).prompts
    assert not seen & {p.prompt_id for p in heldout}


@pytest.mark.parametrize("num_prompts", [0, 40, 50])
def test_a_tenth_is_held_out_where_training_would_use_all(
    tmp_path: Path, tokenizer: Any, num_prompts: int
) -> None:
    path = jsonl(tmp_path, [{"prompt": f"Count {i} pens."} for i in range(40)])
    values: dict[str, Any] = {"dataset": path, "num_prompts": num_prompts, "eval_dataset": ""}
    config = make_config(tmp_path, **values, max_prompt_tokens=1000)
    train = [p.prompt_id for p in training_prompts(config, tokenizer).prompts]
    held_out = [p.prompt_id for p in heldout_prompts(config, tokenizer).prompts]
    assert (len(train), len(held_out)) == (36, 4)
    whole = taken(tmp_path, tokenizer, path, eval_dataset="", eval_prompts=0).prompts
    assert train + held_out == [p.prompt_id for p in whole]
    fewer = make_config(tmp_path, **values, eval_prompts=2, max_prompt_tokens=1000)
    assert len(heldout_prompts(fewer, tokenizer).prompts) == 2


def test_duplicates_of_training_prompts_alone_leave_no_held_out_prompts(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = jsonl(tmp_path, [TULU3[0]] * 6)
    config = make_config(
        tmp_path, dataset=path, num_prompts=3, eval_dataset="", eval_prompts=3, max_prompt_tokens=1000
    )
    with pytest.raises(UserError, match="eval_dataset"):
        heldout_prompts(config, tokenizer)


def test_held_out_prompts_of_a_file_come_in_its_order(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(
        tmp_path, eval_dataset=jsonl(tmp_path, TULU3), eval_prompts=4, max_prompt_tokens=1000
    )
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
    assert "1 longer than max_prompt_tokens" in refusal(
        tmp_path, tokenizer, path, max_prompt_tokens=length - 1
    )


def test_a_share_of_0_allows_no_skipped_record_however_few_there_are(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path, [{"prompt": "pens"}, {"prompt": "pens " * 50}])
    assert len(taken(tmp_path, tokenizer, path, max_prompt_tokens=20).prompts) == 1
    message = refusal(tmp_path, tokenizer, path, max_prompt_tokens=20, allow_skipped=0)
    for part in (path, "1 of 2 records skipped: 1 longer than max_prompt_tokens 20", "allow_skipped 0 of"):
        assert part in message


def test_a_data_set_without_prompts_names_its_columns(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, jsonl(tmp_path, [{"text": "a", "label": 1}]))
    for part in ("gave no prompts", "`messages`", "`prompt`", "`question`", "text, label"):
        assert part in message


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, "nowhere/data.jsonl")
    assert message == f"dataset nowhere/data.jsonl does not exist (looked in {ROOT})."


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "{not json\n"), ("a.jsonl", ""), ("a.parquet", "PAR")]
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, tokenizer: Any, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert str(tmp_path / name) in refusal(tmp_path, tokenizer, str(tmp_path / name))


def test_a_data_set_that_is_nowhere_is_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(tmp_path, tokenizer, "nobody/nothing-of-this-name")
    assert message.startswith(
        "dataset nobody/nothing-of-this-name cannot be loaded: nothing here has that path"
    )


# Skipped records and several data sets


def test_skipped_records_are_counted_by_reason(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "pens " * 40}, {"prompt": ""}]
    rows += [{"messages": [{"role": "assistant", "content": "x"}]}] * 2
    rows += [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}]
    found = taken(tmp_path, tokenizer, jsonl(tmp_path, rows), max_prompt_tokens=20)
    assert found.skipped == {
        "longer than max_prompt_tokens 20": 1,
        "with an empty prompt": 1,
        "without a user turn": 2,
        "with content of type image_url (only text is read)": 1,
    }
    assert found.summary.startswith(
        f"1 prompt from {tmp_path}/data.jsonl (5 of 6 records skipped: 2 without a user turn, 1 "
    )


def test_a_data_set_that_is_mostly_skipped_is_refused_unless_that_is_allowed(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = jsonl(tmp_path, [{"prompt": "a"}] * 40 + [{"text": "b"}] * 60)
    message = refusal(tmp_path, tokenizer, path)
    assert "60 of 100 records skipped: 60 without a column that holds a prompt" in message
    assert "allow_skipped 0.5" in message
    assert len(taken(tmp_path, tokenizer, path, allow_skipped=0.6).prompts) == 40


def test_a_template_that_refuses_some_records_costs_those_alone(tmp_path: Path) -> None:
    strict = load_tokenizer(str(ROOT / STUDENT))
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    )
    system = {"role": "system", "content": "b"}
    rows = [{"messages": [*first, {"role": "user", "content": "b"}]} for first in ([], [system], [])]
    found = taken(tmp_path, strict, jsonl(tmp_path, rows))
    assert len(found.prompts) == 2
    assert found.skipped == {"that the chat template refuses (no system)": 1}


def test_a_data_set_without_any_prompt_is_given_up_early(tmp_path: Path, tokenizer: Any) -> None:
    assert "200 of 200 records skipped" in refusal(
        tmp_path, tokenizer, jsonl(tmp_path, [{"text": "b"}] * 600)
    )


def test_data_sets_are_mixed_by_their_weights(tmp_path: Path, tokenizer: Any) -> None:
    a = jsonl(tmp_path, [{"prompt": f"a{i}"} for i in range(30)], "a.jsonl")
    b = jsonl(tmp_path, [{"prompt": f"b{i}"} for i in range(4)], "b.jsonl")
    weights = json.dumps({a: 3, b: 1})
    found = taken(tmp_path, tokenizer, weights, num_prompts=16)
    assert found.drawn == {a: 12, b: 4}
    assert found.summary == f"16 prompts: 12 from {a}, 4 from {b}"
    again = taken(tmp_path, tokenizer, weights, num_prompts=8)
    assert [p.prompt_id for p in again.prompts] == [p.prompt_id for p in found.prompts[:8]]
    assert again.drawn == {a: 6, b: 2}


def test_all_of_several_data_sets_repeats_the_one_that_ends_first(tmp_path: Path, tokenizer: Any) -> None:
    a = jsonl(tmp_path, [{"prompt": f"a{i}"} for i in range(6)], "a.jsonl")
    b = jsonl(tmp_path, [{"prompt": f"b{i}"} for i in range(2)], "b.jsonl")
    found = taken(tmp_path, tokenizer, json.dumps([a, b]))
    assert found.drawn == {a: 6, b: 6} or found.drawn == {a: 6, b: 5}
    assert len({p.prompt_id for p in found.prompts}) == 8


@pytest.mark.parametrize(
    "value",
    [
        "{a.jsonl: 0}",
        "{a.jsonl: x}",
        "[a.jsonl, a.jsonl]",
        "[]",
        "{}",
        "[[a]]",
        "[1]",
        "{1: 1}",
        "[./a.jsonl, a.jsonl]",
        "{a.jsonl: 1, b/../a.jsonl: 2}",
        "[~/a, ~//a]",
        "[~nobody/a, ~nobody/./a]",
    ],
)
def test_a_mixture_that_is_none_is_one_sentence(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"config key data\.dataset"):
        make_config(tmp_path, dataset=value)


@pytest.mark.parametrize(
    "name",
    ["007", "null", "data[1].jsonl", "a: b", "{a}.jsonl", "[draft] {x}.jsonl", "1e3", "openai/gsm8k:main"],
)
def test_the_name_of_a_data_set_stays_text(tmp_path: Path, name: str) -> None:
    assert make_config(tmp_path, dataset=name).data.dataset == name


def test_a_system_prompt_is_added_where_there_is_none(tmp_path: Path) -> None:
    roles = load_tokenizer(str(ROOT / STUDENT))
    roles.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    rows = [{"prompt": "a"}, {"prompt": "b", "system": "own"}]
    found = taken(tmp_path, roles, jsonl(tmp_path, rows), system_prompt="Be brief.").prompts
    assert sorted(p.text for p in found) == ["system=Be brief.;user=a;", "system=own;user=b;"]


# Encoding


def byte_tokenizer(around: str = "", template: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokens = {
        t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    if around:
        backend.post_processor = TemplateProcessing(
            single=around, special_tokens=[("<eos>", 1), ("<bos>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("text", ["Two and two", "<bos>Two and two"])
@pytest.mark.parametrize("around", ["<bos> $A <eos>", "<bos> $A"])
def test_a_plain_text_begins_with_bos_once_and_does_not_end(around: str, text: str) -> None:
    tokenizer = byte_tokenizer(around)
    body = tokenizer("Two and two", add_special_tokens=False)["input_ids"]
    assert encode([{"role": "user", "content": text}], {}, tokenizer, {}).ids.tolist() == [2, *body]


def test_a_template_that_writes_bos_is_all_there_is() -> None:
    tokenizer = byte_tokenizer("<bos> $A <eos>", "<bos>{{ messages[0].content }}")
    assert (
        encode([{"role": "user", "content": "a"}], {}, tokenizer, {}).ids.tolist()
        == tokenizer("<bos>a", add_special_tokens=False)["input_ids"]
    )


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}", "ab"),  # would print the list
        ("{{ messages[0].content | tojson }}", '"ab"'),
        ("{{ 'x' + messages[0].content }}", "xab"),  # would raise
        ("{% for part in messages[0].content %}<{{ part.text }}>{% endfor %}", "<a><b>"),
        (
            "{% if messages[0].content is string %}s{% else %}{% for p in messages[0].content %}{{"
            " p.text }}/{% endfor %}{% endif %}",
            "a/b/",
        ),
        (None, "ab"),
    ],
)
def test_text_parts_reach_templates_that_read_them(template: str | None, expected: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    assert encode([{"role": "user", "content": PARTS}], {}, tokenizer, {}).text == expected


def test_a_null_beside_tool_calls_becomes_text_for_a_template_that_needs_it() -> None:
    turns: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert encode(turns, {}, byte_tokenizer(template="{{ 'x' + messages[0].content }}"), {}).text == "x"


def test_half_a_surrogate_pair_is_skipped(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b \\ud800"}\n')
    assert taken(tmp_path, tokenizer, str(tmp_path / "a.jsonl")).num_skipped == 1


def test_a_records_own_tools_win_over_those_of_the_configuration(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template="{{ tools | map(attribute='name') | join(',') }}")
    rows = [{"prompt": "a"}, {"prompt": "b", "tools": json.dumps([{"name": "own"}])}]
    found = taken(tmp_path, tokenizer, jsonl(tmp_path, rows), chat_template_kwargs="{tools: [{name: all}]}")
    assert sorted(p.text for p in found.prompts) == ["all", "own"]


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
    other = load_tokenizer(str(ROOT / STUDENT))
    assert template_fingerprint(other) == template_fingerprint(tokenizer)
    other.chat_template = other.chat_template + " "
    assert template_fingerprint(other) != template_fingerprint(tokenizer)


def test_repeats_are_never_both_trained_on_and_held_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"How many {word}?"} for word in ("cups", "hats", "pens", "cups", "pens", "hats")]
    config = make_config(tmp_path, dataset=jsonl(tmp_path, rows), num_prompts=0, eval_dataset="")
    trained, held_out = (read(config, tokenizer) for read in (training_prompts, heldout_prompts))
    assert (len(trained.prompts), len(held_out.prompts), held_out.num_repeats) == (4, 1, 1)
    assert held_out.prompts[0].prompt_id not in {prompt.prompt_id for prompt in trained.prompts}
    assert "(1 more left out: they repeat" in held_out.summary


def test_one_prompt_is_not_enough_for_an_evaluation(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(
        tmp_path, dataset=jsonl(tmp_path, [{"prompt": "a"}] * 3), num_prompts=0, eval_dataset=""
    )
    with pytest.raises(UserError, match="has only one prompt"):
        training_prompts(config, tokenizer)


def test_data_that_is_too_long_throughout_says_what_to_raise(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"gave no prompts .*; raise max_prompt_tokens"):
        taken(tmp_path, tokenizer, jsonl(tmp_path, [{"prompt": "pens " * 40}] * 3), max_prompt_tokens=20)
