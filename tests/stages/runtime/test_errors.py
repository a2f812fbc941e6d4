"""How a command ends: one sentence and an exit code for the user, a traceback for a mistake of ours."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cache
from stages.runtime import distributed, ending, errors
from tests.support.helpers import ROOT, environment, make_run
from tests.support.thinning import leading


def ends(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.command(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_out_of_memory_says_what_to_lower_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), capsys)
    assert code != 0
    assert text.startswith("error: ")
    names = [
        "gen_micro_batch",
        "micro_batch_tokens",
        "lp_micro_batch",
        "gradient_checkpointing",
        "max_new_tokens",
        "ZeRO-2",
    ]
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    assert "group_size" not in text  # slots bound a generator's memory, whatever group they belong to


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_anywhere_is_one_sentence(capsys: pytest.CaptureFixture[str], number: int) -> None:
    code, text = ends(OSError(number, os.strerror(number), "runs/demo/metrics.jsonl"), capsys)
    assert code != 0
    assert "Traceback" not in text
    assert text.startswith("error: ")
    assert "runs/demo/metrics.jsonl" in text


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "run the same command again" in text


def test_a_mistake_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(AssertionError("ours"), capsys)
    assert code == 1
    assert "Traceback" in text


def with_output_that_nobody_reads(*arguments: str, stream: str = "stdout") -> tuple[int, str]:
    """Exit code of `python ARGUMENTS`, whose `stream` is a pipe closed at its other end, and what the other
    one holds.
    """
    reader, writer = os.pipe()
    os.close(reader)
    kept = "stderr" if stream == "stdout" else "stdout"
    pipes: dict[str, Any] = {stream: writer, kept: subprocess.PIPE}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), text=True, check=False, **pipes
    )
    os.close(writer)
    return done.returncode, getattr(done, kept)


@pytest.mark.parametrize(
    ("body", "stream"),
    leading(
        2,
        [
            ("print('a line')", "stdout"),  # found when the last of it is flushed
            ("print('bar', file=sys.stderr)", "stderr"),
            ("print('a line', flush=True)", "stdout"),
            ("print('x' * 100_000)", "stdout"),
            ("(print('It does NOT fit'), sys.exit(1))", "stdout"),
        ],
    ),
)
def test_output_that_nobody_reads_ends_the_command_without_a_word(body: str, stream: str) -> None:
    program = f"import sys; from stages.runtime.errors import command; command(lambda: {body})"
    assert with_output_that_nobody_reads("-c", program, stream=stream) == (141, "")


@pytest.mark.thorough
def test_a_stage_into_a_closed_pipe_leaves_no_traceback() -> None:
    models = [
        part for role in ("student", "teacher") for part in (f"--{role}_model", f"examples/arithmetic/{role}")
    ]
    plan = ["-m", "stages.plan", "--gpu", "h100", "--gpus", "1", "--json", *models]
    assert with_output_that_nobody_reads(*plan) == (141, "")


def test_a_broken_socket_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(BrokenPipeError(errno.EPIPE, "Broken pipe"), capsys)
    assert code == 1
    assert "BrokenPipeError" in text


ESCAPES = "\x1b]0;owned\x07\u202e"
PRINTED = r"\x1b]0;owned\x07\u202e"


@pytest.mark.parametrize("error", [errors.UserError, cache.CacheError, ending.Stopped])
def test_an_error_cannot_steer_the_terminal_or_begin_a_line(
    capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    arguments = (f"a column {ESCAPES}\nerror: none", 2)[: 2 if error is ending.Stopped else 1]
    _, text = ends(error(*arguments), capsys)
    assert text.count("\n") == 1
    assert rf"a column {PRINTED}\nerror: none" in text
    assert text.rstrip("\n").isprintable()


def test_a_traceback_keeps_its_lines_and_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, text = ends(AssertionError(ESCAPES), capsys)
    assert text.endswith(f"AssertionError: {PRINTED}\n")
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_line_of_a_run_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path).metrics.say(f"two\nlines {ESCAPES}")
    distributed.say_once(f"a tensor {ESCAPES}")
    assert capsys.readouterr().out == f"two\nlines {PRINTED}\na tensor {PRINTED}\n"
