"""The version of this software, installed or run from its source tree."""

from __future__ import annotations

import tomllib
from importlib import metadata

from stages.runtime.shipped import ROOT


def own_version() -> str:
    """The version in pyproject.toml of the tree that this file lies in, else that of the installed package."""
    tree = ROOT / "pyproject.toml"
    if tree.is_file():
        return str(tomllib.loads(tree.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("dualkl")
