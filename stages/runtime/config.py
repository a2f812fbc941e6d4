"""The typed configuration: every key, its type and its default (Qwen scale), and how files and flags set it.

Sections only group keys for the reader: leaf names are unique, so `--tau 0.5` and `loss: {tau: 0.5}` are the same setting.
Later sources win: typed defaults, then each `--config` file in order, then flags.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stages.runtime.errors import UserError
from stages.runtime.split import rollouts_of
from stages.runtime.unread import check_unread

Auto = Literal["auto"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RunSection(Section):
    run_name: str = Field(
        "run", min_length=1, pattern=r"^[.]*[\w-][\w.-]*$", description="folder below runs_dir"
    )
    runs_dir: str = Field("runs", description="where runs leave their folders")
    cache_dir: str = Field("", description="the teacher cache; empty: <run folder>/cache")
    extra_caches: dict[str, Annotated[Finite, Field(ge=0)]] = Field(
        {},
        description="further caches to train on, root: rows drawn from it for each row of the run's own cache",
    )
    seed: int = Field(0, ge=0, description="seeds prompts, rollouts, LoRA initialisation and batch order")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="compute and frozen weights; trained weights are fp32"
    )


class ModelSection(Section):
    student_model: str = Field("Qwen/Qwen3-4B", description="hub name or folder")
    student_revision: str = Field("main", description="branch, tag or commit on the hub")
    student_adapter: str = Field("", description="a LoRA adapter to start from (use_lora)")
    teacher_model: str = Field("Qwen/Qwen3-32B", description="hub name or folder; empty: none at hand")
    teacher_revision: str = Field("main", description="branch, tag or commit on the hub")
    teacher_dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="teacher's compute and stored hidden states"
    )
    teacher_ds_zero3: bool = Field(
        True, description="shard the teacher over all processes with DeepSpeed ZeRO-3"
    )
    teacher_ds_config: str = Field(
        "", description="own DeepSpeed JSON (stage 3; CPU or NVMe offload); empty: built in"
    )
    attn_implementation: str = Field("sdpa", description="transformers' attention of both models")


class LoraSection(Section):
    use_lora: bool = Field(True, description="train LoRA adapters; false: all weights")
    lora_r: int = Field(64, ge=1, description="rank")
    lora_alpha: int = Field(128, ge=1, description="scale; the update is alpha / r times B A")
    lora_dropout: Finite = Field(0.0, ge=0, lt=1, description="dropout before A")
    lora_targets: str = Field(
        "all-linear", description="'all-linear' (head excluded) or names joined by commas"
    )


def _weighted(value: Any) -> Any:
    """A list of data sets, or of {data set: weight}, as one map; each named once, however its path is written."""
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list) or not all(isinstance(each, str | dict) for each in parts):
        return value
    pairs = [pair for each in parts for pair in (each.items() if isinstance(each, dict) else [(each, 1)])]
    if len({os.path.realpath(os.path.expanduser(str(name))) for name, _ in pairs}) < len(pairs):  # noqa: PTH111
        raise ValueError("names a data set twice")
    return dict(pairs)


Weights = Annotated[dict[str, Annotated[Finite, Field(gt=0)]], Field(min_length=1)]


class DataSection(Section):
    dataset: Annotated[str | Weights, BeforeValidator(_weighted)] = Field(
        "tulu3",
        description="tulu3, a hub data set NAME or NAME:CONFIG, a local file or folder, or several: {data set: weight}",
    )
    dataset_split: str = Field("train", description="split, where the data set has several")
    num_prompts: int = Field(16384, ge=0, description="prompts drawn from the data set (seeded); 0: all")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt after the chat template, tokens")
    overlong: Literal["skip", "error"] = Field(
        "skip", description="what to do with longer prompts (skips are counted)"
    )
    allow_skipped: Finite = Field(
        0.5,
        ge=0,
        le=1,
        description="largest share of a data set's records that may be skipped, of more than 50",
    )
    system_prompt: str = Field("", description="system message of records that have none; empty: none")
    chat_template_kwargs: dict[str, Any] = Field(
        {"enable_thinking": False}, description="passed to the chat template"
    )


def _joined(value: Any) -> Any:
    """A list of names as names joined by commas."""
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return ",".join(value) if is_list else value


class RolloutSection(Section):
    group_size: int = Field(4, ge=1, description="completions for each prompt")
    max_new_tokens: int = Field(512, ge=1, description="longest completion, tokens")
    eos_token: Annotated[str, BeforeValidator(_joined)] = Field(
        "",
        description="tokens that end a completion, joined by commas, in place of the student's own; empty: its own",
    )
    sample_temperature: Finite = Field(1.0, gt=0, description="sampling temperature of rollouts")
    sample_top_p: Finite = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    sample_top_k: int = Field(0, ge=0, description="top-k sampling; 0: off")
    gen_micro_batch: int | Auto = Field(
        "auto", description="rollouts that a process decodes together; auto: what the free GPU memory holds"
    )
    lp_micro_batch: int | Auto = Field(
        "auto",
        description="most rows in one scoring or training forward; auto: no cap but tokens, 64 in training on a CPU",
    )
    score_tokens: int | Auto = Field(
        "auto",
        description="tokens, padding included, in one scoring forward; auto: what the free GPU memory holds",
    )
    rollouts_per_unit: int = Field(
        1024,
        ge=1,
        description="rollouts made and committed together: enough for full batches to the end, minutes of work"
        " that a crash can cost; processes take units in turn, so let them share rollouts_per_refresh evenly",
    )
    role: Literal["generate", "score", "both"] = Field(
        "both", description="of stages.rollout: generate and score may run apart and meet at the cache"
    )
    score_patience: Finite = Field(
        60.0, gt=0, le=300, description="minutes that role score waits for the next unit"
    )
    offload_idle: bool = Field(
        False,
        description="student in host memory while a teacher scores, a plain teacher while the student writes",
    )


class SignalSection(Section):
    signal: Literal["topk", "nucleus", "hidden", "full"] = Field(
        "topk", description="what is kept of the teacher"
    )
    signal_k: int = Field(64, ge=1, description="ids kept by topk; most ids kept by nucleus")
    signal_p: Finite = Field(0.99, gt=0, le=1, description="mass kept by nucleus")
    signal_floor: int = Field(4, ge=1, description="fewest ids kept by nucleus")


class LossSection(Section):
    tau: Finite = Field(1.0, ge=0, description="gate threshold on the reverse KL, nats")
    alpha: Finite = Field(5.0, ge=0, description="gate sharpness, 1/nats")
    gating: Literal["soft", "hard", "fixed"] = Field(
        "soft", description="sigmoid, step, or the constant `mix`"
    )
    mix: Finite = Field(0.5, ge=0, le=1, description="weight of the reverse KL under gating: fixed")
    rkl: Literal["exact", "mc"] = Field("exact", description="reverse KL: exact, or at the sampled token")
    fkl: Literal["full", "argmax"] = Field(
        "full", description="forward KL: full, or cross-entropy on the argmax"
    )
    temperature: Finite = Field(1.0, gt=0, description="of both distributions in the loss")
    importance_cap: float = Field(
        5.0, gt=0, description="cap on student/behaviour probability ratios (rkl: mc)"
    )
    tail_floor: Finite = Field(
        1e-8, ge=0, lt=1, description="least probability of the tail bucket (topk, nucleus)"
    )
    objective: Literal["gated", "jsd"] = Field(
        "gated", description="gated dual KL, or Jensen-Shannon with β = mix"
    )
    gate_on: Literal["rkl", "fkl", "teacher_entropy"] = Field(
        "rkl", description="compared with tau (entropy: as cached)"
    )
    teacher_smoothing: Finite = Field(0.0, ge=0, lt=1, description="uniform part mixed into the teacher")


class GateSection(Section):
    tau_schedule: Literal["constant", "linear", "cosine", "adaptive"] = Field(
        "constant",
        description="tau over the run: it stays, moves to tau_end, or follows the divergences seen",
    )
    tau_end: Finite = Field(0.1, ge=0, description="tau of the last step, nats (linear, cosine)")
    tau_share: Finite = Field(
        0.7, gt=0, lt=1, description="adaptive: mean of λ to keep; tau is the first step's"
    )
    tau_rate: Finite = Field(
        0.1, gt=0, le=1, description="adaptive: part of the way to a step's own threshold"
    )


class TrainSection(Section):
    batch_size: int = Field(256, ge=1, description="rollouts in an optimizer step, over all processes")
    grad_accum: int = Field(8, ge=1, description="micro-steps of a process in an optimizer step")
    micro_batch_tokens: int | Auto = Field(
        "auto",
        description="cap on tokens of a training forward; auto: what the GPU's memory holds, no cap on a CPU",
    )
    packing: bool | Auto = Field(
        "auto", description="on | off: rows without padding; auto: where that is exact"
    )
    compile: bool | Auto = Field(
        "auto", description="torch.compile the student's layers for training; auto: on a GPU"
    )
    max_steps: int = Field(256, ge=1, description="optimizer steps")
    lr: Finite = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    lr_min_ratio: Finite = Field(0.1, ge=0, le=1, description="final learning rate / peak (cosine)")
    warmup_steps: int = Field(10, ge=0, description="linear warm-up, steps")
    weight_decay: Finite = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: Finite = Field(1.0, gt=0, description="gradient clipping (global norm)")
    gradient_checkpointing: bool = Field(True, description="recompute activations in the backward pass")
    checkpoint_every: int = Field(
        50, ge=1, description="steps between checkpoints (one precedes every refresh)"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    resume_from: int = Field(
        0,
        ge=0,
        description="go on from the checkpoint of this step and discard later ones; 0: from the newest",
    )
    export_checkpoint: Literal["last", "best"] = Field(
        "last", description="what becomes the student (best: eval_every)"
    )


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class RefreshSection(Section):
    refresh_mode: Annotated[Literal["inline", "external", "off"], BeforeValidator(_off)] = Field(
        "inline",
        description="by these processes, by `stages.rollout --follow` elsewhere, or never: train on what is there",
    )
    refresh_every: int = Field(32, ge=0, description="steps between refreshes; 0: not by steps")
    refresh_drift: Finite = Field(
        0.0, ge=0, description="refresh at this KL(behaviour || student), nats a token; 0: off"
    )
    refresh_ess: Finite = Field(
        0.0, ge=0, le=1, description="refresh at this effective share of the sample; 0: off"
    )
    refresh_age: Finite = Field(
        0.0, ge=0, description="refresh at this mean age of the pool's rows, steps; 0: off"
    )
    refresh_min_steps: int = Field(1, ge=1, description="fewest steps between refreshes")
    drift_window: int = Field(4, ge=1, description="steps that drift and effective share are averaged over")
    drift_to_forward: Finite = Field(
        0.0,
        ge=0,
        description="nats that tau is lowered by for each nat of a row's drift, towards forward KL; 0: off",
    )
    rollouts_per_refresh: int = Field(
        8192, ge=1, description="rollouts written by stage one and by each refresh"
    )
    replay_share: Finite = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of rollouts_per_refresh that stays, newest first, while the rest is written anew",
    )
    max_age: int = Field(64, ge=0, description="steps after which a row of this run leaves the pool")
    max_staleness: int = Field(
        64, ge=0, description="external: training waits where the newest rows are older than this many steps"
    )


class EvalSection(Section):
    eval_dataset: str = Field(
        "", description="held-out prompts, as `dataset`; empty: the prompts after num_prompts"
    )
    eval_split: str = Field("test", description="split, where the data set has several")
    eval_prompts: int = Field(256, ge=1, description="held-out prompts measured")
    eval_every: int = Field(
        0, ge=0, description="steps between held-out KLs on teacher text while training; 0: none"
    )
    answer_checker: str = Field(
        "", description="gsm8k, or path/to/file.py:function(row, completion) -> bool; empty: none"
    )
    eval_teacher_text: str = Field(
        "", description="a hidden cache of teacher completions, where no plain teacher fits"
    )


class LogSection(Section):
    wandb_project: str = Field("", description="log to this Weights & Biases project; empty: off")
    wandb_name: str = Field("", description="its run name; empty: run_name")
    wandb_mode: Literal["online", "offline"] = Field(
        "online", description="offline: written below the run folder"
    )
    trace_every: int = Field(
        10, ge=0, description="steps between per-token traces (λ, KLs) of a few rows; 0: none"
    )


class Config(Section):
    run: RunSection = RunSection()
    models: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    teacher_signal: SignalSection = SignalSection()
    loss: LossSection = LossSection()
    gate: GateSection = GateSection()
    train: TrainSection = TrainSection()
    refresh: RefreshSection = RefreshSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @property
    def run_folder(self) -> Path:
        return Path(self.run.runs_dir) / self.run.run_name

    @property
    def refreshes(self) -> bool:
        """Whether any refresh can become due."""
        policy = self.refresh
        policies = policy.refresh_every, policy.refresh_drift, policy.refresh_ess, policy.refresh_age
        return policy.refresh_mode == "external" or (policy.refresh_mode == "inline" and any(policies))

    @property
    def cache_root(self) -> str:
        return self.run.cache_dir or str(self.run_folder / "cache")

    @property
    def unscored_root(self) -> str:
        """Where `role: generate` leaves what `role: score` takes."""
        return self.cache_root.rstrip("/") + "-unscored"


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type)
}
SECTION_OF = {leaf: name for name, section in SECTIONS.items() for leaf in section.model_fields}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; people mean a number. PyYAML takes the last of equal keys; people lose the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise UserError(
                        f"the key {_shown(key.value)} is given twice (line {key.start_mark.line + 1}); keep one"
                    )
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
# The resolvers of a first character are tried in order; integers must come before the wider float pattern.
# Dates stay text: no key is one, and a run's name may look like one.
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = sorted(
        (pair for pair in _resolvers if pair[0] != "tag:yaml.org,2002:timestamp"),
        key=lambda pair: pair[0] != "tag:yaml.org,2002:int",
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
MOST_BYTES, MOST_VALUES, MOST_DEEP, MOST_SHOWN = 2**20, 10_000, 20, 200


def read_yaml(text: str) -> Any:
    """Plain values (texts, numbers, lists, dicts with text keys); ValueError with a short reason for anything else."""
    try:
        return _plain(yaml.load(text, _Loader), [MOST_VALUES], 0)
    except UserError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # a constructor raises whatever Python's own functions do
        raise ValueError(_short(" ".join(str(error).split()) or type(error).__name__)) from None


def _plain(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MOST_DEEP:
        raise ValueError(f"it holds more than {MOST_VALUES} values, or more than {MOST_DEEP} levels of them")
    if isinstance(value, dict):
        if names := [key for key in value if not isinstance(key, str | int | float)]:
            raise ValueError(f"a key is {_shown(names[0])}; use text")
        return {key: _plain(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, left, depth + 1) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(
            f"a value is of type {type(value).__name__}; use text, numbers, lists and dictionaries"
        )
    return value


def _short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _shown(value: Any) -> str:
    try:
        return _short(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def parse_arguments(arguments: list[str], description: str) -> Config:
    """The configuration of a command line: `--config FILE` (repeatable) and `--KEY VALUE` for any key.

    Errors: `UserError` that names the key, the nearest real one, and the type that was expected; one for a key that was set
    and has no effect.
    """
    parser = _parser(description)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(_unknown_key(unknown[0].split("=")[0].lstrip("-"), "on the command line"))
    flags = {
        leaf: _from_text(leaf, text)
        for leaf, text in vars(known).items()
        if leaf != "config" and text is not None
    }
    sources = [(f"in {path}", _read_file(Path(path))) for path in known.config] + [
        ("on the command line", flags)
    ]
    values: dict[str, dict[str, Any]] = {}
    for _, leaves in sources:
        for leaf, value in leaves.items():
            values.setdefault(SECTION_OF[leaf], {})[leaf] = value
    config = build(values)
    check_unread(sources, config.gate.tau_schedule)
    return config


def build(values: dict[str, dict[str, Any]]) -> Config:
    """Validates nested values and the arithmetic between them."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_invalid(error)) from None
    _check(config)
    return config


def _invalid(error: ValidationError) -> str:
    """One sentence for the first invalid key, with every type that it could have had."""
    errors = error.errors()
    section, leaf = errors[0]["loc"][:2]
    wishes = dict.fromkeys(e["msg"].lower() for e in errors if e["loc"][:2] == (section, leaf))
    return f"config key {section}.{leaf}: {' or '.join(wishes)}, got {_shown(errors[0]['input'])}."


def to_yaml(config: Config) -> str:
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML; repeatable, later wins"
    )
    for section_name, section in SECTIONS.items():
        group = parser.add_argument_group(section_name)
        for leaf, field in section.model_fields.items():
            bare = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            text = f"{field.description} (default: {field.default!r})".replace("%", "%%")
            group.add_argument(f"--{leaf}", metavar="VALUE", default=None, help=text, **bare)  # type: ignore[arg-type]
    return parser


def _read_file(path: Path) -> dict[str, Any]:
    """Leaves of a YAML file, whether they stand in their section or at the top level."""
    if not path.is_file():
        raise UserError(f"config file {path} does not exist (looked in {Path.cwd()}).")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"config file {path} has {path.stat().st_size} bytes; a configuration has at most {MOST_BYTES}."
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UserError(
            f"config file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except ValueError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold keys and values, got {type(content).__name__}.")
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: section {key} must hold keys and values, got {_shown(value)}.")
            found = _leaves(value, f"in section {key} of {path}")
        else:
            found = _leaves({key: value}, f"in {path}")
        if twice := leaves.keys() & found.keys():
            raise UserError(
                f"config file {path} gives the key {min(twice)} in two places, in sections or outside; keep one."
            )
        leaves |= found
    return leaves


def _leaves(values: dict[str, Any], where: str) -> dict[str, Any]:
    for leaf in values:
        if leaf not in SECTION_OF:
            raise UserError(_unknown_key(str(leaf), where))
    return values


def _unknown_key(key: str, where: str) -> str:
    key = _short(key)
    near = difflib.get_close_matches(key, [*SECTION_OF, *SECTIONS], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; `python -m stages.pipeline --help` lists all keys."
    return f"unknown key {key} {where}{hint}"


def _from_text(leaf: str, text: str) -> Any:
    annotation = SECTIONS[SECTION_OF[leaf]].model_fields[leaf].annotation
    is_name = str in get_args(annotation) and not text.startswith(("{", "["))
    if annotation is str or is_name:
        return text
    try:
        return read_yaml(text)
    except UserError as error:
        raise UserError(f"config key {leaf}: {error}.") from None
    except ValueError:
        return text


def _check(config: Config) -> None:
    rollout, signal, loss = config.rollout, config.teacher_signal, config.loss
    for name in ("gen_micro_batch", "lp_micro_batch", "score_tokens"):
        value = getattr(rollout, name)
        if value != "auto" and value < 1:
            raise UserError(f"config key {name} must be at least 1 or auto, got {value}.")
    if config.train.micro_batch_tokens != "auto" and config.train.micro_batch_tokens < 1:
        raise UserError(
            f"config key micro_batch_tokens must be at least 1 or auto, got {config.train.micro_batch_tokens}."
        )
    if config.train.export_checkpoint == "best" and not config.eval.eval_every:
        raise UserError("export_checkpoint: best needs held-out KLs to choose by; set eval_every above 0.")
    if signal.signal == "nucleus" and signal.signal_floor > signal.signal_k:
        raise UserError(
            f"signal_floor {signal.signal_floor} is above signal_k {signal.signal_k}, the most ids kept; lower it."
        )
    if config.refresh.rollouts_per_refresh % rollout.group_size:
        raise UserError(
            f"rollouts_per_refresh {config.refresh.rollouts_per_refresh} is not a multiple of group_size"
            f" {rollout.group_size}; change one of them."
        )
    _check_adapter(config)
    _check_refresh(config)
    _check_gate(config)
    if loss.gate_on != "rkl" and loss.gating == "fixed":
        raise UserError(
            f"gate_on: {loss.gate_on} needs a gate, but gating is fixed; use gating: soft or hard."
        )
    if loss.objective == "jsd" and (
        (loss.gating, loss.rkl, loss.fkl) != ("fixed", "exact", "full") or loss.mix in (0, 1)
    ):
        raise UserError(
            "objective: jsd needs gating: fixed, rkl: exact, fkl: full and a mix (its β) between 0 and 1."
        )
    if loss.rkl == "mc" and (rollout.sample_top_p < 1 or rollout.sample_top_k > 0):
        raise UserError(
            "rkl: mc needs rollouts from the whole distribution, but sample_top_p < 1 or sample_top_k > 0 cuts it"
            " (the estimate would be biased); set sample_top_p 1 and sample_top_k 0, or rkl: exact."
        )
    if loss.temperature != 1 and signal.signal in ("topk", "nucleus"):
        raise UserError(
            f"temperature {loss.temperature} cannot be had from signal {signal.signal}, which is stored at temperature 1;"
            " use signal: hidden or full, or temperature 1."
        )
    if loss.rkl == "mc" and loss.temperature != 1:
        raise UserError(
            "rkl: mc reads the teacher's logprobs at temperature 1; use temperature 1 or rkl: exact."
        )


def _check_adapter(config: Config) -> None:
    if config.models.student_adapter and not config.lora.use_lora:
        raise UserError(
            "student_adapter needs use_lora; for full fine-tuning merge the adapter into the model first."
        )
    if "lm_head" in [name.strip() for name in config.lora.lora_targets.split(",")]:
        raise UserError(
            "lora_targets may not name lm_head: the loss applies the head itself, without adapters."
        )


def _check_gate(config: Config) -> None:
    schedule, loss = config.gate.tau_schedule, config.loss
    if schedule != "constant" and loss.gating == "fixed":
        raise UserError(
            f"tau_schedule: {schedule} moves the gate's threshold, but gating: fixed has none; use soft or hard."
        )
    if schedule == "adaptive" and loss.gating == "soft" and loss.alpha == 0:
        raise UserError("tau_schedule: adaptive moves no λ, alpha 0 leaves every λ at one half; raise alpha.")


def _check_refresh(config: Config) -> None:
    policy, rollout, loss = config.refresh, config.rollout, config.loss
    if policy.replay_share and policy.max_age < max(1, policy.refresh_every):
        raise UserError(
            f"replay_share {policy.replay_share} keeps rows of earlier refreshes, but max_age {policy.max_age} drops them at"
            f" the next one; raise max_age to at least {max(1, policy.refresh_every)}, or set replay_share 0."
        )
    if policy.replay_share and not len(rollouts_of(config, 1)):
        raise UserError(
            f"replay_share {policy.replay_share} leaves less than one group of {rollout.group_size} of the"
            f" {policy.rollouts_per_refresh} rollouts_per_refresh to be written anew; lower it."
        )
    if policy.refresh_mode == "external" and policy.refresh_min_steps > policy.max_staleness + 1:
        raise UserError(
            f"refresh_min_steps {policy.refresh_min_steps} asks for no new rows before those in use are more than max_staleness"
            f" {policy.max_staleness} steps old; lower it to at most {policy.max_staleness + 1}, or raise max_staleness."
        )
    if policy.drift_to_forward and loss.gating == "fixed":
        raise UserError(
            "drift_to_forward moves the gate's threshold, but gating: fixed has none; use soft or hard."
        )
    sampled = rollout.sample_temperature, rollout.sample_top_p, rollout.sample_top_k
    measured = [
        name for name in ("refresh_drift", "refresh_ess", "drift_to_forward") if getattr(policy, name)
    ]
    if measured and sampled != (loss.temperature, 1.0, 0):
        raise UserError(
            f"{measured[0]} compares the student with the distribution that its rollouts were drawn from; set"
            f" sample_temperature to the loss's temperature ({loss.temperature}), sample_top_p 1 and sample_top_k 0."
        )
