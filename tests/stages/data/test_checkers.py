"""Answer checkers: what may be called with a row and a completion, and what they may answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.data.checkers import check_gsm8k, load_checker, open_checker, solved
from stages.data.prompts import Prompt
from stages.runtime.errors import UserError

PROMPT = Prompt("0" * 16, np.zeros(1, np.int32), "How many?", {"answer": "4", "id": 17})
SOURCE = """
import functools
import numpy as np

def right(row, completion): return row["answer"] in completion
def more(row, completion, strict=False, *rest, **others): return True
def everything(*values): return len(values) == 2
lambda_ = lambda row, completion: True
partial = functools.partial(lambda strict, row, completion: strict, True)
def bit(row, completion): return np.bool_(True)
def share(row, completion): return np.float32(0.5)

class Judge:
    def __call__(self, row, completion): return True
    def method(self, row, completion): return True

judge, method = Judge(), Judge().method

def one(row): return True
def three(row, completion, strict): return True
def named(row, completion, *, strict): return True
def none(row, completion): pass
def words(row, completion): return "yes"
async def later(row, completion): return True
def raises(row, completion): raise KeyError("solution_text")
def nan(row, completion): return float("nan")
def infinite(row, completion): return float("inf")
def huge(row, completion): return 10**400
def longer(row, completion): return 10**5000
def five(row, completion): return np.float32(5.0)
def less(row, completion): return -3
def leaves(row, completion): raise SystemExit(0)
number = 3
"""


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    (tmp_path / "checkers.py").write_text(SOURCE)
    return lambda name: f"{tmp_path / 'checkers.py'}:{name}"


@pytest.mark.parametrize(
    "name", ["right", "more", "everything", "lambda_", "partial", "bit", "judge", "method"]
)
def test_whatever_takes_a_row_and_a_completion_is_a_checker(spec: Any, name: str) -> None:
    checker = open_checker(spec(name))
    assert checker is not None
    assert solved(checker, spec(name), PROMPT, "4", 7) is True


def test_a_number_is_a_share(spec: Any) -> None:
    checker = open_checker(spec("share"))
    assert checker is not None
    assert solved(checker, spec("share"), PROMPT, "4", 7) == 0.5


@pytest.mark.parametrize("name", ["one", "three", "named", "Judge"])
def test_another_signature_is_one_sentence(spec: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"checkers.py:{name} cannot be called with a row and a completion"):
        open_checker(spec(name))


@pytest.mark.parametrize(
    ("name", "part"), [("nothing", "no function nothing"), ("number", "no function number")]
)
def test_what_is_no_function_is_one_sentence(spec: Any, name: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        open_checker(spec(name))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "raises",
            r"checkers.py:raises raised KeyError \('solution_text'\) on held-out prompt 7, row .*'id': 17",
        ),
        ("none", "answered None on held-out prompt 7"),
        ("words", "answered 'yes'"),
        ("nan", "answered nan on held-out prompt 7"),
        ("infinite", "answered inf"),
        ("huge", "answered 1000.* between 0 and 1"),
        ("longer", "answered a value of type int"),
        ("five", "answered .*5.0"),
        ("less", "checkers.py:less answered -3 .* expected True, False or a share between 0 and 1"),
        ("leaves", r"checkers.py:leaves raised SystemExit \(0\)"),
        pytest.param("later", "answered <coroutine", marks=pytest.mark.filterwarnings("ignore:coroutine")),
    ],
)
def test_what_a_checker_does_wrong_is_one_sentence_that_names_it_and_the_row(
    spec: Any, name: str, part: str
) -> None:
    checker = open_checker(spec(name))
    assert checker is not None
    with pytest.raises(UserError, match=part):
        solved(checker, spec(name), PROMPT, "4", 7)


def test_a_file_that_ends_the_program_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="ends the program"):
        open_checker(f"{tmp_path / 'script.py'}:check")


# Found


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
