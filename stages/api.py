"""`distill`: the whole pipeline as one call, for scripts and notebooks, alone or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

import cache as caches
from stages.data import given as given_data
from stages.data.checkers import Checker, keep_checker, open_checker
from stages.loops import sizing
from stages.loops.survey import findings
from stages.models import pretrained
from stages.pipeline import pipeline
from stages.report import collect
from stages.runtime import config as configuration
from stages.runtime import ending, flags, yaml_text
from stages.runtime.config import SECTION_OF, Config, name_and_revision
from stages.runtime.errors import UserError
from stages.runtime.run import Run, start
from stages.runtime.terminal import Style

Listener = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Distilled:
    """A finished run. `report`: the content of report.json."""

    config: Config
    report: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def student_path(self) -> Path:
        """The trained student: a PEFT adapter, or a whole model with use_lora false."""
        return self.folder / "student"

    @property
    def cache(self) -> caches.Snapshot:
        """The rollouts and the teacher's signals."""
        return caches.open(self.config.cache_root)


def distill(
    student: Any,
    teacher: Any,
    dataset: Any,
    *,
    eval_dataset: Any = "",
    answer_checker: str | Checker = "",
    on_step: Listener | None = None,
    on_refresh: Listener | None = None,
    on_end: Callable[[Distilled], Any] | None = None,
    **keys: Any,
) -> Distilled:
    """Distil `teacher` into `student` on the prompts of `dataset`, or go on with a run that was interrupted.

    Args:
        student, teacher: a folder, a name on the hub, or a tokenizer loaded from one, which then replaces the
            model's own (e.g. with another chat template).
        dataset, eval_dataset: a name or path as in the configuration, {name: weight}, or rows: a list, a
            `datasets.Dataset` or any finite iterable of records, prompts or lists of chat turns. Rows are
            kept in a file of the run; it goes on only with the same rows. Held-out prompts are split off
            `dataset` unless `eval_dataset` is given; `eval_prompts=0` turns evaluation off.
        answer_checker: as in the configuration, or a function (row, completion) -> bool.
        on_step, on_refresh: called with the record of each optimizer step and refresh (docs/metrics.md).
        on_end: called with the result. All three are called in the main process only.
        keys: any configuration key. Sizes that are not given are chosen from models, data and machine.

    Ctrl-C and SIGTERM end training after the current step, with a checkpoint; then KeyboardInterrupt or
    SystemExit(143) is raised. The same call goes on from there.

    Returns the same on all processes. Raises `UserError` (a ValueError) for mistakes that a user can mend.
    A call that is refused leaves no files.
    """
    _check_callable(on_step=on_step, on_refresh=on_refresh, on_end=on_end)
    keys.setdefault("run_name", _run_name(student))
    keys["answer_checker"] = keep_checker(answer_checker) if callable(answer_checker) else answer_checker
    asked = _parsed({key: value for key, value in keys.items() if value != ""})
    open_checker(asked.eval.answer_checker)
    folder = asked.run_folder
    with ending.raising(), given_data.kept_if_begun(folder):
        keys |= {
            "student_model": _model("student_model", student, folder),
            "teacher_model": _model("teacher_model", teacher, folder),
            "dataset": _rows("dataset", dataset, folder),
            "eval_dataset": _rows("eval_dataset", eval_dataset, folder),
        }
        with given_data.named_as_given(dataset=keys["dataset"], eval_dataset=keys["eval_dataset"]):
            config, lines = _configure({key: value for key, value in keys.items() if value != ""})
            return _run(config, lines, _listeners(on_step, on_refresh), on_end)


def _run(
    config: Config,
    lines: list[str],
    listeners: list[Listener],
    on_end: Callable[[Distilled], Any] | None,
) -> Distilled:
    was_grouped = dist.is_initialized()
    run = start(config, Style())
    try:
        _check_same(run)
        for line in lines:
            run.metrics.say(line)
        run.metrics.listeners += listeners
        pipeline(run)
        done = Distilled(
            config, run.world.gather(collect(run.folder, config) if run.world.is_main else {})[0]
        )
        if on_end is not None and run.world.is_main:
            on_end(done)
        return done
    finally:
        ending.run_tasks()  # another call, or command, may take the run's lock
        if run.world.size == 1 and dist.is_initialized() and not was_grouped:
            dist.destroy_process_group()


def _check_callable(**listeners: Any) -> None:
    for name, value in listeners.items():
        if value is not None and not callable(value):
            raise UserError(f"{name} is {value!r}; expected a function of one argument, or None.")


def _run_name(student: Any) -> str:
    return sizing.run_name(str(getattr(student, "name_or_path", student)))


def _model(key: str, value: Any, folder: Path) -> str:
    """The name of a model; for a tokenizer that differs from the model's own, a folder that has both."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    name = str(getattr(value, "name_or_path", ""))
    if not isinstance(value, PreTrainedTokenizerBase) or not name:
        hint = f", e.g. {name}" if name else ""
        raise UserError(
            f"{key} is of type {type(value).__name__}; give the folder or the name of a model{hint}, or a"
            " tokenizer loaded from it."
        )
    if _state(value) == _state(pretrained.load_tokenizer(name)):
        return name
    return given_data.keep_tokenizer(folder, key, value, _local(name))


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    return tokenizer.get_vocab(), tokenizer.chat_template, tokens


def _local(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    where, revision = name_and_revision(name)
    return Path(snapshot_download(where, revision=revision))


def _rows(key: str, value: Any, folder: Path) -> Any:
    if given_data.is_name(value):
        return value if isinstance(value, dict) else os.fspath(value)
    return given_data.keep_rows(folder, key, value)


def _configure(keys: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration with sizes for what is not given, and lines that say what was found."""
    asked = _parsed(keys)
    given = {leaf: sizing.value_of(asked, leaf) for leaf in keys}
    machine = sizing.this_machine(int(os.environ.get("WORLD_SIZE", "1")), asked.run.device)
    found, chosen = sizing.configure(asked, machine, given)
    sizes = ", ".join(f"{leaf} {choice.value}" for leaf, choice in chosen.items() if leaf not in given)
    config = sizing.config_of(chosen)
    return config, [*findings(asked, found), _split(config, found.data.num_usable), f"sizes     {sizes}"]


def _split(config: Config, usable: int) -> str:
    """A line that says which prompts are trained on and held out."""
    trained, heldout = config.data.num_prompts or "all other", config.eval.eval_prompts
    where = f"from {config.eval.eval_dataset}" if config.eval.eval_dataset else "from the same data"
    held = f"{heldout} held out {where}" if heldout else "none held out: no evaluation"
    return f"split     {trained} prompts to train on, of {usable:,} that can be used; {held}"


def _parsed(keys: Mapping[str, Any]) -> Config:
    if wrong := [key for key in keys if key not in SECTION_OF]:
        raise UserError(flags.unknown_key(wrong[0], "in the call of distill", SECTION_OF))
    return configuration.parse_arguments([f"--{key}={_text(value)}" for key, value in keys.items()], "")


def _text(value: Any) -> str:
    """A key's value as on a command line."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return yaml_text.write_line({"key": value}).removeprefix("{key: ").removesuffix("}")


def _check_same(run: Run) -> None:
    """UserError if the processes were given different arguments (collective)."""
    everyone = run.world.gather(run.config.model_dump())
    free = {"micro_batch_tokens", "gradient_checkpointing"}
    for rank, other in enumerate(everyone):
        for section, values in other.items():
            for leaf, value in values.items():
                if leaf not in free and value != everyone[0][section][leaf]:
                    raise UserError(
                        f"process {rank} was given {leaf} {value}, process 0 {everyone[0][section][leaf]};"
                        " call distill with the same arguments and rows in every process."
                    )


def _listeners(on_step: Listener | None, on_refresh: Listener | None) -> list[Listener]:
    def tell(record: dict[str, Any]) -> None:
        listener = {"step": on_step, "refresh": on_refresh}.get(record["kind"])
        if listener is not None:
            listener(dict(record))

    return [tell]
