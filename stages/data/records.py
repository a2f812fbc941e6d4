"""Opens data sets as sequences of records: files, folders, saved data sets and hub names.

Strings are never converted to dates or numbers. Null fields that Arrow adds because another record has them
are removed. JSON lines are indexed first and parsed on access: a million lines open in a second.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import io
import json
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.conversations import COLUMNS, Unusable
from stages.runtime.errors import UserError, one_line
from stages.runtime.network import needs_network, no_hub
from stages.runtime.yaml_text import short

Record = dict[str, Any]
Bytes = mmap.mmap | bytes

NAMED = {"tulu3": "allenai/tulu-3-sft-mixture"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in file names that identify a split, as in `datasets`."""
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
BOM = b"\xef\xbb\xbf"
CHUNK = 2**23
MOST_LINE, MOST_WHOLE = 2**28, 2**30
"""Limits in bytes for unpacked data: a line of JSON lines, and a file of any other format."""


def open_records(name: str, split: str) -> Sequence[Record]:
    """Return the records (at least one) of a local file, a folder, or a hub data set.

    `name`: `PATH`, or `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`, where CONFIG may be empty
    (`FOLDER::SPLIT`). `split` is the default split; it applies to the hub, a saved DatasetDict, and a folder
    whose file names contain splits.
    Errors: `UserError`, with the line, for missing, empty, non-UTF-8 or broken data. In JSON lines, all but
    the first and last line are only parsed (and rejected) when read.
    """
    base, config, named = name, "", ""
    if not _path(name).exists():
        base, config, named = [*name.split(":", 2), "", ""][:3]
    path = _path(base)
    if path.exists() and (config or (named and path.is_file())):
        raise UserError(
            f"dataset {name}: a local file or folder has no configurations, and a file no splits; name the"
            " split of a folder as FOLDER::SPLIT."
        )
    if path.is_file():
        records = _file(path)
    elif path.is_dir():
        records = _folder(path, named or split)
    elif _kind(path) in KINDS or name.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(f"dataset {name} does not exist (looked in {Path.cwd()}).")
    else:
        records = _hub(base, config, named or split)
    if not len(records):
        raise UserError(f"dataset {name} is empty: it has no records.")
    return records


def _path(name: str) -> Path:
    """UserError for a text that no file can be called, such as a prompt."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError:  # the named user does not exist
        return Path(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset {short(name)} is not a name ({getattr(error, 'strerror', None) or error}); expected a file, a folder, or a name"
            " on the hub."
        ) from None
    return path


# --- files --------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """Return the suffix that determines the format, ignoring a compression suffix."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def _file(path: Path) -> Sequence[Record]:
    reader = KINDS.get(_kind(path))
    if reader is None:
        raise UserError(
            f"dataset {path} has an unsupported file type; expected {', '.join(KINDS)}, each also as"
            f" {' or '.join(COMPRESSIONS)}."
        )
    if path.suffix.lower() not in COMPRESSIONS:
        with path.open("rb") as file:
            return (
                reader(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                if path.stat().st_size
                else []
            )
    if _kind(path) in LINES:
        parts = _unpacked_lines(path)
        if _are_records(parts):
            return Joined(parts)
    with _unpacking(path) as stream:
        data = stream.read(MOST_WHOLE + 1)
    if len(data) > MOST_WHOLE:
        raise UserError(
            f"dataset {path} unpacks to more than {MOST_WHOLE:,} bytes; unpack it, or make it .jsonl."
        )
    return reader(path, data) if data else []


@contextlib.contextmanager
def _unpacking(path: Path) -> Iterator[pa.NativeFile]:
    compression = COMPRESSIONS[path.suffix.lower()]
    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"dataset {path} cannot be read as {compression}: {one_line(error)}.") from error


class Lines(Sequence[Record]):
    """The non-blank lines of a JSON lines file, parsed on access; `number` is the first line's number."""

    def __init__(self, path: Path, data: Bytes, number: int = 1) -> None:
        self.path, self.data = path, data
        begin = len(BOM) if number == 1 and data[: len(BOM)] == BOM else 0
        found = []
        for at in range(begin, len(data), CHUNK):
            ends = np.flatnonzero(np.frombuffer(data, np.uint8, min(CHUNK, len(data) - at), at) == 10) + at
            if at + CHUNK >= len(data) and data[-1:] != b"\n":  # the last line is unterminated
                ends = np.append(ends, len(data))
            if len(ends):
                found.append(_filled(data, np.append(begin, ends[:-1] + 1), ends, number))
                begin, number = int(ends[-1]) + 1, number + len(ends)
        self.starts, self.ends, self.numbers = np.concatenate([np.zeros((3, 0), np.int64), *found], axis=1)
        self.next_number = number

    def keep_filled(self) -> None:
        """Drop the bytes of blank lines if they are more than half of the data."""
        if 2 * int((self.ends - self.starts).sum()) < len(self.data):
            self.data = b"".join(
                self.data[start:end] for start, end in zip(self.starts, self.ends, strict=True)
            )
            self.ends = np.cumsum(self.ends - self.starts)
            self.starts = np.append(0, self.ends[:-1])[: len(self.ends)]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        return _record(self.value(index))

    def value(self, index: int) -> Any:
        line = int(self.numbers[index])
        text = _text(self.path, self.data[self.starts[index] : self.ends[index]], line)
        with _refusing(self.path, line, "mend that line, which must be one whole record, or delete it"):
            return json.loads(text, strict=False)


def _filled(data: Bytes, starts: np.ndarray, ends: np.ndarray, number: int) -> np.ndarray:
    """Return starts, ends and numbers [3, n] of the non-blank lines; `number` is the first line's number."""
    at = np.flatnonzero(starts < ends)
    lines = np.stack([starts[at], ends[at], number + at])
    is_filled = np.ones(len(at), bool)
    for i in np.flatnonzero(np.isin(np.frombuffer(data, np.uint8)[lines[0]], list(b" \t\r"))):
        is_filled[i] = bool(data[lines[0, i] : lines[1, i]].strip())
    return lines[:, is_filled]


def _unpacked_lines(path: Path) -> list[Lines]:
    """Return the lines of a compressed file, unpacked in chunks; empty if it is not JSON lines."""
    found, held, number = [], [b""], 1
    with _unpacking(path) as stream:
        while held:
            piece = stream.read(CHUNK)
            end = piece.rfind(b"\n") + 1 if piece else 0
            held.append(piece[:end] if end else piece)
            if not end and sum(map(len, held)) > MOST_LINE:
                raise UserError(
                    f"dataset {path}, line {number} unpacks to more than {MOST_LINE:,} bytes; cut it."
                )
            if end or not piece:
                lines = Lines(path, b"".join(held), number)
                lines.keep_filled()
                found += [lines] * bool(len(lines))
                if found and not _starts_with_object(found[0]):
                    return []  # not JSON lines
                number, held = lines.next_number, [piece[end:]] * bool(piece)
    return found


def _json(path: Path, data: Bytes) -> Sequence[Record]:
    """Parse JSON lines, one array, or concatenated values, whatever the suffix."""
    lines = Lines(path, data)
    if _are_records([lines]):
        return lines
    values = _values(_text(path, data[:]), path)
    if len(values) == 1:
        values = values[0] if isinstance(values[0], list) else _unwrapped(values[0])
    return [_record(value) for value in values]


def _are_records(parts: list[Lines]) -> bool:
    """Return whether non-empty parts are JSON lines: at least two lines, the first an object."""
    if sum(map(len, parts)) < 2 or not _starts_with_object(parts[0]):
        return False
    parts[-1].value(-1)  # raises if the file was truncated within its last line
    return True


def _starts_with_object(lines: Lines) -> bool:
    try:
        return isinstance(lines.value(0), dict)
    except UserError:  # a value that spans several lines
        return False


def _unwrapped(value: Any) -> list[Any]:
    """Return the records of `{"data": [{...}, ...]}`; any other single value is one record."""
    if not isinstance(value, dict) or any(name in value for name in COLUMNS):
        return [value]
    lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
    return lists[0] if len(lists) == 1 else [value]


def _record(value: Any) -> Record:
    """Wrap a bare list as chat turns and any other bare value as a prompt."""
    if isinstance(value, dict):
        return value
    return {"messages" if isinstance(value, list) else "prompt": value}


def _text(path: Path, data: bytes, line: int = 1) -> str:
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"dataset {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file"
            " from its encoding, for instance with iconv -f latin1 -t utf-8 (or -f utf-16)."
        ) from error


def _csv(path: Path, data: Bytes) -> Sequence[Record]:
    """Parse a table with a header as strings. The header of a .csv decides between `,`, `;` and tabs."""
    text = _text(path, data[:])
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = ((reader.line_num, row) for row in reader if row)
        _, columns = next(rows, (0, []))
        _check_columns(path, columns)
        return [_row(path, line, columns, row) for line, row in rows]
    except csv.Error as error:
        raise UserError(f"dataset {path}, line {reader.line_num} cannot be read as CSV: {error}.") from error


def _check_columns(path: Path, columns: list[str]) -> None:
    twice = [name for name, number in Counter(columns).items() if number > 1 and name.strip()]
    if twice:
        raise UserError(f"dataset {path} has two columns {twice[0]!r}; rename or remove one.")


def _row(path: Path, line: int, columns: list[str], row: list[str]) -> Record:
    if len(row) != len(columns):
        raise UserError(
            f"dataset {path}, line {line} has {len(row)} fields, its header {len(columns)}; quote fields"
            " that hold separators or line ends."
        )
    return dict(zip(columns, row))


class ArrowRows(Sequence[Record]):
    """The rows of one Arrow record batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.num_rows

    def __getitem__(self, index: Any) -> Any:
        return _arrow_record(self.batch.slice(index, 1))


def _parquet(path: Path, data: Bytes) -> Sequence[Record]:
    try:
        table = pq.ParquetFile(pa.py_buffer(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"dataset {path} cannot be read as Parquet: {one_line(error)}.") from error
    _check_columns(path, table.column_names)
    return Joined([ArrowRows(batch) for batch in table.to_batches()])


Reader = Callable[[Path, Bytes], Sequence[Record]]
KINDS: dict[str, Reader] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
LINES = (".jsonl", ".ndjson")


# --- folders and the hub ------------------------------------------------------------------------------------


class Joined(Sequence[Record]):
    """The records of several files, concatenated."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        place = bisect.bisect_right(self.ends, index)
        return self.parts[place][index - self.ends[place] + len(self.parts[place])]


def _folder(folder: Path, split: str) -> Sequence[Record]:
    """A saved data set, or all data files below `folder`, by name.

    If file names contain splits, only the files of `split`.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, split)
    files = sorted(path for path in _visible(folder) if _kind(path) in KINDS and path.name not in ABOUT)
    if not files:
        raise UserError(
            f"dataset {folder} is a folder without data files; expected {', '.join(KINDS)} below it."
        )
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    named = by_split.keys() - {""}
    wanted = next((each for each, words in SPLITS.items() if split in words), split)
    if named and wanted not in named:
        raise UserError(
            f"dataset {folder} has no files of split {split}; its files name {', '.join(sorted(named))}:"
            f" name one as {folder}::SPLIT."
        )
    return Joined([_file(path) for path in (by_split[wanted] if named else files)])


def _visible(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            yield path


def _split_of(path: Path) -> str:
    words = set(re.split(r"[-._ /\d]+", str(path).lower()))
    return next((split for split, names in SPLITS.items() if words.intersection(names)), "")


class Rows(Sequence[Record]):
    """The rows of a `datasets.Dataset`, all columns in any saved format; images are not decoded."""

    def __init__(self, data: Any) -> None:
        self.data = data.with_format("arrow")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return _arrow_record(self.data[int(index)])


def _saved(folder: Path, split: str) -> Rows:
    import datasets  # slow to import, and most data sets are files

    try:
        data = datasets.load_from_disk(str(folder))
    except IndexError as error:  # no data files
        raise UserError(
            f"dataset {folder} is empty, or one of its splits is: it was saved without rows."
        ) from error
    except Exception as error:
        raise UserError(f"dataset {folder} cannot be read as a saved data set: {one_line(error)}.") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(
                f"dataset {folder} has no split {split}; it has {', '.join(data)}: name one as"
                f" {folder}::SPLIT."
            )
        data = data[split]
    return Rows(data)


def _hub(name: str, config: str, split: str) -> Rows:
    import datasets

    datasets.config.HF_HUB_OFFLINE |= bool(no_hub())
    try:
        return Rows(datasets.load_dataset(NAMED.get(name, name), config or None, split=split))
    except Exception as error:
        if no_hub() and isinstance(error, ConnectionError | FileNotFoundError):
            raise UserError(needs_network("dataset", name, "a file or a folder")) from error
        hint = f" Name one as {name}:CONFIG." if "Config name is missing" in str(error) else ""
        raise UserError(
            f"dataset {name} (split {split}) is neither a local file or folder nor a data set on the hub:"
            f" {one_line(error)}.{hint}"
        ) from error


# --- values -------------------------------------------------------------------------------------------------


def _values(text: str, path: Path) -> list[Any]:
    decoder, white = json.JSONDecoder(strict=False), re.compile(r"\s*")
    values, at = [], 0
    with _refusing(path, 1, "mend the file there"):
        while (at := white.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # always matches
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    return values


@contextlib.contextmanager
def _refusing(path: Path, line: int, remedy: str) -> Iterator[None]:
    """Turn JSON errors of a text starting at `line` into `UserError`."""
    try:
        yield
    except json.JSONDecodeError as error:
        where, why = f"line {line + error.lineno - 1}, column {error.colno}", error.msg
    except RecursionError:
        where, why = f"line {line}", "nested too deeply"
    except ValueError as error:
        where, why = f"line {line}", one_line(error)
    else:
        return
    raise UserError(f"dataset {path}, {where}: invalid JSON ({why}); {remedy}.")


def _arrow_record(row: pa.RecordBatch | pa.Table) -> Record:
    """Convert one row to a record. Errors: `Unusable` for images, audio and video in any column."""
    values = row.to_pylist()[0]
    return {field.name: _value(field.name, field.type, values[field.name]) for field in row.schema}


def _value(name: str, kind: pa.DataType, value: Any) -> Any:
    """Remove the null struct fields that Arrow adds because all structs of a column share their fields."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        if kinds.keys() == {"bytes", "path"} and "binary" in str(kinds["bytes"]) and any(value.values()):
            raise Unusable(f"with {name} (only text is read)")  # how `datasets` stores Image, Audio and Video
        is_turn = "role" in kinds  # content may be null beside tool calls
        return {
            k: _value(k, kinds[k], v)
            for k, v in value.items()
            if v is not None or (is_turn and k == "content")
        }
    if pa.types.is_map(kind):
        if len(dict(value)) < len(value):
            raise Unusable(f"whose {name} has a key twice")
        return {k: _value(name, kind.item_type, v) for k, v in value}
    if pa.types.is_nested(kind):  # lists
        return [_value(name, kind.value_type, each) for each in value]
    return value
