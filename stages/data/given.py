"""Data sets and tokenizers that are given as Python objects become files in the run's folder.

A file is named by a hash of its content: the configuration then says what the run was made from, commands can
read it again, and other content is another configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.data.conversations import Unusable
from stages.data.records import Record, Rows
from stages.runtime import yaml_text
from stages.runtime.errors import UserError, machine_error

HASH_LENGTH = 16
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "chat_template*")


def is_name(value: Any) -> bool:
    """Whether `value` names data sets (a name, a path, or {name: weight}) rather than holding rows."""
    if isinstance(value, str | os.PathLike):
        return True
    return (
        type(value) is dict and bool(value) and all(isinstance(each, int | float) for each in value.values())
    )


@contextlib.contextmanager
def kept_if_begun(folder: Path) -> Iterator[None]:
    """Inside, files are kept below `folder`; they are removed if the run ends in an error before it began."""
    kept = [folder / "data", folder / "models"]
    there = {path for where in kept if where.is_dir() for path in where.iterdir()}
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except BaseException:
        if not (folder / "metrics.jsonl").exists():
            for path in (path for where in kept if where.is_dir() for path in where.iterdir()):
                if path not in there:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for empty in (*kept, *made):
                with contextlib.suppress(OSError):  # missing, or not empty
                    empty.rmdir()
        raise


def _made(folder: Path) -> Path:
    """The folder, made if it is missing; UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(machine_error(error)) from error
    return folder


def keep_rows(folder: Path, key: str, value: Any) -> str:
    """Write the rows of `value` as JSON lines below `folder`; return the file's path.

    Errors: `UserError` for rows that cannot be written, and if the run in `folder` was begun with others.
    """
    where = _made(folder / "data")
    partial = where / f"{key}.{os.getpid()}.partial"
    digest, index = hashlib.sha256(), -1
    try:
        with partial.open("wb") as file:
            for index, row in enumerate(_rows(key, value)):
                line = _line(key, index, row)
                digest.update(line)
                file.write(line)
        if index < 0:
            raise UserError(f"{key} holds no rows; give at least one record.")
        path = where / f"{key}-{digest.hexdigest()[:HASH_LENGTH]}.jsonl"
        _refuse_others(folder, key, path)
        partial.replace(path)  # all processes write the same content
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


@contextlib.contextmanager
def named_as_given(**paths: Any) -> Iterator[None]:
    """Inside, errors about files that `keep_rows` wrote name the argument and the index of the row."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, path in paths.items():
            if isinstance(path, str) and path in text and Path(path).name.startswith(f"{key}-"):
                text = _as_argument(text, key, path)
        raise UserError(text) from error


def _as_argument(text: str, key: str, path: str) -> str:
    text = text.replace(f"dataset {path}", path).replace(path, f"the argument {key}")
    return re.sub(r"\brecord (\d+)", lambda found: f"{key}[{int(found[1]) - 1}]", text)


def _refuse_others(folder: Path, key: str, path: Path) -> None:
    """UserError if the run in `folder` has begun with other rows."""
    try:
        begun = yaml_text.read((folder / "config.yaml").read_text())
    except (OSError, ValueError):
        return
    section = {"dataset": "data", "eval_dataset": "eval"}[key]
    found = begun.get(section, {}).get(key) if isinstance(begun, dict) else None
    if isinstance(found, str) and Path(found).name.startswith(f"{key}-") and Path(found).name != path.name:
        raise UserError(
            f"the run in {folder} was begun with other rows as {key} ({Path(found).name}, these are"
            f" {path.name}); give the same rows to go on, or another run_name for another run."
        )


def _rows(key: str, value: Any) -> Iterator[Any]:
    import datasets  # slow to import, and most data sets are files

    if isinstance(value, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"{key} has the splits {', '.join(value)}; give one of them, e.g. data['train'].")
    if isinstance(value, datasets.Dataset):
        yield from _stored_rows(key, Rows(value))
        return
    if hasattr(value, "iterrows"):
        raise UserError(f"{key} is a {type(value).__name__}; give its rows: frame.to_dict('records').")
    if isinstance(value, dict) or not isinstance(value, Iterable):
        raise UserError(
            f"{key} is of type {type(value).__name__}; expected a name or a path, {{name: weight}}, or rows:"
            " a list, a datasets.Dataset or an iterable of records."
        )
    yield from value


def _stored_rows(key: str, rows: Rows) -> Iterator[Record]:
    for index in range(len(rows)):
        try:
            yield rows[index]
        except Unusable as reason:
            raise UserError(f"{key}[{index}] is a record {reason}; remove that column.") from None


def _line(key: str, index: int, row: Any) -> bytes:
    """A row as a line of JSON: a record, a prompt, or a list of chat turns."""
    if isinstance(row, str) and _is_file(row):
        raise UserError(f"{key} lists the file {row}; give {{file: weight}} to mix files, or rows.")
    names: dict[type, str] = {str: "prompt", list: "messages", tuple: "messages"}
    record = row if isinstance(row, dict) else {names[type(row)]: row} if type(row) in names else None
    if record is None:
        raise UserError(
            f"{key}[{index}] is of type {type(row).__name__}; expected a record (dict), a prompt (str) or a"
            " list of chat turns."
        )
    try:
        return (json.dumps(record, default=_plain) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{key}[{index}] cannot be written as JSON ({error}); convert it.") from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a name can be
        return False


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")


def keep_tokenizer(folder: Path, key: str, tokenizer: PreTrainedTokenizerBase, model: Path) -> str:
    """A folder below `folder` with the files of `model` and this tokenizer; return its path."""
    where = folder / "models"
    partial = _made(where / f"{key}.{os.getpid()}.partial")
    try:
        tokenizer.save_pretrained(str(partial))
        names = sorted(path for path in partial.rglob("*") if path.is_file())
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in names))
        path = where / f"{key}-{digest.hexdigest()[:HASH_LENGTH]}"
        own = {each for pattern in TOKENIZER_FILES for each in model.glob(pattern)}
        for source in sorted(set(model.iterdir()) - own):
            (partial / source.name).symlink_to(source.resolve())
        if not path.exists():
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(path)
