"""Upload an exported student to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from stages.runtime.errors import UserError, one_line

NAME = re.compile(r"[\w.-]+/[\w.-]{1,96}")


def check(name: str, folder: Path) -> None:
    """Raise UserError if `name` is no hub name, or nobody is logged in to the hub; before work is done."""
    if not NAME.fullmatch(name):
        raise UserError(f"--push {name}: expected USER/NAME, as in `--push me/qwen3-4b-distilled`.")
    with _explained(name, folder):
        HfApi().whoami()


def upload(folder: Path, name: str) -> str:
    """Upload the folder; returns the page's address. A new repository is private."""
    with _explained(name, folder):
        api = HfApi()
        page = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Distilled with DualKL")
        return str(page)


@contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no token, no network, no permission: each library layer has its own class
        raise UserError(
            f"--push {name}: the Hugging Face hub cannot be used from here ({_reason(error)}). Log in with"
            f" `hf auth login` where there is a network; `hf upload {name} {folder}` sends an exported folder"
            " later."
        ) from error


def _reason(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) <= 120 else f"{text[:119]}…"
