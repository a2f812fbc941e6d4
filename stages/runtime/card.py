"""The model card (README.md) of an exported student: what it is, what trained it, what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from cache.plain import plain
from stages.runtime import history
from stages.runtime.config import Config, name_and_revision
from stages.runtime.cuts import cut_sentence
from stages.runtime.history import Record
from stages.runtime.shares import NORMAL, wilson

KEYS = (
    "tau",
    "alpha",
    "gating",
    "rkl",
    "fkl",
    "temperature",
    "lr",
    "batch_size",
    "max_steps",
    "seed",
    "dataset",
)
"""Keys of the first configuration that the card lists; of later ones it lists the changes."""
ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
NO_LICENCE = "license_name: unknown"
"""In the head of a card without a licence."""
OWN_FOLDERS = re.compile(r"(?<![\w.:/~-])~?/[^\s,:'\"}]*/(?=[^\s,:'\"}])")
"""The folders of an absolute path, which mean nothing elsewhere."""
LABELS = ("before", "after", "teacher")


@dataclass(frozen=True)
class Weights:
    """The exported weights.

    Attributes:
        step: optimizer steps that they were trained for.
        policy_hash: of the student; "" if unknown. Evaluations of other weights are left out.
        merged: whether the adapter is part of the weights.
        licence: overrides the licence found in the base model's README.md.
        usage: Markdown lines on how to load them.
    """

    step: int
    policy_hash: str = ""
    merged: bool = False
    licence: str = ""
    usage: tuple[str, ...] = ()


def model_card(records: list[Record], config: Config, weights: Weights) -> str:
    """README.md of a student, from its run's records and configuration."""
    models = config.models
    teacher = _model(models.teacher_model) or "cached rows of a teacher"
    how = f"LoRA, rank {config.lora.lora_r}" if config.lora.use_lora else "all weights trained"
    how += ", merged" if weights.merged else ""
    lines = [
        *_front_matter(config, weights),
        "",
        f"# {config.run.run_name}",
        "",
        f"Distilled from {teacher} into {_model(models.student_model)} ({how}); weights of step"
        f" {weights.step}.",
        *_unfinished(records, config, weights.step),
        *_measures(records, config, weights),
        "",
        "## Training",
        "",
        _objective(config),
        *_data(records, config),
        "",
        "| steps | trained with |",
        "|---|---|",
        *_spans(records, config),
        *_provenance(records),
        *(("", "## Use", "", *weights.usage) if weights.usage else ()),
        "",
        "## Licence",
        "",
        *_licences(config, weights),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(config: Config, weights: Weights) -> list[str]:
    """The YAML that the hub reads. It refuses names of models and data sets that it does not have."""
    base = name_and_revision(config.models.student_model)[0]
    is_adapter = config.lora.use_lora and not weights.merged
    licence = weights.licence or _licence_of(config.models.student_model)
    names = config.data.dataset if isinstance(config.data.dataset, dict) else [config.data.dataset]
    datasets = [name.partition(":")[0] for name in names if _is_on_hub(name.partition(":")[0])]
    head = {
        **({"base_model": base} if _is_on_hub(base) else {}),
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": licence or "other",
        **({} if licence else {"license_name": "unknown"}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["distillation", "dualkl"],
    }
    return ["---", *yaml.safe_dump(head, sort_keys=False, width=10**6).splitlines(), "---"]


def _is_on_hub(name: str) -> bool:
    return ON_HUB.fullmatch(name) is not None and not Path(name).exists()


def _licence_of(model: str) -> str:
    """Licence that a model's README.md names, in its folder or in the hub's local cache; "" if none does."""
    name, revision = name_and_revision(model)
    path: Any = Path(name) / "README.md"
    if not path.is_file():
        path = try_to_load_from_cache(name, "README.md", revision=revision) if _is_on_hub(name) else None
    if not isinstance(path, str | Path):
        return ""
    try:
        _, head, _ = Path(path).read_text("utf-8", "replace").split("---\n", 2)
        return str(yaml.safe_load(head).get("license") or "")
    except (ValueError, AttributeError, OSError, yaml.YAMLError):
        return ""


def _licences(config: Config, weights: Weights) -> Iterator[str]:
    models = config.models
    for side, name, own in (
        ("the base model", models.student_model, weights.licence),
        ("the teacher", models.teacher_model, ""),
    ):
        if name:
            found = own or _licence_of(name)
            yield f"* {side}, {_model(name)}: {_shown(found) or 'not named in its files; see its page'}"
    yield "* Text of the teacher and of the data set may carry terms of its own."


def _unfinished(records: list[Record], config: Config, step: int) -> Iterator[str]:
    """A paragraph if these are not the weights of the run's last step."""
    done = max((record["step"] for record in records if record["kind"] == "step"), default=step)
    if config.train.export_checkpoint == "best" and step < done:
        yield from ("", "They had the lowest held-out reverse KL of the run.")
    if max(done, step) < config.train.max_steps:
        yield from (
            "",
            f"**The run is not finished: {step} of {config.train.max_steps} steps were trained.**",
        )


# --- what was measured


def _measures(records: list[Record], config: Config, weights: Weights) -> list[str]:
    """A table of held-out figures before and after training and of the teacher; [] without any."""
    found = {
        label: next((r for r in reversed(records) if r["kind"] == "evaluation" and r["label"] == label), {})
        for label in LABELS
    }
    if weights.policy_hash and found["after"].get("policy_hash") != weights.policy_hash:
        found["after"] = {}
    own = {label: record.get("on_student") or {} for label, record in found.items()}
    rows = [
        ("problems solved", *(_share(found[label], "accuracy") for label in LABELS)),
        ("answers cut at max_new_tokens", *(_share(found[label], "cut_share") for label in LABELS)),
        ("forward KL on its own text", *(_kl(own[label], "forward_kl") for label in LABELS)),
        ("reverse KL on its own text", *(_kl(own[label], "reverse_kl") for label in LABELS)),
        ("forward KL on teacher text", *(_kl(found[label], "forward_kl") for label in LABELS)),
        ("reverse KL on teacher text", *(_kl(found[label], "reverse_kl") for label in LABELS)),
    ]
    filled = [row for row in rows if any(cell != "–" for cell in row[1:])]
    if not filled:
        return []
    source = _shown(config.eval.eval_dataset) or "the training data, after its training prompts"
    counts = [record["answers"] for record in found.values() if "answers" in record]
    lines = ["", "## Results", "", "| held out | before | after | teacher |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in filled]
    about = f"{max(counts):,} prompts of {source}" if counts else f"Prompts of {source}"
    checker = (
        f", answers checked by {_shown(config.eval.answer_checker)}" if config.eval.answer_checker else ""
    )
    lines += ["", f"{about}{checker}; KLs in nats a token; 95 % intervals over prompts."]
    return lines if found["after"] else [*lines, "", "These weights were not measured after training."]


def _share(record: Record, name: str) -> str:
    """A share in percent with its 95 % interval (Wilson's), if the number of answers is known."""
    share, n = record.get(name), record.get("answers")
    if share is None:
        return "–"
    if not n or not 0 <= share <= 1:
        return f"{share:.1%}"
    centre, width = wilson(share, n)
    return f"{share:.1%} ({100 * (centre - width):.1f} to {100 * (centre + width):.1f})"


def _kl(record: Record, name: str) -> str:
    value, error = record.get(name), record.get(f"{name}_error")
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {NORMAL * error:.4f}" if error is not None else "")


# --- what trained it


def _objective(config: Config) -> str:
    """The loss of a token in words and symbols."""
    loss = config.loss
    if loss.objective == "jsd":
        return f"Loss of a token: Jensen-Shannon divergence of student and teacher, β = {loss.gating}."
    reverse = "KL(student ‖ teacher)" + (" at the sampled token" if loss.rkl == "mc" else "")
    forward = "KL(teacher ‖ student)" if loss.fkl == "full" else "cross-entropy on the teacher's argmax"
    gates = {
        "soft": f"λ = σ(α (τ − d)), τ = {loss.tau:g} nats, α = {loss.alpha:g}",
        "hard": f"λ = 1 where d is below τ = {loss.tau:g} nats, else 0",
    }
    gate = gates[loss.gating] if isinstance(loss.gating, str) else f"λ = {loss.gating:g}"
    on = {"rkl": "the reverse KL", "fkl": "the forward KL", "teacher_entropy": "the teacher's entropy"}
    of = f", d being {on[loss.gate_on]}" if loss.has_threshold else ""
    moving = f"; τ adapts to keep a mean λ of {loss.tau_share:g}" if loss.tau_share else ""
    return f"Loss of a token: λ {reverse} + (1 − λ) {forward}; {gate}{of}{moving}."


def _data(records: list[Record], config: Config) -> Iterator[str]:
    """Rollouts, the signal kept of the teacher, refreshes, and the share of cut completions."""
    steps = [record for record in records if record["kind"] == "step"]
    signal, limit = config.teacher_signal, config.rollout.max_new_tokens
    of = {
        "topk": f"its {signal.signal_k} most likely tokens",
        "nucleus": f"{signal.signal_p:.0%} of its mass",
    }
    kept = of.get(signal.signal, "its whole distribution")
    refreshes = sum(record["kind"] == "refresh" for record in records)
    yield (
        f"Trained on the student's own completions of up to {limit} tokens, with {refreshes}"
        f" refresh{'es' * (refreshes != 1)}; of the teacher, each token has {kept}."
    )
    rows = [record["cut_share"] for record in steps if record.get("cut_share") is not None]
    if rows:
        tokens = sum(record.get("tokens", 0) for record in steps)
        yield f"{tokens:,} tokens were trained on; {cut_sentence(sum(rows) / len(rows))}."


def _spans(records: list[Record], config: Config) -> Iterator[str]:
    """A table row for each span of steps: the first with its main keys, later ones with what changed."""
    found = history.spans(records)
    first = found[0]["steps"][0] if found else None
    of_first = [record["config"] for record in history.configs(records) if record["from_step"] == first]
    sections = of_first[-1] if of_first else config.model_dump()
    values = {leaf: value for section in sections.values() for leaf, value in section.items()}
    for number, span in enumerate(found):
        what = [f"{name} {_shown(values[name])}" for name in KEYS if name in values and not number]
        what += [
            f"{_shown(key)} {_shown(new)} (was {_shown(old)})" for key, (old, new) in span["changed"].items()
        ]
        yield f"| {span['steps'][0]} to {span['steps'][1]} | {', '.join(what) or 'the same keys'} |"


def _provenance(records: list[Record]) -> Iterator[str]:
    """Versions, processes and command of the last configuration."""
    last = history.last_config(records) or {}
    if versions := last.get("versions"):
        made = ", ".join(f"{_shown(name)} {_shown(version)}" for name, version in versions.items())
        on = f" on {last['processes']} {_shown(last.get('device'))}" if last.get("processes") else ""
        yield from ("", f"Made with {made}{on}.")
    if command := last.get("command"):
        yield from ("", f"    {OWN_FOLDERS.sub('', plain(command))}")


def _model(name: str) -> str:
    """A model's name as Markdown text; a local folder is called one."""
    return _shown(name.rstrip("/")) + (" (a local folder)" if name and Path(name).is_dir() else "")


def _shown(value: Any) -> str:
    """Format a path or setting as Markdown text: on one line, with markup and HTML escaped.

    Of an absolute path the last part alone.
    """
    return re.sub(r"[\\`*\[\]<>|&~]", r"\\\g<0>", OWN_FOLDERS.sub("", plain(str(value))))
