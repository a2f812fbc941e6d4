"""A hub that does not answer: one sentence at once, and what was downloaded before still loads."""

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from stages.data.records import open_records
from stages.models import pretrained
from stages.runtime import network
from stages.runtime.errors import UserError


class Session:
    """Stands for the hub's HTTP session."""

    def __init__(self, answers: bool) -> None:
        self.answers, self.asked = answers, list[str]()

    def head(self, address: str, timeout: float) -> None:
        self.asked.append(address)
        if not self.answers:
            raise ConnectionError("Name or service not known")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    network.no_hub.cache_clear()
    yield
    network.no_hub.cache_clear()


def session(monkeypatch: pytest.MonkeyPatch, answers: bool) -> Session:
    made = Session(answers)
    monkeypatch.setattr(network, "get_session", lambda: made)
    return made


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = session(monkeypatch, answers=False).asked
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            pretrained.load_config("some/model")
        assert str(caught.value) == (
            "model some/model cannot be loaded: nothing here has that path, and a hub name needs a network"
            f" ({constants.ENDPOINT} does not answer) or an earlier download; give the folder of a model."
        )
    assert asked == [constants.ENDPOINT]
    assert constants.is_offline_mode()


def test_a_data_set_on_such_a_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    session(monkeypatch, answers=False)
    with pytest.raises(UserError, match=r"dataset some/set cannot be loaded: .* give a file or a folder\."):
        open_records("some/set", "train")


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    session(monkeypatch, answers=True)
    assert network.no_hub() == ""
    assert not constants.is_offline_mode()


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = session(monkeypatch, answers=True).asked
    assert network.no_hub() == "HF_HUB_OFFLINE is set"
    assert asked == []


def test_what_was_downloaded_before_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    session(monkeypatch, answers=False)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    loaded: list[Any] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **_: loaded.append(name))
    pretrained.load_config("some/model")
    assert loaded == ["some/model"]
