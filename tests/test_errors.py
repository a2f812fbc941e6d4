"""How a command ends: one sentence and an exit code for the user, a traceback for a mistake of ours."""

import errno
import os

import pytest
import torch

from stages.runtime import errors


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
    names = ["gen_micro_batch", "lp_micro_batch", "group_size", "batch_size", "max_new_tokens", "ZeRO-2"]
    places = [text.index(name) for name in names]
    assert places == sorted(places)


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
