"""Whether the Hugging Face hub answers, found out once for each process."""

from __future__ import annotations

import functools

from huggingface_hub import constants
from huggingface_hub.utils import get_session

SECONDS = 5.0


@functools.cache
def no_hub() -> str:
    """Why only what is in the local cache can be loaded by its name on the hub; "" if the hub answers.

    If it does not answer, huggingface_hub is put into offline mode: it would retry each file for half a minute.
    """
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the HTTP client, and so its errors, differ between versions of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer"
    return ""


def needs_network(what: str, name: str, give: str) -> str:
    """A sentence for a hub name that cannot be looked up. `give`: what to name instead."""
    return (
        f"{what} {name} cannot be loaded: nothing here has that path, and a hub name needs a network"
        f" ({no_hub()}) or an earlier download; give {give}."
    )
