"""Kernel tests without a GPU: run a test file under Triton's interpreter."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


SHARES = ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)]
"""The marker expressions that together select all tests of an interpreted file."""


def pass_interpreted(name: str, share: str) -> None:
    """Run the tests of tests/support/`name` that `share` selects.

    They need a process of their own, since Triton selects its interpreter at import.
    """
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip(
            "Triton's interpreter before 3.7 makes numbers of arrays in a way that NumPy refuses from 2.4 on"
        )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"tests/support/{name}",
        *("-m", share, "-p", "no:cacheprovider", "-W", "ignore"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
