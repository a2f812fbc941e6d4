"""Student versions in `runs/<name>/versions/`, published by stage two for rollout writers elsewhere.

`000003-1f2e3d4c/` is an exported student. `newest.json` names the version to generate with; it is replaced
atomically once that version is complete. `finished` marks that no more will come.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from stages.models import student as students
from stages.models.student import Student, policy_hash
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from stages.runtime.files import discard_unneeded, replace_text
from stages.runtime.run import Run

NAME = re.compile(r"\d{6,}-[0-9a-f]{8}")
KEPT = 3  # versions on disk; a follower may still be reading the previous one


@dataclass(frozen=True)
class Version:
    """A published student: its refresh, optimizer step and policy hash, and the number of rollouts wanted."""

    refresh_index: int
    step: int
    policy_hash: str
    num_rollouts: int

    @property
    def name(self) -> str:
        return f"{self.refresh_index:06d}-{self.policy_hash[:8]}"


def publish(run: Run, student: Student, version: Version) -> None:
    """Export the student, then point `newest.json` to it; an existing export is kept (collective)."""
    run.world.barrier()
    if run.world.is_main:
        folder, text = run.folder / "versions", json.dumps(asdict(version))
        if not (folder / version.name).exists():
            students.export(student, folder / version.name, {"version.json": text})
        replace_text(folder / "newest.json", text)
        older = sorted(
            path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.name < version.name
        )
        discard_unneeded([*older[: -(KEPT - 1)], *folder.glob(".old-*")])
    run.world.barrier()


def point_to(run_folder: Path, position: Position) -> None:
    """Point `newest.json` to the version that `position` waits for, if discarded steps left another.

    The initial student (refresh 0) is known to all and never published.
    """
    awaited, found = position.refreshes.get(position.newest), newest(run_folder)
    if (
        not position.newest
        or awaited is None
        or (found is not None and found.policy_hash == awaited.policy_hash)
    ):
        return
    folder = run_folder / "versions" / f"{position.newest:06d}-{awaited.policy_hash[:8]}"
    if not folder.exists():
        raise UserError(
            f"this run waits for rollouts of {folder}, which is gone; delete the newest folder in"
            f" {run_folder / 'checkpoints'} and rerun, which publishes that student again."
        )
    replace_text(run_folder / "versions" / "newest.json", (folder / "version.json").read_text())


def newest(run_folder: Path) -> Version | None:
    """The version to generate with; None if none was published."""
    path = run_folder / "versions" / "newest.json"
    if not path.exists():
        return None
    try:
        found = Version(**json.loads(path.read_bytes()))
        numbers = (found.refresh_index, found.step, found.num_rollouts)
        if not re.fullmatch("[0-9a-f]{16}", found.policy_hash) or any(
            type(n) is not int or n < 0 for n in numbers
        ):
            raise ValueError("a value has the wrong type")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({str(error)[:200]}); restart `dualkl train`, which writes it again."
        ) from None
    return found


def load(run_folder: Path, student: Student, version: Version) -> None:
    """Copy a published version's weights into `student`; UserError if they differ from the published ones."""
    folder = run_folder / "versions" / version.name
    stored = {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    with torch.no_grad():
        if isinstance(student.model, PeftModel):
            set_peft_model_state_dict(student.model, stored)
        else:
            for name, parameter in student.trainable.items():
                parameter.copy_(stored[name])
    found = policy_hash(student)
    if found != version.policy_hash:
        raise UserError(
            f"{folder} holds a student of policy {found}, its version.json says {version.policy_hash}; it is"
            " damaged, or this command's student_model, use_lora or lora_r differ from the run's."
        )


def set_finished(run: Run, finished: bool) -> None:
    """Tell followers whether more versions will come (collective)."""
    folder = run.folder / "versions"
    if run.world.is_main:
        folder.mkdir(exist_ok=True)
        if finished:
            replace_text(folder / "finished", "")
        else:
            (folder / "finished").unlink(missing_ok=True)
    run.world.barrier()


def is_finished(run_folder: Path) -> bool:
    return (run_folder / "versions" / "finished").exists()
