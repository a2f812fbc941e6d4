"""Loads and calls answer checkers. Error messages name the checker."""

from __future__ import annotations

import hashlib
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
GIVEN = "python:"
_given: dict[str, Checker] = {}


def keep_checker(checker: Checker) -> str:
    """A name for a function given in Python, under which this process finds it as an answer_checker.

    The name has a hash of the source, where that is known: another function is another configuration.
    """
    own = checker if hasattr(checker, "__qualname__") else type(checker)
    try:
        source = f":{hashlib.sha256(inspect.getsource(own).encode()).hexdigest()[:8]}"
    except (OSError, TypeError):  # no file or cell holds it
        source = ""
    spec = f"{GIVEN}{own.__module__}.{own.__qualname__}{source}"
    _given[spec] = checker
    return spec


def open_checker(spec: str) -> Checker | None:
    """Return the checker of `load_checker`, or None; `UserError` if it does not accept (row, completion)."""
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
    except (TypeError, ValueError):  # compiled functions have no signature
        return checker
    try:
        signature.bind({}, "")
    except TypeError as error:
        raise UserError(
            f"answer_checker {spec} cannot be called with a row and a completion ({error}); it takes"
            f" {signature}, expected (row, completion)."
        ) from error
    return checker


def solved(checker: Checker, spec: str, prompt: Prompt, completion: str, number: int) -> bool | float:
    """Return True, False or a share in [0, 1]. `number`: the prompt's among those held out, from 1.

    Errors: `UserError`, with number and row, if the checker raises or returns anything else.
    """
    where = f"held-out prompt {number}, row {_start(prompt.row)}"
    try:
        answer: Any = checker(prompt.row, completion)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"answer_checker {spec} raised {type(error).__name__} ({error}) on {where}, with the completion"
            f" {_start(completion)}; mend it, or leave answer_checker empty."
        ) from error
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    if isinstance(answer, numbers.Real) and 0 <= answer <= 1:  # type: ignore[operator]  # NaN is not
        return float(answer)
    raise UserError(
        f"answer_checker {spec} answered {_start(answer)} on {where}; expected True, False"
        " or a share between 0 and 1."
    )


def _start(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer with too many digits to print
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:157]}..."


def load_checker(spec: str) -> Checker | None:
    """Return the checker `gsm8k`, `path/to/file.py:function` or a given one; None for an empty spec."""
    if not spec:
        return None
    if spec == "gsm8k":
        return check_gsm8k
    if spec.startswith(GIVEN):
        if spec not in _given:
            raise UserError(
                f"answer_checker {spec} was given to distill as a function, which a command cannot load; call"
                " distill again, or name a function as path/to/file.py:function."
            )
        return _given[spec]
    path, _, name = spec.rpartition(":")
    module_spec = (
        importlib.util.spec_from_file_location("answer_checker", path) if Path(path).is_file() else None
    )
    if module_spec is None or module_spec.loader is None:
        raise UserError(
            f"answer_checker {spec}: expected gsm8k or path/to/file.py:function, and that file to exist."
        )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look it up here
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"answer_checker {spec}: {path} cannot be imported ({one_line(error)}).") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"answer_checker {spec}: {path} has no function {name}.")
    return getattr(module, name)


def check_gsm8k(row: dict[str, Any], completion: str) -> bool:
    """Return whether the last number of `completion` is the one after `####` in `row["answer"]`."""
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", completion)
    if not numbers:
        return False
    expected = str(row["answer"]).split("####")[-1]
    try:
        return float(numbers[-1].replace(",", "").rstrip(".")) == float(expected.replace(",", ""))
    except ValueError:
        return False
