"""The two stages as commands: the method (`dualkl`) and the shards (`cache`) applied to models and data.

`from stages import distill` runs both from Python. It is imported when it is asked for: importing `stages`
loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.api import Distilled, distill

__all__ = ["Distilled", "distill"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stages import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
