"""Answer checkers: found, called, and blamed by name for what they raise."""

from __future__ import annotations

import importlib.util
import inspect
import numbers
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stages.data.prompts import Prompt
from stages.runtime.errors import UserError, one_line

Checker = Callable[[dict[str, Any], str], bool]


def open_checker(spec: str) -> Checker | None:
    """`load_checker`'s, if it can be called with a row and a completion; None without one."""
    try:
        checker = load_checker(spec)
    except SystemExit as error:
        raise UserError(
            f"answer_checker {spec} ends the program while it is imported (sys.exit); guard that."
        ) from error
    if checker is None:
        return None
    try:
        signature = inspect.signature(checker)
    except (TypeError, ValueError):  # of compiled functions nobody knows
        return checker
    try:
        signature.bind({}, "")
    except TypeError as error:
        raise UserError(
            f"answer_checker {spec} cannot be called with a row and a completion ({error}); it takes {signature}, expected"
            " (row, completion)."
        ) from error
    return checker


def solved(checker: Checker, spec: str, prompt: Prompt, completion: str) -> bool | float:
    """The checker's verdict; `UserError` that names it and the row if it raises, or answers neither yes, no nor a share."""
    try:
        answer: Any = checker(prompt.row, completion)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"answer_checker {spec} raised {type(error).__name__} ({error}) on the row {_start(prompt.row)} with the completion"
            f" {_start(completion)}; mend it, or leave answer_checker empty."
        ) from error
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    if isinstance(answer, numbers.Real) and 0 <= answer <= 1:  # type: ignore[operator]  # NaN is not
        return float(answer)
    raise UserError(
        f"answer_checker {spec} answered {_start(answer)} on the row {_start(prompt.row)}; expected True, False or a share"
        " between 0 and 1."
    )


def _start(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:157]}..."


def load_checker(spec: str) -> Checker | None:
    """`gsm8k`, or `path/to/file.py:function`; empty gives None."""
    if not spec:
        return None
    if spec == "gsm8k":
        return check_gsm8k
    path, _, name = spec.rpartition(":")
    module_spec = (
        importlib.util.spec_from_file_location("answer_checker", path) if Path(path).is_file() else None
    )
    if module_spec is None or module_spec.loader is None:
        raise UserError(
            f"answer_checker {spec}: expected gsm8k or path/to/file.py:function, and that file to exist."
        )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look a module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"answer_checker {spec}: {path} cannot be imported ({one_line(error)}).") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"answer_checker {spec}: {path} has no function {name}.")
    return getattr(module, name)


def check_gsm8k(row: dict[str, Any], completion: str) -> bool:
    """True if the last number of `completion` is the one after `####` in `row["answer"]`."""
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", completion)
    if not numbers:
        return False
    expected = str(row["answer"]).split("####")[-1]
    try:
        return float(numbers[-1].replace(",", "").rstrip(".")) == float(expected.replace(",", ""))
    except ValueError:
        return False
