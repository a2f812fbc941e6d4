"""Stage one beside a training run: write rollouts of its newest published student until it finishes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stages.engine.opening import open_engine
from stages.loops import preflight, refresh, setup, versions
from stages.loops.elsewhere import wait_for
from stages.loops.versions import Version
from stages.models.student import Student, load_student, policy_hash
from stages.models.teacher import TeacherLoader
from stages.runtime import checkpoint
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of


def arguments_of(folder: str, rest: list[str]) -> list[str]:
    """Command line of a follower: the configuration of the run in `folder`, then the changes in `rest`."""
    path = Path(folder)
    own = ["--config", str(path / "config.yaml")]
    if not (path / "config.yaml").exists():
        if "--config" not in rest:
            raise UserError(
                f"there is no run to follow at {folder} (no config.yaml); start `dualkl train`"
                " first, or give its --config here too."
            )
        own = []
    place = ["--runs_dir", str(path.parent), "--run_name", path.name, "--wandb_project", ""]
    return [*own, *rest, *place]


def follow(run: Run) -> None:
    """Write the missing rollouts of each newest version until the run is finished (collective).

    Until a version is published, the initial student writes refresh 0. Can be killed and restarted anytime.
    """
    if run.config.refresh.refresh_mode != "external":
        raise UserError(
            f"the run in {run.folder} has refresh_mode {run.config.refresh.refresh_mode}, so its training"
            " ignores rollouts of other processes; set refresh_mode: external for both commands."
        )
    refresh.refuse_role(run.config)
    ready = preflight.check_early(run, preflight.Work(generates=True, scores=True))
    vocabulary = ready.vocabulary
    with run.clock.phase("load"):
        student = load_student(run.config, run.world.device, vocabulary.size, vocabulary.tokenizer)
    engine = open_engine(student.model)
    start = Version(0, 0, policy_hash(student), len(rollouts_of(run.config, 0)))
    written: Version | None = None

    def look() -> Version | Literal["finished"] | None:
        version, finished = run.world.gather((_wanted(run, start), versions.is_finished(run.folder)))[0]
        if version is not None and version != written:
            return version
        return "finished" if finished else None

    with TeacherLoader(run.config, run.world, run.metrics.say_once) as teacher:
        while isinstance(version := wait_for(look), Version):
            _load(run, student, version)
            policy = setup.student_policy(run, student, engine, version.step)
            num_units = refresh.write_rollouts(
                run, policy, vocabulary, ready.prompts, refresh_index=version.refresh_index, teacher=teacher
            )
            _record(
                run, version, num_units, refresh.check_generator(run, student, engine, version.refresh_index)
            )
            written = version
    run.metrics.say(f"{run.folder} is finished: nothing more to write")


def _wanted(run: Run, start: Version) -> Version | None:
    """The newest version; if there is none, the initial student, unless the run already has a checkpoint."""
    untrained = checkpoint.latest(run.folder / "checkpoints") is None
    return versions.newest(run.folder) or (start if untrained else None)


def _load(run: Run, student: Student, version: Version) -> None:
    wanted = len(rollouts_of(run.config, version.refresh_index))
    if wanted != version.num_rollouts:
        raise UserError(
            f"the run wants {version.num_rollouts} rollouts of version {version.name}, this command would"
            f" write {wanted}; do not override rollouts_per_refresh, group_size, batch_size, max_steps or the"
            " refresh keys here."
        )
    if version.refresh_index:
        versions.load(run.folder, student, version)


def _record(run: Run, version: Version, num_units: int, probe: dict[str, float]) -> None:
    index = version.refresh_index
    found = {
        "step": version.step,
        "refresh_index": index,
        "units": num_units,
        "policy_hash": version.policy_hash,
    }
    run.metrics.log("version", **found, **probe)
    run.log_totals("rollout")
    run.metrics.say(f"refresh {index} (step {version.step}): {num_units} units written")
