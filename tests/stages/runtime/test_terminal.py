"""What a command prints: lines of progress, quiet runs, and results for programs."""

import json

import pytest

from stages.runtime import terminal
from stages.runtime.terminal import Bar, Style, take_style

Capture = pytest.CaptureFixture[str]


def test_redirected_progress_is_a_line_every_some_seconds_and_at_the_end(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Bar("training", "step", 40, 10, at_once=True) as bar:
        for step in range(30):
            now += 1
            bar.update(1, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 11 of 40 steps, 00:29 left; loss 0",
        "training: 21 of 40 steps, 00:19 left; loss 10",
        "training: 31 of 40 steps, 00:09 left; loss 20",
        "training: 40 of 40 steps; loss 29",
    ]


def test_short_work_and_hidden_bars_print_nothing(capsys: Capture) -> None:
    for bar in (Bar("rollouts", "rollout", 4), Bar("training", "step", 4, shown=False, at_once=True)):
        with bar:
            bar.update(4, "figures")
    assert capsys.readouterr().err == ""


def test_a_quiet_command_prints_warnings_and_its_result(capsys: Capture) -> None:
    style, rest = take_style(["--quiet", "--tau", "1"])
    assert rest == ["--tau", "1"]
    style.say("measuring")
    style.say("warning: odd")
    style.conclude("done", {"step": 3})
    assert capsys.readouterr().out == "warning: odd\ndone\n"


def test_json_is_all_that_a_program_reads(capsys: Capture) -> None:
    style, _ = take_style(["--json"])
    style.say("measuring \x1b[31m")
    style.conclude("done", {"step": 3, "path": "a\x7f\x1b"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"step": 3, "path": "a\x7f\x1b"}
    assert not set(out) & {"\x7f", "\x1b"}
    assert err.startswith("measuring ")
    assert "\x1b" not in err


def test_lines_are_printed_by_default(capsys: Capture) -> None:
    Style().say("measuring")
    assert capsys.readouterr().out == "measuring\n"
