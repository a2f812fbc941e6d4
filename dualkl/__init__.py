"""Gated dual KL: forward and reverse KL between a teacher and a student, mixed per position by a gate.

Pure tensor functions, independent of files, run configuration and model libraries.
"""

from dualkl.config import DualKLConfig
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
