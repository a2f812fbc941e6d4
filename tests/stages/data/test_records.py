"""Files, folders and saved data sets are read as they are; what cannot be read is one sentence with file and
line.
"""

import bz2
import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.conversations import Unusable
from stages.data.records import Rows, open_records
from stages.runtime.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"question": "On 2024-01-01?", "answer": "007"},
    {"question": "été \u2028 日本 \U0001f600", "answer": "2024-01-01T00:00:00"},
    {"question": 'A "quoted", line\nand another', "answer": "1e5"},
]


def text_of(records: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def table_of(separator: str) -> bytes:
    quoted = [['"' + value.replace('"', '""') + '"' for value in record.values()] for record in RECORDS]
    return "\r\n".join(map(separator.join, [["question", "answer"], *quoted])).encode()


def zst(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def parquet_of(records: list[dict[str, Any]] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records) if isinstance(records, list) else records, sink)
    return sink.getvalue().to_pybytes()


def read(path: Path | str, split: str = "train") -> list[dict[str, Any]]:
    records = open_records(str(path), split)
    return [records[i] for i in range(len(records))]


def refusal(path: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        read(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", text_of(RECORDS)),
        ("a.ndjson", text_of(RECORDS)),
        ("a.json", text_of(RECORDS)),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.jsonl", json.dumps(RECORDS, indent=1).encode()),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}).encode()),
        ("a.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()),
        ("a.JSONL", b"\xef\xbb\xbf" + text_of(RECORDS)),
        ("a.jsonl", text_of(RECORDS, "\r\n")),
        ("a.jsonl", b"\n \r\n" + text_of(RECORDS, "\n\n")),
        ("a.jsonl", text_of(RECORDS).rstrip()),
        ("a.csv", table_of(",")),
        ("a.csv", b"\xef\xbb\xbf" + table_of(";")),
        ("a.tsv", table_of("\t")),
        ("a.parquet", parquet_of(RECORDS)),
        ("a.jsonl.gz", gzip.compress(text_of(RECORDS[:1])) + gzip.compress(text_of(RECORDS[1:]))),
        ("a.json.zst", zst(text_of(RECORDS))),
        ("a.csv.bz2", bz2.compress(table_of(","))),
        ("a.csv.gz", gzip.compress(table_of(","))),
        ("a.parquet.gz", gzip.compress(parquet_of(RECORDS))),
        ("data[1]*?.jsonl", text_of(RECORDS)),
        ("données 数.jsonl", text_of(RECORDS)),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "data1.jsonl").write_text('{"question": "another file"}\n')
    assert read(tmp_path / name) == RECORDS


def test_a_file_may_be_one_record(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in ("chosen", "messages", "prompt"):
        (tmp_path / "a.json").write_text(json.dumps({name: turns, "score": 1}))
        assert read(tmp_path / "a.json") == [{name: turns, "score": 1}]


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,,\na,,\n")
    assert read(tmp_path / "a.csv") == [{"question": "a", "": ""}]


def test_a_dictionary_column_and_large_text_are_text(tmp_path: Path) -> None:
    columns = {
        "question": pa.array(["a", "b", "a"]).dictionary_encode(),
        "x": pa.array(["1", "2", "3"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    assert [row["question"] + row["x"] for row in read(tmp_path / "a.parquet")] == ["a1", "b2", "a3"]


def test_a_record_has_no_fields_of_another(tmp_path: Path) -> None:
    messages = [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": name, "arguments": {name: 1}}]},
        ]
        for name in ("x", "y")
    ]
    (tmp_path / "a.parquet").write_bytes(parquet_of([{"messages": each} for each in messages]))
    datasets.Dataset.from_list([{"messages": each} for each in messages]).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        calls = [row["messages"][1] for row in read(path)]
        assert [call["tool_calls"][0]["arguments"] for call in calls] == [{"x": 1}, {"y": 1}]
        assert calls[0]["content"] is None
        assert all("tool_calls" not in row["messages"][0] for row in read(path))


def test_a_saved_data_set_has_its_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == RECORDS
    assert read(tmp_path / "saved", "test") == RECORDS[:1]
    assert "no split dev; it has train, test" in refusal(tmp_path / "saved", "dev")


@pytest.mark.parametrize("name", ["numpy", "pandas", "torch", "arrow"])
def test_a_saved_data_set_is_read_whole_whatever_its_format(tmp_path: Path, name: str) -> None:
    data = datasets.Dataset.from_list(RECORDS).add_column("turns", [[{"role": "user", "content": "a"}]] * 3)
    data.with_format(name, columns=["answer"]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [
        record | {"turns": [{"role": "user", "content": "a"}]} for record in RECORDS
    ]


@pytest.mark.parametrize(
    ("feature", "empty", "filled"),
    [
        (datasets.Image(), None, {"bytes": b"x", "path": None}),
        (datasets.Audio(), {"bytes": None, "path": None}, {"bytes": b"x", "path": None}),
        (datasets.Video(), None, {"bytes": None, "path": "a.mp4"}),
        (datasets.List(datasets.Image()), [], [None, {"bytes": b"x", "path": None}]),
        (
            datasets.List({"picture": datasets.Image()}),
            [{"picture": None}],
            [{"picture": {"bytes": b"x", "path": None}}],
        ),
    ],
)
def test_media_of_any_name_is_refused_by_it(tmp_path: Path, feature: Any, empty: Any, filled: Any) -> None:
    features = datasets.Features({"prompt": datasets.Value("string"), "picture": feature})
    table = pa.table({"prompt": ["a", "b"], "picture": [empty, filled]}, schema=features.arrow_schema)
    pq.write_table(table, tmp_path / "a.parquet")
    for records in (Rows(datasets.Dataset(table)), open_records(str(tmp_path / "a.parquet"), "train")):
        assert records[0]["prompt"] == "a"
        with pytest.raises(Unusable, match=r"^with picture \(only text is read\)$"):
            records[1]


def test_a_tool_that_takes_bytes_and_a_path_is_no_media(tmp_path: Path) -> None:
    arguments = {"bytes": "x", "path": "a.txt"}
    (tmp_path / "a.parquet").write_bytes(parquet_of([{"arguments": arguments}]))
    assert read(tmp_path / "a.parquet") == [{"arguments": arguments}]


def test_maps_and_json_columns_are_objects_that_keep_their_nulls(tmp_path: Path) -> None:
    arguments = pa.array(
        [[("city", "Rome"), ("unit", None)], [("city", "Rome"), ("city", "Oslo")]],
        pa.map_(pa.string(), pa.string()),
    )
    tools = pa.array(['{"default": null}'] * 2, pa.json_())
    pq.write_table(
        pa.table({"calls": pa.StructArray.from_arrays([arguments], ["arguments"]), "tools": tools}),
        tmp_path / "a.parquet",
    )
    records = open_records(str(tmp_path / "a.parquet"), "train")
    assert records[0] == {"calls": {"arguments": {"city": "Rome", "unit": None}}, "tools": {"default": None}}
    with pytest.raises(Unusable, match="whose arguments has a key twice"):
        records[1]


def test_a_folder_is_its_data_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "part-1.jsonl").write_bytes(text_of(RECORDS[1:]))
    (tmp_path / "part-0.parquet").write_bytes(parquet_of(RECORDS[:1]))
    (tmp_path / "_SUCCESS.json").touch()
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path) == read(tmp_path, "test") == RECORDS


def test_a_folder_whose_files_name_splits_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(parquet_of(RECORDS))
    (tmp_path / "data" / "test-00000-of-00001.jsonl").write_bytes(text_of(RECORDS[:1]))
    assert read(tmp_path) == RECORDS
    assert read(tmp_path, "test") == RECORDS[:1]
    assert "no files of split validation; its files name test, train" in refusal(tmp_path, "validation")
    assert read(f"{tmp_path}::test") == RECORDS[:1]
    assert "name the split of a folder as FOLDER::SPLIT" in refusal(f"{tmp_path}:test")
    file = tmp_path / "data" / "test-00000-of-00001.jsonl"
    assert "and a file no splits" in refusal(f"{file}::test")


def test_a_path_that_holds_a_colon_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "a:b::c.jsonl"
    path.write_bytes(text_of(RECORDS))
    assert read(path) == RECORDS


LATIN = '{"question": "été"}\n'
GOOD = '{"question": "a"}\n'
TWICE = parquet_of(pa.table([["1"], ["2"]], names=["a", "a"]))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", "is empty"),
        ("a.csv", b"question\n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl", GOOD.encode() + LATIN.encode("latin1"), "line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", (GOOD * 2).encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("a.csv", "question\na\né\n".encode("latin1"), "line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", (GOOD + "\n" + GOOD[:-4]).encode(), "line 3, column 14: invalid JSON"),
        (
            "a.jsonl",
            (GOOD + "{a}\n" + GOOD).encode(),
            "line 2, column 2: invalid JSON (Expecting property name enclosed in double quotes); mend that line",
        ),
        ("a.jsonl", b"not JSON\n", "line 1, column 1: invalid JSON"),
        ("a.json", b'[{"question": "a"},\n {"question": }]', "line 2, column 15: invalid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, its header 2"),
        ("a.csv", b'a,b\n1,"2\n', "as CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", "has two columns 'a'; rename or remove one"),
        ("a.parquet", TWICE, "has two columns 'a'; rename"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.jsonl.gz", b"plain", "cannot be read as gzip"),
        ("a.jsonl.zst", zst(text_of(RECORDS))[:-5], "cannot be read as zstd"),
        ("a.xlsx", b"x", "has an unsupported file type; expected .jsonl"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message
    assert why in message


@pytest.mark.parametrize("name", ["a.jsonl", "data/a.csv.gz", "./a", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    assert f"dataset {name} does not exist" in refusal(name)


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    assert "a folder without data files; expected .jsonl" in refusal(tmp_path)


def test_a_hub_data_set_without_its_configuration_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("openai/gsm8k")
    for part in ("['main', 'socratic']", "openai/gsm8k:CONFIG"):
        assert part in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson.bz2"])
@pytest.mark.parametrize("size", [3, 8, 64])
def test_lines_are_found_whatever_the_pieces_and_blank_ones_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr("stages.data.records.CHUNK", size)
    lines = [
        b"\xef\xbb\xbf" + b"\n" * 40,
        b' {"prompt": "a"}\r\n',
        b" \r\n" * 30,
        b'{"prompt": "b"}\n',
        b"\n" * 200,
        b'{"prompt": 3}',
    ]
    data = b"".join(lines)
    pack = {".gz": gzip.compress, ".zst": zst, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(data))
    assert read(tmp_path / name) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": 3}]
    (tmp_path / name).write_bytes(pack(data.replace(b'"b"', b"b")))
    assert f"{name}, line 72, column" in refusal(tmp_path / name)
    parts = getattr(open_records(str(tmp_path / name), "train"), "parts", [])
    assert sum(len(part.data) for part in parts) < 100


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet.gz"])
def test_a_small_file_that_unpacks_to_a_huge_one_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("stages.data.records.CHUNK", 1000)
    monkeypatch.setattr("stages.data.records.MOST_LINE", 50_000)
    monkeypatch.setattr("stages.data.records.MOST_WHOLE", 100_000)
    (tmp_path / name).write_bytes(gzip.compress(b'{"prompt":"a"}\n{"prompt":"' + b"a" * 200_000 + b'"}\n'))
    bound = (
        "line 2 unpacks to more than 50,000 bytes"
        if name == "a.jsonl.gz"
        else "unpacks to more than 100,000 bytes"
    )
    assert f"{tmp_path / name}" in refusal(tmp_path / name)
    assert bound in refusal(tmp_path / name)


def test_compressed_json_over_several_lines_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS, indent=1).encode()))
    assert read(tmp_path / "a.jsonl.gz") == RECORDS


def test_a_saved_data_set_without_rows_is_said_to_be_empty(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path)
    assert "is empty, or one of its splits is" in refusal(tmp_path)


def test_a_path_of_a_user_that_there_is_not_does_not_exist() -> None:
    assert refusal("~nobody-of-this-name/a.jsonl").startswith(
        "dataset ~nobody-of-this-name/a.jsonl does not exist"
    )


def test_many_lines_open_at_once(tmp_path: Path) -> None:
    line = b'{"question": "' + b"x" * 80 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 300_000)
    began = time.process_time()
    records = open_records(str(tmp_path / "a.jsonl"), "train")
    assert len(records) == 300_000
    assert records[299_999] == json.loads(line)
    assert time.process_time() - began < 2  # 0.05 s where the machine is idle
