"""Evaluation: KLs on fixed teacher text and on fresh student text, and accuracy at temperature 0."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers.modeling_utils import PreTrainedModel

import cache
from dualkl.divergences import compare
from stages.data.alignment import at_scored
from stages.data.batches import micro_batches, num_tokens, to_tensors
from stages.data.checkers import open_checker, solved
from stages.data.prompts import Prompt, Split, heldout_prompts
from stages.data.signals import cached_head
from stages.loops import setup
from stages.loops.collect import plan, slots_for
from stages.loops.refresh import write_scored
from stages.loops.setup import Vocabulary
from stages.models.dropout import evaluating
from stages.models.policy import Policy
from stages.models.student import Student
from stages.models.teacher import (
    Teacher,
    TeacherLoader,
    plain_model_fits,
    plain_teacher,
)
from stages.runtime import history, metrics, schema
from stages.runtime.config import SignalSection
from stages.runtime.files import discard, replace_text
from stages.runtime.run import Run

NUM_SAMPLES, NUM_LOGGED = 100, 8
DIGITS = 7
SLOW_CHECK = 3.0  # seconds
AUTO_ROWS = 64
# Maximum rows in a unit of evaluation text: lets several processes share few prompts.
UNIT_ROWS = 256
SINGLE = ("by_row", "by_prompt", "text_rows", "of")
HIDDEN = SignalSection(signal="hidden")
HELDOUT_KEYS = (
    "eval_dataset",
    "eval_prompts",
    "dataset",
    "num_prompts",
    "max_prompt_tokens",
    "system_prompt",
    "chat_template_kwargs",
)
"""Keys that decide which prompts are held out, and their text."""
LATER = ("dtype", "sample_temperature", "sample_top_p", "sample_top_k")
"""Settings that results of older versions do not name."""
Result = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """State shared by all evaluations of a run: held-out prompts and the output folder."""

    run: Run
    vocabulary: Vocabulary
    prompts: list[Prompt]

    @property
    def folder(self) -> Path:
        return self.run.folder / "eval"

    @property
    def subject(self) -> dict[str, Any]:
        """Settings under which a result was measured; a kept result must match them."""
        ids = [prompt.prompt_id for prompt in self.prompts]
        config = self.run.config
        subject = {
            "prompts": setup.short_hash("".join(ids)),
            "seed": config.run.seed,
            "max_new_tokens": config.rollout.max_new_tokens,
            "teacher_text": config.eval.eval_teacher_text,
            "answer_checker": config.eval.answer_checker,
            "eos_token": config.rollout.eos_token,
        }
        kind = config.models.teacher_quantization
        rounded = "" if kind == "none" else f" ({kind})"
        teacher = config.models.teacher_model
        return subject | ({"teacher": f"{teacher}{rounded}"} if teacher else {})

    @property
    def student_subject(self) -> dict[str, Any]:
        """The same for a student, but for its weights."""
        config = self.run.config
        own = {name: getattr(config.rollout, name) for name in LATER if name != "dtype"}
        return {**self.subject, "dtype": config.run.dtype, **own}

    @property
    def teacher_text(self) -> str:
        return self.run.config.eval.eval_teacher_text or str(self.folder / "teacher_text")


def open_evaluation(run: Run, vocabulary: Vocabulary, prompts: list[Prompt] | None = None) -> Evaluation:
    """Read the held-out prompts unless they are given."""
    return Evaluation(run, vocabulary, prompts or heldout_of(run, vocabulary))


def heldout_of(run: Run, vocabulary: Vocabulary, split: Split | None = None) -> list[Prompt]:
    """The held-out prompts. Reports which records were skipped, and whether `dataset` was split."""
    found = heldout_prompts(run.config, vocabulary.tokenizer, split)
    if found.skipped or not run.config.eval.eval_dataset:
        run.metrics.say(f"held out: {found.summary}")
    return found.prompts


def measure(
    evaluation: Evaluation, student: Student, policy: Policy, label: str, teacher: TeacherLoader | None
) -> Result:
    """Measure the student; keep the result in eval/<label>.json, where `label` is `before` or `after`.

    Figures: forward_kl, reverse_kl, top1_agreement, accuracy, cut_share, on_student.*. KLs are exact over the
    shared vocabulary, in nats per token; `*_kl_error` are their standard errors, with rows as samples.
    `answers` counts the prompts behind accuracy and cut_share. `cut_share` is the share of answers, or of
    the text measured on, cut off at max_new_tokens. Figures that need a missing teacher or checker are null.
    `policy` is the student's.
    """
    run, path = evaluation.run, evaluation.folder / f"{label}.json"
    subject: Result = {"policy_hash": policy.policy_hash, **evaluation.student_subject}
    if teacher:
        subject["with_teacher"] = True
    found = _kept(run, path, subject)
    if found is not None:
        return found
    if label == "before" or not (evaluation.folder / "before.json").exists():  # else said for `before`
        _say_changes(run, path, subject, "the student, also as it was before training,")
    run.metrics.say(f"measuring the student ({label}) on {len(evaluation.prompts)} held-out prompts")
    with run.clock.phase("evaluate"):
        result = on_teacher_text(evaluation, student)
        result |= _solve(evaluation, policy)
        result["on_student"] = _nothing()
        if teacher:
            root = str(evaluation.folder / f"on_student_{label}")
            row_ids = _write_text(evaluation, policy, root, teacher.get)
            result["on_student"] = divergences(run, student, cache.open(root), row_ids)
    return _keep(run, path, result | {"of": subject}, policy.step)


def is_kept(evaluation: Evaluation, label: str, *, with_teacher: bool) -> bool:
    """Whether eval/<label>.json was measured with the settings of now, whatever the student's weights."""
    subject = evaluation.student_subject | ({"with_teacher": True} if with_teacher else {})
    return _kept(evaluation.run, evaluation.folder / f"{label}.json", subject) is not None


def measure_teacher(evaluation: Evaluation) -> Result:
    """The teacher's accuracy, and its text on the held-out prompts, written once if a plain teacher fits."""
    run, path = evaluation.run, evaluation.folder / "teacher.json"
    found = _kept(run, path, evaluation.subject)
    if found is not None:
        return found
    _say_changes(run, path, evaluation.subject, "the teacher")
    run.metrics.say(f"measuring the teacher on {len(evaluation.prompts)} held-out prompts")
    with run.clock.phase("evaluate"):
        if not run.config.models.teacher_model:
            result: Result = {"accuracy": None, "cut_share": None, "samples": []}
        elif not plain_model_fits(run.config, run.world):
            run.metrics.say(
                "the plain teacher does not fit on this device: its accuracy is not measured"
                + (
                    ""
                    if run.config.eval.eval_teacher_text
                    else ", nor KLs on its text (give eval_teacher_text)"
                )
            )
            result = {"accuracy": None, "cut_share": None, "samples": []}
        else:
            result = _with_plain_teacher(evaluation)
    return _keep(run, path, result | {"of": evaluation.subject}, 0)


def _with_plain_teacher(evaluation: Evaluation) -> Result:
    run = evaluation.run
    policy = setup.load_teacher_policy(run, evaluation.vocabulary)
    result = _solve(evaluation, policy)
    if not run.config.eval.eval_teacher_text:
        scorer = plain_teacher(cast(PreTrainedModel, policy.model), run.world, run.config.train.packing)
        result["text_rows"] = _write_text(evaluation, policy, evaluation.teacher_text, lambda: scorer)
        scorer.close()
    return result


def _write_text(
    evaluation: Evaluation, policy: Policy, root: str, get_teacher: Callable[[], Teacher]
) -> list[str]:
    """Write a completion of each held-out prompt to a `hidden` cache at `root`; return row ids.

    Collective. Resumes an interrupted run.
    """
    run = evaluation.run
    _drop_other_text(run, root, setup.fingerprint(run.config, evaluation.vocabulary, HIDDEN))
    units = plan(
        evaluation.prompts,
        seed=run.config.run.seed,
        run_id=policy.run_id,
        policy_hash=policy.policy_hash,
        refresh_index=0,
        num_rollouts=len(evaluation.prompts),
        group_size=1,
        rollouts_per_unit=min(run.config.rollout.rollouts_per_unit, UNIT_ROWS),
    )
    write_scored(run, units, policy, evaluation.vocabulary, get_teacher, root, HIDDEN)
    return [row.row_id for unit in units for row in unit.rows]


def _drop_other_text(run: Run, root: str, wanted: cache.Fingerprint) -> None:
    """Remove the text at `root`, a folder of the run, if it was written with other settings (collective)."""
    if run.world.is_main and cache.exists(root) and cache.open(root).fingerprint != wanted:
        discard(Path(root))
    run.world.barrier()


def on_teacher_text(evaluation: Evaluation, student: Student) -> Result:
    """`divergences` on the held-out teacher text, nulls without such text (collective).

    Figures are comparable if their `measured_on` is equal.
    """
    if not cache.exists(evaluation.teacher_text):
        return _nothing() | {"measured_on": None}
    snapshot = cache.open(evaluation.teacher_text)
    path, written = evaluation.folder / "teacher.json", None
    if not evaluation.run.config.eval.eval_teacher_text:  # a configured cache is used whole
        written = schema.evaluation(path, evaluation.run.metrics.say).get("text_rows")
    row_ids = written or snapshot.row_ids
    found = divergences(evaluation.run, student, snapshot, row_ids)
    return found | {"measured_on": _measured_on(evaluation.run, snapshot, row_ids)}


def _measured_on(run: Run, snapshot: cache.Snapshot, row_ids: list[str]) -> str:
    """Hash of the row ids, the bytes of their shards, the cache's fingerprint and the student's dtype."""
    wanted = set(row_ids)
    shards = {
        record.shard_sha256 for record in snapshot.commit_records() if wanted.intersection(record.row_ids)
    }
    parts = [run.config.run.dtype, snapshot.fingerprint.must_match, sorted(wanted), sorted(shards)]
    return setup.short_hash(json.dumps(parts, sort_keys=True))


def _nothing() -> Result:
    return dict.fromkeys(("forward_kl", "reverse_kl", "top1_agreement", "tokens", "cut_share"))


@torch.no_grad()
def divergences(run: Run, student: Student, snapshot: cache.Snapshot, row_ids: list[str]) -> Result:
    """Token means of exact forward KL, reverse KL and top-1 agreement on a `hidden` cache (collective).

    `forward_kl_error` and `reverse_kl_error` are standard errors, with rows as samples. `by_row` has the
    sums over each row's tokens, in row-id order.
    """
    if not row_ids:
        return _nothing()
    head = cached_head(snapshot, run.world.device)
    rows = run.config.rollout.lp_micro_batch
    own = [
        snapshot[snapshot.position(row_id)] for row_id in sorted(row_ids)[run.world.rank :: run.world.size]
    ]
    pad_id, size, packed = student.tokenizer.pad_token_id, student.vocab_size, student.packs
    batches = micro_batches(own, num_tokens, AUTO_ROWS if rows == "auto" else rows, None)
    sums: list[list[float]] = []
    with evaluating(student.model):
        for records in batches:
            batch = to_tensors(records, 1.0, head, pad_id, run.world.device, size, packed=packed)
            hidden_Nd = at_scored(student.hidden(batch.aligned), batch.aligned)
            found = compare(hidden_Nd, student.head, batch.teacher, vocab_size=size)
            values_3N = torch.stack([found.fkl, found.rkl, found.student_top1 == found.teacher_top1]).double()
            parts = values_3N.split([len(record.completion_ids) for record in records], dim=1)
            sums += torch.stack([part.sum(1) for part in parts]).tolist()
    found_rows = [
        (record.prompt_id, len(record.completion_ids), *values, record.finish_reason == "length")
        for record, values in zip(own, sums, strict=True)
    ]
    return _of_rows(_interleave(run.world.gather(found_rows)))


def _of_rows(rows: list[tuple[Any, ...]]) -> Result:
    """Token means and standard errors from each row's prompt id, tokens, sums and whether it was cut."""
    prompt_ids, *columns = zip(*rows, strict=True)
    tokens, forward, reverse, agreed, cut = (np.array(column, np.float64) for column in columns)
    total = tokens.sum()
    by_row = {"forward_kl": forward, "reverse_kl": reverse, "top1_agreement": agreed}
    return {
        "forward_kl": float(forward.sum() / total),
        "forward_kl_error": _error(forward, tokens),
        "reverse_kl": float(reverse.sum() / total),
        "reverse_kl_error": _error(reverse, tokens),
        "top1_agreement": float(agreed.sum() / total),
        "tokens": int(total),
        "cut_share": float(cut.mean()),
        "by_row": {
            "prompt_ids": [*prompt_ids],
            "tokens": tokens.astype(int).tolist(),
            **{name: [float(f"{value:.{DIGITS}g}") for value in sums] for name, sums in by_row.items()},
        },
    }


def _error(sums_R: np.ndarray, tokens_R: np.ndarray) -> float | None:
    """Standard error over rows of m = Σ kl / Σ T: √(Σ (kl - m T)² R / (R - 1)) / Σ T; None for one row."""
    count, total = len(sums_R), tokens_R.sum()
    if count < 2:
        return None
    squares = float(np.square(sums_R - sums_R.sum() / total * tokens_R).sum())
    return float((squares * count / (count - 1)) ** 0.5 / total)


def _solve(evaluation: Evaluation, policy: Policy) -> Result:
    """Greedy completions of the held-out prompts: samples, accuracy and the share cut off (collective)."""
    run, spec = evaluation.run, evaluation.run.config.eval.answer_checker
    checker = open_checker(spec)
    own = evaluation.prompts[run.world.rank :: run.world.size]
    greedy = replace(policy, sampling=replace(policy.sampling, greedy=True))
    num_slots = slots_for(run, policy, scores_too=False)
    with closing(policy.engine):
        completions = greedy.generate([prompt.ids for prompt in own], [0] * len(own), num_slots)
    found = []
    numbers = range(run.world.rank + 1, len(evaluation.prompts) + 1, run.world.size)
    for number, prompt, written in zip(numbers, own, completions, strict=True):
        text = cast(str, policy.tokenizer.decode(written.ids, skip_special_tokens=True))
        started = time.perf_counter()
        verdict = solved(checker, spec, prompt, text, number) if checker else None
        if (seconds := time.perf_counter() - started) > SLOW_CHECK:
            run.metrics.say_once(
                f"answer_checker {spec} is slow: it took {seconds:.0f} s for held-out prompt {number}, and is"
                f" asked {len(own)} times in each measurement"
            )
        sample = {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "completion": text,
            "solved": verdict,
            "finish": "length" if written.finish_reason == "length" else "stop",
        }
        found.append(sample)
    everything = _interleave(run.world.gather(found))
    flags = [sample["solved"] for sample in everything]
    cut = [sample["finish"] == "length" for sample in everything]
    return {
        "accuracy": float(np.mean(flags)) if checker else None,
        "answers": len(everything),
        "cut_share": float(np.mean(cut)),
        "by_prompt": {"prompt_ids": [s["prompt_id"] for s in everything], "solved": flags, "cut": cut},
        "samples": everything[:NUM_SAMPLES],
    }


def _interleave(parts: list[list[T]]) -> list[T]:
    """Undo the [rank::size] split."""
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _kept(run: Run, path: Path, subject: Result) -> Result | None:
    """The earlier result at `path` if it has the same subject, else None."""
    found = schema.evaluation(path, run.metrics.say)
    return found if found and not _changes(found, subject) else None


def _changes(found: Result, subject: Result) -> dict[str, list[Any]]:
    """Settings of an earlier result that differ from `subject`, as [before, now]."""
    absent = {"eos_token": ""} | {name: subject[name] for name in LATER if name in subject}
    kept = absent | found.get("of", {})
    return {name: [kept.get(name), new] for name, new in subject.items() if kept.get(name) != new}


def _say_changes(run: Run, path: Path, subject: Result, who: str) -> None:
    """If the result at `path` was measured with other settings, say with which, and that it is replaced."""
    found = schema.evaluation(path, lambda _: None)  # `_kept` has reported it
    changed = _changes(found, subject) if found else {}
    for name in ("policy_hash", "with_teacher"):
        changed.pop(name, None)
    if "prompts" in changed:
        trained = history.last_config(metrics.read(run.metrics.path))
        keys = history.changes(trained["config"], run.config.model_dump()) if trained else {}
        named = {name: pair for name, pair in keys.items() if name in HELDOUT_KEYS}
        changed = named | {name: pair for name, pair in changed.items() if name != "prompts"}
        if not changed:
            data = run.config.eval.eval_dataset or run.config.data.dataset
            run.metrics.say_once(
                f"the held-out prompts of {data} are others than those measured before; {who} is measured again"
                " with the new ones"
            )
    if changed:
        pairs = ", ".join(f"{name} {new} (was {old})" for name, (old, new) in changed.items())
        run.metrics.say_once(
            f"the evaluation's settings have changed: {pairs}; {who} is measured again with the new ones"
        )


def without_rows(result: Result) -> Result:
    """The figures of a result without those of single rows and prompts, and what it was measured on."""
    left = {name: value for name, value in result.items() if name not in SINGLE}
    return {name: without_rows(part) if isinstance(part, dict) else part for name, part in left.items()}


def _keep(run: Run, path: Path, result: Result, step: int) -> Result:
    """Write a result to `path` and to the metrics (collective)."""
    if run.world.is_main:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(result, indent=1))
    figures = without_rows(result)
    figures |= {"samples": result["samples"][:NUM_LOGGED]} if "samples" in result else {}
    figures |= {name: value for name, value in result["of"].items() if name == "policy_hash"}
    run.metrics.log("evaluation", label=path.stem, step=step, **figures)
    run.world.barrier()
    return result
