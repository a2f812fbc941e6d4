"""The gated dual KL: forward and reverse KL between a teacher and a student, mixed per position by a gate.

Tensors in, tensors out. Nothing here knows files, run configuration or a model library.
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
