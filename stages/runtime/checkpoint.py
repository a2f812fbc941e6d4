"""Checkpoints: everything a later process needs to resume training exactly.

`checkpoints/step-000040/` holds the trained weights, optimizer, scheduler, random states of every rank, and
state.json: the position, which determines the order of rows, and the sha256 of every other file and of
itself. A folder gets its final name only once it is complete. `checkpoints/best.safetensors` holds the
weights with the lowest held-out reverse KL of the run so far.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stages.runtime import ending, host_memory
from stages.runtime.distributed import World
from stages.runtime.errors import UserError
from stages.runtime.files import discard, discard_unneeded, new_folder, publish_folder, remove
from stages.runtime.schema import Count, complaint

# Errors that the libraries raise for corrupt files.
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


NAME = re.compile(r"step-\d{6,}")
STRICT = ConfigDict(strict=True, extra="forbid")
BEST = "best.safetensors"
LEFT = (".partial-step-*", ".old-step-*")  # by a process that was killed
WRITTEN = ("student.safetensors", "state.pt")  # in every checkpoint, next to the optimizer files


@dataclass(frozen=True)
class Refresh:
    """Weights that generate rollouts: optimizer step, policy hash, and the reason for the refresh."""

    __pydantic_config__: ClassVar = STRICT
    step: Count
    policy_hash: str
    reason: str


@dataclass(frozen=True)
class Position:
    """Position in training, and the state that decides when a refresh is due and which rows it uses.

    Attributes:
        step: optimizer steps done.
        refresh_index: refresh whose rows are being trained on; 0: those of stage one.
        refreshes: every refresh by index; 0 is the initial student. Other processes are still writing those
            after `refresh_index`.
        opened_at: step at which training switched to the rows of `refresh_index`.
        num_rows: number of this run's rows at that step; 0: unknown.
        recent: drift of the last steps on these rows, oldest first, nats per token.
        adaptive_tau: state of the gate's threshold (`dualkl.thresholds.AdaptiveTau.state`); empty if it is
            constant.
    """

    __pydantic_config__: ClassVar = STRICT
    step: Count
    refresh_index: Count
    refreshes: dict[Count, Refresh] = field(default_factory=dict)
    opened_at: Count = 0
    num_rows: int = 0
    recent: list[float] = field(default_factory=list)
    adaptive_tau: dict[str, float] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """Index of the last refresh that was started."""
        return max(self.refreshes, default=self.refresh_index)

    @property
    def policies(self) -> dict[int, str]:
        """Policy hash of each refresh; this run's rows with other hashes are from an abandoned trajectory."""
        return {index: refresh.policy_hash for index, refresh in self.refreshes.items()}

    def step_of(self, index: int) -> int:
        """Optimizer step of the weights that wrote refresh `index`."""
        return self.refreshes[index].step if index in self.refreshes else 0


@dataclass(frozen=True)
class _State:
    """state.json without its own sha256: the position, and the sha256 of every other file."""

    __pydantic_config__: ClassVar = STRICT
    position: Position
    files: dict[str, str]


_STATE = TypeAdapter(_State)


@dataclass(frozen=True)
class Best:
    """The checkpoint of a run with the lowest held-out reverse KL, nats per token.

    Only values with equal `measured_on`, the held-out text, are comparable; "" marks an older file.
    """

    step: int
    reverse_kl: float
    measured_on: str


def best(folder: Path) -> Best | None:
    """Read the metadata of `folder`'s best weights; None if there are none."""
    path = folder / BEST
    if not path.is_file():
        return None
    with _explained(path), safe_open(path, "pt") as file:
        found = file.metadata()
        return Best(int(found["step"]), float(found["reverse_kl"]), found.get("measured_on", ""))


def save_best(folder: Path, trainable: dict[str, nn.Parameter], kept: Best) -> None:
    """Replace the best weights atomically (main process)."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable.items()}
    metadata = {
        "step": str(kept.step),
        "reverse_kl": repr(kept.reverse_kl),
        "measured_on": kept.measured_on,
        "sha256": _tensor_digest(tensors),
    }
    folder.mkdir(exist_ok=True)
    partial = folder / f".partial-{BEST}"
    remove(partial)  # left by a crash, or a link
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(folder / BEST)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{folder / BEST} could not be written ({error}). Free space and rerun.") from error


@torch.no_grad()
def load_best(folder: Path, trainable: dict[str, nn.Parameter]) -> Best | None:
    """Load the best weights into a student's parameters; return None and change nothing if there are none."""
    kept = best(folder)
    if kept is None:
        return None
    with _explained(folder / BEST):
        stored = load_file(folder / BEST)
        with safe_open(folder / BEST, "pt") as file:
            if file.metadata()["sha256"] != _tensor_digest(stored):
                raise ValueError("its tensors are not what was written")
    _copy(folder / BEST, stored, trainable)
    return kept


def forget_best(folder: Path) -> None:
    """Delete the best weights of an earlier run, before a new one starts."""
    (folder / BEST).unlink(missing_ok=True)


def _tensor_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, sorted by step."""
    found = [
        path
        for path in folder.glob("step-*")
        if NAME.fullmatch(path.name) and (path / "state.json").is_file()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """Newest complete checkpoint in `folder`."""
    return next(reversed(complete(folder)), None)


def of_step(folder: Path, step: int) -> Path:
    """Complete checkpoint of `step`; otherwise a UserError that lists the existing ones."""
    there = complete(folder)
    for path in there:
        if step_of(path) == step:
            return path
    raise UserError(
        f"resume_from {step}: {folder} has no complete checkpoint of that step; there are"
        f" {', '.join(str(step_of(path)) for path in there) or 'none'}."
    )


def discard_after(folder: Path, step: int) -> None:
    """Remove checkpoints after `step`, newest first, and best weights from after it (main process)."""
    for path in reversed(complete(folder)):
        if step_of(path) > step:
            discard(path)
    kept = best(folder)
    if kept is not None and kept.step > step:
        forget_best(folder)


def read_position(path: Path) -> Position:
    with _explained(path):
        return _read_state(path).position


def _read_state(path: Path) -> _State:
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    if state.pop("sha256") != _digest(state):
        raise ValueError("state.json is not what was written")
    try:
        found = _STATE.validate_json(json.dumps(state))
    except ValidationError as error:
        other = "if another version of DualKL wrote it, resume with that version"
        raise ValueError(f"state.json: {complaint(error)}; {other}") from error
    if found.position.step != step_of(path):
        raise ValueError(f"state.json is that of step {found.position.step}")
    return found


@contextmanager
def _explained(path: Path, checked: bool = False) -> Iterator[None]:
    """Turn library errors into a `UserError`: damaged files, or a machine that could not read intact ones.

    `checked`: the digests matched, so only the machine or other library versions can be at fault.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except DAMAGE as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if checked or (isinstance(error, OSError) and not isinstance(error, MISSING)) or "os error" in line:
            raise UserError(
                f"checkpoint {path} could not be read ({line}). The files appear intact; check this"
                " machine (memory, open files, permissions, disk), then run the same command again."
            ) from error
        raise UserError(
            f"checkpoint {path} is damaged ({line}). Delete that folder and rerun: the one before it is used."
        ) from error


class Saver:
    """Writes checkpoints while the run goes on, one at a time.

    Until `settle` has returned, the newest checkpoint may be missing; it is never incomplete.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._host: Any = None  # tensors of the last checkpoint, to be overwritten
        self._is_pending = False  # the same on all ranks

    def begin(
        self,
        folder: Path,
        position: Position,
        trainable: dict[str, nn.Parameter],
        optimizer: Any,
        scheduler: Any,
        world: World,
        keep: int,
        engine: Any = None,
    ) -> Path:
        """Write `step-N` atomically, then remove all but the newest `keep` checkpoints (collective).

        Returns when the weights may change again: they are copied first, if host memory allows.
        """
        self.settle(world)
        final = folder / f"step-{position.step:06d}"
        partial = folder / f".partial-step-{position.step:06d}"
        if world.is_main:
            discard_unneeded(path for pattern in LEFT for path in folder.glob(pattern))
            new_folder(partial)
        world.barrier()
        random_states = world.gather(_random_state(world))
        if engine is not None:  # DeepSpeed shards the optimizer: every rank writes its part
            engine.save_checkpoint(str(partial), tag="deepspeed", exclude_frozen_parameters=True)
            world.barrier()
        is_copied = True
        if world.is_main:
            weights = {name: parameter.detach() for name, parameter in trainable.items()}
            states = {"scheduler": scheduler.state_dict(), "random": random_states}
            state = weights, None if engine is not None else optimizer.state_dict()
            needed = _num_bytes(state) - _num_bytes(self._host)  # Adam has no moments before the first step
            is_copied = needed <= host_memory.free_bytes() / 2
            if is_copied:
                state = self._host = _on_host(state, self._host)
            self._job = self._thread.submit(_write, folder, partial, final, position, *state, states, keep)
        self._is_pending = True
        if not world.gather(is_copied)[0]:
            self.settle(world)
        return final

    def tensors(self) -> list[torch.Tensor]:
        """Those in host memory."""
        return list(_tensors(self._host))

    def settle(self, world: World) -> None:
        """Wait until the checkpoint is on disk; if it could not be written, raise why (collective)."""
        if not self._is_pending:
            return
        self._is_pending = False
        error = self._result()
        problem = world.gather("" if error is None else _text(error))[0]
        if error is not None:
            raise error
        if problem:
            raise UserError(problem)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """However the block or the process ends, a checkpoint that was begun is written first.

        Only a second signal does not wait for it. At the end of the block, prints why it could not be written,
        and frees the copies in host memory. Not collective.
        """
        ending.at_end(self._finish, quick=True)
        try:
            yield
        finally:
            self._finish()
            self._host = None

    def _finish(self) -> None:
        if ending.hurries():
            return
        if self._job is not None and not self._job.done():
            ending.tell("writing the checkpoint that was begun")
        error = self._result()
        if error is not None:
            ending.tell(f"warning: {_text(error)}")

    def _result(self) -> BaseException | None:
        """Wait for the thread; return its error, once."""
        job = self._job
        error = None if job is None else job.exception()
        self._job = None
        return error


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _write(
    folder: Path,
    partial: Path,
    final: Path,
    position: Position,
    weights: dict[str, torch.Tensor],
    optimizer: Any,
    states: dict[str, Any],
    keep: int,
) -> None:
    try:
        _write_files(partial, position, weights, optimizer, states)
        _publish(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own classes
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written ({error}); earlier ones are kept. Free space and rerun."
        ) from error
    discard_unneeded(complete(folder)[:-keep])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from _tensors(part)


def _num_bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _on_host(value: Any, kept: Any) -> Any:
    """`value` with its tensors copied to host memory, into those of `kept`, an earlier one, if they fit."""
    if isinstance(value, torch.Tensor):
        if isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype) == (value.shape, value.dtype):
            return kept.copy_(value)
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        own = kept if isinstance(kept, dict) else {}
        return {key: _on_host(part, own.get(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        same = isinstance(kept, list | tuple) and len(kept) == len(value)
        pairs = zip(value, kept if same else [None] * len(value), strict=True)
        return type(value)([_on_host(part, old) for part, old in pairs])
    return value


def _write_files(
    folder: Path,
    position: Position,
    weights: dict[str, torch.Tensor],
    optimizer: Any,
    states: dict[str, Any],
) -> None:
    """A checkpoint's files, `state.json` with the digests of the others last.

    `optimizer`: its `state_dict`; None under DeepSpeed.
    """
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "student.safetensors")
    if optimizer is not None:
        torch.save(optimizer, folder / "optimizer.pt")
    torch.save(states, folder / "state.pt")
    state = {"position": asdict(position), "files": _file_digests(folder)}
    state = json.loads(json.dumps(state))  # keys as they will be read
    (folder / "state.json").write_text(json.dumps(state | {"sha256": _digest(state)}))


def load(
    path: Path,
    trainable: dict[str, nn.Parameter],
    optimizer: Any,
    scheduler: Any,
    world: World,
    engine: Any = None,
) -> Position:
    """Restore a checkpoint in place; learning rate and weight decay stay those of the configuration."""
    own = [(group["initial_lr"], group["weight_decay"]) for group in scheduler.optimizer.param_groups]
    load_weights(path, trainable)
    with _explained(path, checked=True):
        if engine is not None:
            engine.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)
        else:
            optimizer.load_state_dict(
                torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
            )
        state = torch.load(path / "state.pt", weights_only=True)
        scheduler.load_state_dict(state["scheduler"])
        _set_rates(scheduler, own)
        if len(state["random"]) == world.size:
            _set_random_state(state["random"][world.rank], world)
    return read_position(path)


def _set_rates(scheduler: Any, own: list[tuple[float, float]]) -> None:
    """Set each group's (peak learning rate, weight decay) for the scheduler's current step."""
    scheduler.base_lrs = [peak for peak, _ in own]
    rates = [
        peak * factor(scheduler.last_epoch)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, (peak, decay), rate in zip(scheduler.optimizer.param_groups, own, rates, strict=True):
        group.update(initial_lr=peak, lr=rate, weight_decay=decay)


@torch.no_grad()
def load_weights(path: Path, trainable: dict[str, nn.Parameter]) -> None:
    """Verify the digest of every file, then copy a checkpoint's weights into a student's parameters."""
    with _explained(path):
        found = _read_state(path).files
        optimizer = [file for file in (path / "optimizer.pt", *path.glob("deepspeed/**/*")) if file.is_file()]
        if unnamed := {*WRITTEN, *(str(file.relative_to(path)) for file in optimizer)} - found.keys():
            raise ValueError(f"state.json does not name {min(unnamed)[:100]!r}")
        for name, digest in found.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"state.json names {name[:100]!r}")
            # a single bad read is not damage
            if digest != _file_digest(path / name) and digest != _file_digest(path / name):
                raise ValueError(f"{name} is not what was written")
    with _explained(path, checked=True):
        stored = load_file(path / "student.safetensors")
    _copy(path, stored, trainable)


def _copy(path: Path, stored: dict[str, torch.Tensor], trainable: dict[str, nn.Parameter]) -> None:
    if stored.keys() != trainable.keys():
        raise UserError(
            f"checkpoint {path} holds {len(stored)} trained tensors that do not match the student's"
            f" {len(trainable)}: student_model, use_lora, lora_r or lora_targets changed. Use another"
            " run_name, or the old keys."
        )
    for name, parameter in trainable.items():
        if stored[name].shape != parameter.shape:
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(stored[name].shape)}, the student's is"
                f" {list(parameter.shape)}; lora_r or student_model changed. Use another run_name, or the"
                " old keys."
            )
        parameter.copy_(stored[name])


def _file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _file_digest(path) for path in paths}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _publish(partial: Path, final: Path) -> None:
    if (final / "state.json").is_file():  # the same step, saved before: keep it visible throughout
        shutil.rmtree(partial)
    else:
        publish_folder(partial, final)


def _random_state(world: World) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], world: World) -> None:
    torch.set_rng_state(states["cpu"])
    if world.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], world.device)
