"""Commands ended at random moments and run again: the campaign of `tests/kill_campaign.py`, ten kills of each
kind.
"""

import time
from pathlib import Path

import pytest

from tests.kill_campaign import KINDS, campaign
from tests.support.helpers import Forker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]} x {kind[1]}")
def test_a_command_that_was_ended_again_and_again_ends_as_if_it_had_not_been(
    forked: Forker, tmp_path: Path, kind: tuple[str, int]
) -> None:
    found = campaign(forked, tmp_path, 10, time.time_ns() % 2**32, [kind])
    assert found["failed"] == []
    assert found["kills"] >= 10
