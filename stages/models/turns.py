"""Student and teacher taking turns on a device that cannot hold both (`offload_idle`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stages.engine.protocol import Engine
from stages.models.teacher import Teacher
from stages.runtime.errors import UserError
from stages.runtime.run import Run

HOST = torch.device("cpu")


class Turns:
    """Moves the student and a plain teacher between the device and host memory. Does nothing without `offload_idle`.

    Weights return bit for bit, in the same parameters at other addresses; the engine's memory is freed. A ZeRO-3 teacher
    stays where its DeepSpeed settings put it. UserError if the student's weights are views of DeepSpeed's buffers, which
    must not move.
    """

    def __init__(self, run: Run, student: nn.Module, engine: Engine | None = None) -> None:
        self._enabled, self._device = run.config.rollout.offload_idle, run.world.device
        self._student, self._engine = student, engine
        if self._enabled and run.world.student_is_deepspeed:
            raise UserError(
                "offload_idle moves the student's weights, which DeepSpeed's ZeRO-2 holds; switch one off."
            )

    def to_teacher(self, get_teacher: Callable[[], Teacher]) -> Teacher:
        """The teacher on the device, loaded there the first time."""
        if self._enabled:
            if self._engine is not None:
                self._engine.close()
            self._student.to(HOST)
            _give_back(self._device)
        teacher = get_teacher()
        if self._enabled:
            teacher.move(self._device)
        return teacher

    def to_student(self, teacher: Teacher | None) -> None:
        """Puts the student on the device. `teacher`: the one there now, if any."""
        if not self._enabled:
            return
        if teacher is not None:
            teacher.move(HOST)
            _give_back(self._device)
        self._student.to(self._device)


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
