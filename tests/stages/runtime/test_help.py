"""Help on one screen, all keys on request, and the reference that is made from the configuration."""

import pytest

from stages.runtime import help
from stages.runtime.config import SECTION_OF, SECTIONS, parse_arguments
from tests.support.helpers import ROOT


def test_the_reference_is_that_of_the_typed_configuration() -> None:
    """After a change: python -m stages.runtime.config > docs/configuration.md"""
    assert (ROOT / "docs/configuration.md").read_text() == help.reference(SECTIONS)


def test_help_shows_choices_and_defaults_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--tau", "1", "--help"], "Does this.\n\n    dualkl this\n\nMore.\n")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["Does this.", "", "    dualkl this", "", "More."]
    assert len(lines) <= help.HEIGHT
    assert max(map(len, lines)) <= help.WIDTH
    assert any("--signal topk|nucleus|hidden|full kept of the teacher (topk)" in line for line in lines)
    assert any(line.startswith("models  --student_model TEXT ") for line in lines)


def test_help_all_shows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help", "all"], "Does this.")
    shown = {word[2:] for word in capsys.readouterr().out.split() if word.startswith("--")}
    assert shown >= SECTION_OF.keys()


def test_the_short_help_names_keys_of_their_sections() -> None:
    for section, keys in help.COMMON.items():
        assert set(keys) <= set(SECTIONS[section].model_fields)
