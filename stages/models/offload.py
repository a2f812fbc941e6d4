"""Offloading: on a GPU that cannot hold student and teacher, the idle one waits in host memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stages.engine.protocol import Engine
from stages.models.teacher import Teacher, resident_bytes
from stages.runtime.run import Run

HOST = torch.device("cpu")
CROWDED = 0.8
"""Maximum share of GPU memory for the weights of both; slots and activations need the rest."""
ADAM_BYTES = 8  # optimizer state per trained weight


def must_offload(student: float, trained: int, teacher: float, card: float) -> bool:
    """Whether the weights of both models leave too little room on a GPU of `card` bytes.

    `student`, `teacher`: bytes of their weights on the GPU. `trained`: number of the student's trained
    weights.
    """
    return student + ADAM_BYTES * trained + teacher > CROWDED * card


class Offloader:
    """Move the student and a plain teacher between GPU and host memory if both do not fit.

    Weights are restored bit for bit, in the same parameters at other addresses; the engine's memory is freed.
    A ZeRO-3 teacher stays where its DeepSpeed settings place it. So does a student under ZeRO-2, whose
    weights are views of DeepSpeed's buffers.
    """

    def __init__(self, run: Run, student: nn.Module, engine: Engine | None = None) -> None:
        self._enabled, self._device = _is_crowded(run, student), run.world.device
        self._student, self._engine = student, engine
        self._teacher: Teacher | None = None

    def to_teacher(self, get_teacher: Callable[[], Teacher]) -> Teacher:
        """Put the teacher on the device, loading it the first time; the student leaves before it comes."""
        if self._enabled:
            if self._engine is not None:
                self._engine.close()
            self._student.to(HOST)
            _give_back(self._device)
        self._teacher = get_teacher()
        if self._enabled:
            self._teacher.move(self._device)
        return self._teacher

    def to_student(self) -> None:
        """Put the student on the device; the teacher, if it was there, leaves first."""
        if not self._enabled:
            return
        if self._teacher is not None:
            self._teacher.move(HOST)
            _give_back(self._device)
        self._student.to(self._device)


def _is_crowded(run: Run, student: nn.Module) -> bool:
    world, parameters = run.world, list(student.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    if world.device.type != "cuda" or world.student_is_deepspeed or not trained:
        return False  # without trained weights `student` is a teacher that writes its own text
    weights = sum(p.numel() * p.element_size() for p in parameters)
    card = torch.cuda.get_device_properties(world.device).total_memory
    return must_offload(weights, trained, resident_bytes(run.config, world.size), card)


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
