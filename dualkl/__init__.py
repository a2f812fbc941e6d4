"""Gated dual KL: forward and reverse KL between a teacher and a student, mixed per position by a gate.

Pure tensor functions, independent of files, run configuration and model libraries.

`DualKLConfig` needs no torch; the other names are imported with it, which takes seconds, when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dualkl.config import DualKLConfig

if TYPE_CHECKING:
    from dualkl.losses import DualKLOutput, dual_kl
    from dualkl.targets import Head, HiddenTeacher, LogitsTeacher, Sampled, Teacher, TopKTeacher

__all__ = [
    "DualKLConfig",
    "DualKLOutput",
    "Head",
    "HiddenTeacher",
    "LogitsTeacher",
    "Sampled",
    "Teacher",
    "TopKTeacher",
    "dual_kl",
]

if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "dualkl.losses" if name in ("DualKLOutput", "dual_kl") else "dualkl.targets"
        found = globals()[name] = getattr(import_module(module), name)
        return found
