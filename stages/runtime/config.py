"""Configuration: every key with its type, default (Qwen scale) and range; parsing of files and flags.

Sections only group keys for the reader: key names are unique, so `--tau 0.5` equals `loss: {tau: 0.5}`.
Later sources win: defaults, then each configuration file in order, then flags.

    python -m stages.runtime.config > docs/configuration.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stages.runtime import flags, yaml_text
from stages.runtime.errors import UserError
from stages.runtime.help import help_asked, help_text, reference
from stages.runtime.shipped import found_file, with_shipped_paths
from stages.runtime.yaml_text import shown

if TYPE_CHECKING:
    from dualkl import DualKLConfig

Auto = Literal["auto"]
Cap = Annotated[int, Field(ge=1)] | Auto
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def as_run_name(text: str) -> str:
    """`text` as the name of a run."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"


def _run_name(value: str) -> str:
    if not re.fullmatch(r"[.]*[\w-][\w.-]*", value):
        raise ValueError(
            "the name of a run is that of its folder and may have letters, digits, '_', '-' and '.', not only"
            f" dots; {as_run_name(value)} is allowed"
        )
    return value


class RunSection(Section):
    run_name: Annotated[str, AfterValidator(_run_name)] = Field(
        "run", description="name of the run and of its folder in runs_dir"
    )
    runs_dir: str = Field("runs", description="folder that holds the run folders")
    cache_dir: str = Field("", description="teacher cache; empty: <run folder>/cache")
    extra_caches: dict[str, Annotated[Finite, Field(ge=0)]] = Field(
        {},
        description="more caches to train on, {root: rows drawn from it per row of the run's own cache}",
    )
    seed: int = Field(0, ge=0, description="seed of prompts, rollouts, LoRA initialisation and batch order")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="compute and frozen weights; trained weights are always fp32"
    )


def name_and_revision(model: str) -> tuple[str, str]:
    """Split a hub `NAME@REVISION`; the revision defaults to main. A local folder keeps its name.

    Raises ValueError for a folder with a revision, and for an empty one.
    """
    name, at, revision = model.partition("@")
    if not at or Path(model).is_dir():
        return model, "main"
    if not revision or Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder, which has no revisions" if revision else "nothing follows the @"
        )
    return name, revision


def _model_name(model: str) -> str:
    name_and_revision(model)
    return model


ModelName = Annotated[str, AfterValidator(_model_name)]


class ModelSection(Section):
    student_model: ModelName = Field(
        "", description="the model to train; a folder, or NAME or NAME@REVISION on the hub"
    )
    student_adapter: str = Field("", description="LoRA adapter to start from; needs use_lora")
    teacher_model: ModelName = Field(
        "", description="the model to learn from; named likewise; train and evaluate can do without"
    )
    teacher_dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="teacher's compute, and the hidden states that are stored"
    )
    teacher_ds_zero3: bool = Field(
        True, description="shard the scoring teacher over all processes (if several) with DeepSpeed ZeRO-3"
    )
    teacher_ds_config: str = Field(
        "", description="your own DeepSpeed JSON (stage 3; CPU or NVMe offload); empty: built in"
    )
    teacher_quantization: Literal["none", "bnb-4bit", "bnb-8bit", "fp8"] = Field(
        "none", description="round the teacher's weights as it is loaded; needs teacher_ds_zero3: false"
    )
    attn_implementation: str = Field("sdpa", description="attention of both models, as in transformers")


class LoraSection(Section):
    use_lora: bool = Field(True, description="train LoRA adapters; false: all weights")
    lora_r: int = Field(64, ge=1, description="rank")
    lora_alpha: int = Field(128, ge=1, description="scale: the update is alpha / r * B A")
    lora_dropout: Finite = Field(0.0, ge=0, lt=1, description="dropout before A")
    lora_targets: str = Field(
        "all-linear", description="all-linear (without the head), or layer names joined by commas"
    )


def _weighted(value: Any) -> Any:
    """Convert a list of data sets, or of {data set: weight}, to one map; ValueError if one is repeated."""
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list) or not all(isinstance(each, str | dict) for each in parts):
        return value
    pairs = [pair for each in parts for pair in (each.items() if isinstance(each, dict) else [(each, 1)])]
    files = {os.path.realpath(os.path.expanduser(str(name))) for name, _ in pairs}  # noqa: PTH111
    if len(files) < len(pairs):
        raise ValueError("names a data set twice")
    return dict(pairs)


Weights = Annotated[dict[str, Annotated[Finite, Field(gt=0)]], Field(min_length=1)]


class DataSection(Section):
    dataset: Annotated[str | Weights, BeforeValidator(_weighted)] = Field(
        "",
        description="prompts: a file, a folder, or a data set on the hub; FOLDER::SPLIT, or NAME:CONFIG:SPLIT"
        " (CONFIG and SPLIT are optional); tulu3 is known; several: {data set: weight}",
    )
    num_prompts: int = Field(
        16384, ge=0, description="prompts drawn from the data set, in seeded order; 0: all"
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="longest prompt after the chat template, tokens; longer ones are skipped"
    )
    allow_skipped: Finite = Field(
        0.5,
        ge=0,
        le=1,
        description="largest share of a data set's records that may be skipped, if more than 50 are"
        " read; 0: none at all",
    )
    system_prompt: str = Field("", description="system message for records without one; empty: none")
    chat_template_kwargs: dict[str, Any] = Field(
        {"enable_thinking": False}, description="arguments of the chat template"
    )


def _joined(value: Any) -> Any:
    """Join a list of names with commas."""
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return ",".join(value) if is_list else value


class RolloutSection(Section):
    group_size: int = Field(4, ge=1, description="completions per prompt")
    max_new_tokens: int = Field(512, ge=1, description="longest completion, tokens")
    eos_token: Annotated[str, BeforeValidator(_joined)] = Field(
        "",
        description="tokens that end a completion, joined by commas; empty: the student's own",
    )
    sample_temperature: Finite = Field(1.0, gt=0, description="sampling temperature of rollouts")
    sample_top_p: Finite = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    sample_top_k: int = Field(0, ge=0, description="top-k sampling; 0: off")
    gen_micro_batch: Cap = Field(
        "auto", description="rollouts that a process decodes at once; auto: what the free GPU memory holds"
    )
    lp_micro_batch: Cap = Field(
        "auto",
        description="most rows in a scoring or training forward; auto: no limit but tokens (64 rows"
        " when training on a CPU)",
    )
    rollouts_per_unit: int = Field(
        1024,
        ge=1,
        description="rollouts generated and committed together, which is what a crash can cost;"
        " processes take units in turn, so choose a size that divides rollouts_per_refresh evenly among"
        " them",
    )
    role: Literal["generate", "score", "both"] = Field(
        "both",
        description="`dualkl rollout` generates, scores, or both; separate processes meet at the cache",
    )


class SignalSection(Section):
    signal: Literal["topk", "nucleus", "hidden", "full"] = Field(
        "topk", description="what is stored of the teacher's distribution"
    )
    signal_k: int = Field(64, ge=1, description="ids kept by topk; most ids kept by nucleus (at least 4)")
    signal_p: Finite = Field(0.99, gt=0, le=1, description="probability mass kept by nucleus")


def _weight(value: Any) -> Any:
    """`fixed` without a number means equal weights."""
    return 0.5 if value == "fixed" else value


Gating = Annotated[Literal["soft", "hard"] | Annotated[Finite, Field(ge=0, le=1)], BeforeValidator(_weight)]


OF_GATE = ("tau", "tau_share", "alpha", "gate_on")
"""Keys that have no effect on a constant mix."""


class LossSection(Section):
    """`DualKLConfig` checks the ranges."""

    tau: Finite = Field(1.0, description="gate threshold on the reverse KL, nats")
    tau_share: Finite = Field(
        0.0,
        ge=0,
        lt=1,
        description="adapt tau, from its first value on, to keep this mean of λ; 0: constant tau",
    )
    alpha: Finite = Field(5.0, description="gate sharpness, 1/nats")
    gating: Gating = Field(
        "soft",
        description="gate λ: soft (sigmoid), hard (step), or a number: a constant weight of the reverse KL",
    )
    rkl: Literal["exact", "mc"] = Field("exact", description="reverse KL: exact, or at the sampled token")
    fkl: Literal["full", "argmax"] = Field(
        "full", description="forward KL: full, or cross-entropy on the argmax"
    )
    temperature: Finite = Field(1.0, description="temperature of both distributions in the loss")
    importance_cap: float = Field(5.0, description="cap on student/behaviour probability ratios (rkl: mc)")
    objective: Literal["gated", "jsd"] = Field(
        "gated", description="gated dual KL, or Jensen-Shannon divergence with β = gating, a number"
    )
    gate_on: Literal["rkl", "fkl", "teacher_entropy"] = Field(
        "rkl", description="what the gate compares with tau (the entropy as cached)"
    )
    teacher_smoothing: Finite = Field(
        0.0, description="share of the uniform distribution mixed into the teacher"
    )

    @property
    def has_threshold(self) -> bool:
        """Whether λ depends on tau."""
        return isinstance(self.gating, str)

    def settings(self, vocab_size: int | None = None) -> DualKLConfig:
        """Settings for `dual_kl`; ValueError if they are invalid."""
        from dualkl import DualKLConfig  # imports torch, which takes seconds: not for --help

        values = self.model_dump(exclude={"tau_share"}) | {"vocab_size": vocab_size}
        if not self.has_threshold:
            values |= {"gating": "fixed", "mix": self.gating}
        return DualKLConfig(**values)


class TrainSection(Section):
    batch_size: int = Field(256, ge=1, description="rollouts per optimizer step, over all processes")
    grad_accum: int = Field(8, ge=1, description="micro-steps of each process per optimizer step")
    micro_batch_tokens: Cap = Field(
        "auto",
        description="most tokens in a training or scoring forward, padding included; auto: what the GPU"
        " memory holds, no limit for training on a CPU",
    )
    packing: bool | Auto = Field("auto", description="pack rows without padding; auto: where that is exact")
    compile: bool | Auto = Field(
        "auto",
        description="torch.compile the student's layers for training; auto: on a GPU, but"
        " not with lora_dropout and gradient_checkpointing together",
    )
    max_steps: int = Field(256, ge=1, description="optimizer steps")
    lr: Finite = Field(1e-4, gt=0, description="peak learning rate (AdamW); a cosine to a tenth of it")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    max_grad_norm: Finite = Field(1.0, gt=0, description="gradient clipping (global norm)")
    gradient_checkpointing: bool = Field(True, description="recompute activations in the backward pass")
    checkpoint_every: int = Field(
        50, ge=1, description="steps between checkpoints; there is always one before a refresh"
    )
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    resume_from: int = Field(
        0,
        ge=0,
        description="resume from the checkpoint of this step and discard later ones; 0: the newest",
    )
    export_checkpoint: Literal["last", "best"] = Field(
        "last", description="checkpoint exported as the student; best needs eval_every"
    )


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class RefreshSection(Section):
    refresh_mode: Annotated[Literal["inline", "external", "off"], BeforeValidator(_off)] = Field(
        "inline",
        description="who writes new rollouts: these processes, `dualkl rollout --follow`, or nobody",
    )
    refresh_every: int = Field(32, ge=0, description="steps between refreshes; 0: do not refresh by steps")
    refresh_drift: Finite = Field(
        0.0,
        ge=0,
        description="refresh when KL(behaviour || student) reaches this, nats per token, mean of 4"
        " steps; 0: off",
    )
    rollouts_per_refresh: int = Field(
        8192, ge=1, description="rollouts written by stage one and by each refresh"
    )
    max_age: int = Field(
        64,
        ge=0,
        description="steps after which a refresh drops a row of this run; external: training waits while the"
        " newest rows are older",
    )

    @property
    def is_measured(self) -> bool:
        """Whether something measured in training can make a refresh due before `refresh_every` steps."""
        return bool(self.refresh_drift)


class EvalSection(Section):
    eval_dataset: str = Field(
        "",
        description="held-out prompts, named as in dataset; the default split is test; empty: those of"
        " dataset after num_prompts, or a tenth of them",
    )
    eval_prompts: int = Field(256, ge=0, description="number of held-out prompts; 0: no evaluation")
    eval_every: int = Field(
        0, ge=0, description="steps between held-out KLs on teacher text while training; 0: none"
    )
    answer_checker: str = Field(
        "",
        description="gsm8k, or FILE.py:FUNCTION; it takes (row, completion) and returns a bool; empty: none",
    )
    eval_teacher_text: str = Field(
        "",
        description="cache (signal hidden) of teacher completions, if the plain teacher does not fit"
        " on a GPU",
    )


class LogSection(Section):
    wandb_project: str = Field(
        "", description="Weights & Biases project; empty: off (WANDB_MODE=offline keeps records on disk)"
    )
    wandb_name: str = Field("", description="run name at Weights & Biases; empty: run_name")
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
    train: TrainSection = TrainSection()
    refresh: RefreshSection = RefreshSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @property
    def run_folder(self) -> Path:
        return Path(self.run.runs_dir) / self.run.run_name

    @property
    def refreshes(self) -> bool:
        """Whether a refresh can ever become due."""
        policy = self.refresh
        is_inline = policy.refresh_mode == "inline"
        return policy.refresh_mode == "external" or (
            is_inline and bool(policy.refresh_every or policy.is_measured)
        )

    @property
    def cache_root(self) -> str:
        return self.run.cache_dir or str(self.run_folder / "cache")

    @property
    def unscored_root(self) -> str:
        """Cache to which `role: generate` writes and from which `role: score` reads."""
        return self.cache_root.rstrip("/") + "-unscored"


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type)
}
SECTION_OF = {leaf: name for name, section in SECTIONS.items() for leaf in section.model_fields}
SWITCHES = {
    leaf
    for section in SECTIONS.values()
    for leaf, field in section.model_fields.items()
    if field.annotation is bool
}
"""Keys that may stand on the command line without a value."""


MOST_BYTES = 2**20


def parse_arguments(arguments: list[str], description: str, options: Collection[str] = ()) -> Config:
    """Parse a command line: FILE or `--config FILE` (repeatable), and `--KEY VALUE` for any key.

    `description`: the command's docstring, which `--help` shows. `options`: names of the command's options
    beside the keys, which are proposed for mistyped ones.
    Errors: `UserError` that names the key, the closest valid key, and the expected type.
    """
    if help_asked(arguments):
        print(help_text(description, SECTIONS, every_key="all" in arguments))
        raise SystemExit(0)
    paths, texts = flags.split(arguments, SECTION_OF, SWITCHES, options)
    given = {leaf: _from_text(leaf, text) for leaf, text in texts.items()}
    values: dict[str, dict[str, Any]] = {}
    for leaves in (*(_read_file(found_file(path)) for path in paths), given):
        for leaf, value in leaves.items():
            values.setdefault(SECTION_OF[leaf], {})[leaf] = value
    return build(values)


def to_yaml(config: Config) -> str:
    return yaml_text.write(config.model_dump())


def _read_file(path: Path) -> dict[str, Any]:
    """Read the keys of a YAML file, in their sections or at the top level."""
    if path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"config file {path} has {path.stat().st_size} bytes; a configuration has at most {MOST_BYTES}."
        )
    try:
        content = yaml_text.read(path.read_text(encoding="utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UserError(
            f"config file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except ValueError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold keys and values, got {type(content).__name__}.")
    found: dict[str, Any] = {}
    for name, value in content.items():
        where, leaves = f"in {path}", {name: value}
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: section {name} must hold keys and values, got {shown(value)}.")
            where, leaves = f"in section {name} of {path}", value
        for key, leaf_value in leaves.items():
            leaf = flags.present_name(str(key))
            if leaf not in SECTION_OF:
                known = SECTIONS if isinstance(leaf_value, dict) and name == key else SECTION_OF
                raise UserError(flags.unknown_key(leaf, where, known))
            if leaf in found:
                raise UserError(
                    f"config file {path} gives the key {leaf} in two places, in sections or outside; keep"
                    " one."
                )
            found[leaf] = leaf_value
    return with_shipped_paths(path, found)


def _from_text(leaf: str, text: str) -> Any:
    """Parse a flag's value: taken literally if the key accepts text, else read as YAML."""
    annotation = SECTIONS[SECTION_OF[leaf]].model_fields[leaf].annotation
    if annotation is str or (str in get_args(annotation) and not text.startswith(("{", "["))):
        return text
    try:
        return yaml_text.read(text)
    except yaml_text.RepeatedKeyError as error:
        raise UserError(f"config key {leaf}: {error}.") from None
    except ValueError:
        return text


# --- validation beyond types


def build(values: dict[str, dict[str, Any]]) -> Config:
    """Build the configuration from values by section; UserError for invalid types, ranges or combinations."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_invalid(error)) from None
    if config.loss.objective == "jsd" and config.loss.has_threshold:
        raise UserError("objective: jsd has no gate; give its β as gating, a number between 0 and 1.")
    try:
        config.loss.settings()
    except ValueError as error:
        raise UserError(f"config section loss: {error}") from None
    for check in (_check_training, _check_loss, _check_refresh):
        check(config)
    return config


def _invalid(error: ValidationError) -> str:
    """Describe the first invalid key in one sentence, with all accepted types."""
    errors = error.errors()
    section, leaf = errors[0]["loc"][:2]
    own = "Value error, "  # what pydantic puts before the message of a validator of ours
    wishes = dict.fromkeys(
        e["msg"].removeprefix(own) if e["msg"].startswith(own) else e["msg"].lower()
        for e in errors
        if e["loc"][:2] == (section, leaf)
    )
    return f"config key {section}.{leaf}: {' or '.join(wishes)}, got {shown(errors[0]['input'])}."


def require(config: Config, *keys: str) -> None:
    """Raise UserError unless each of the keys, which have no default, is given."""
    for key in keys:
        if not getattr(getattr(config, SECTION_OF[key]), key):
            raise UserError(
                f"{key} is missing: give it in a configuration file ({key}: {EXAMPLES[key]}) or as --{key}"
                f" {EXAMPLES[key]}; `dualkl init` writes such a file, `dualkl run demo` needs none."
            )


EXAMPLES = {
    "student_model": "Qwen/Qwen3-4B",
    "teacher_model": "Qwen/Qwen3-32B",
    "dataset": "prompts.jsonl",
}


def _check_training(config: Config) -> None:
    refresh, group = config.refresh, config.rollout.group_size
    if config.eval.eval_every and not config.eval.eval_prompts:
        raise UserError("eval_every measures on held-out prompts; set eval_prompts above 0, or eval_every 0.")
    if config.train.export_checkpoint == "best" and not config.eval.eval_every:
        raise UserError("export_checkpoint: best needs held-out KLs; set eval_every above 0.")
    if refresh.rollouts_per_refresh % group:
        raise UserError(
            f"rollouts_per_refresh {refresh.rollouts_per_refresh} is not a multiple of group_size {group};"
            " change one of them."
        )
    if config.models.teacher_quantization != "none" and config.models.teacher_ds_zero3:
        raise UserError(
            f"teacher_quantization {config.models.teacher_quantization} keeps the whole teacher on each GPU;"
            " set teacher_ds_zero3: false."
        )
    if config.models.student_adapter and not config.lora.use_lora:
        raise UserError(
            "student_adapter needs use_lora; for full fine-tuning merge the adapter into the model first."
        )
    if "lm_head" in [name.strip() for name in config.lora.lora_targets.split(",")]:
        raise UserError(
            "lora_targets may not name lm_head: the loss applies the head itself, without adapters."
        )


def _check_loss(config: Config) -> None:
    """Check rollouts and signal against the loss, and the gate against an adaptive threshold."""
    rollout, signal, loss = config.rollout, config.teacher_signal.signal, config.loss
    if loss.rkl == "mc" and (rollout.sample_top_p < 1 or rollout.sample_top_k > 0):
        raise UserError(
            "rkl: mc needs rollouts from the whole distribution: with sample_top_p < 1 or sample_top_k > 0"
            " the estimate is biased. Set sample_top_p 1 and sample_top_k 0, or rkl: exact."
        )
    if loss.temperature != 1 and signal in ("topk", "nucleus"):
        raise UserError(
            f"temperature {loss.temperature} does not work with signal {signal}, which is stored at"
            " temperature 1; use signal: hidden or full, or temperature 1."
        )
    if loss.rkl == "mc" and loss.temperature != 1:
        raise UserError(
            "rkl: mc reads the teacher's logprobs at temperature 1; use temperature 1 or rkl: exact."
        )
    if loss.tau_share and not loss.has_threshold:
        raise UserError(
            f"tau_share {loss.tau_share} adapts the gate's threshold, but gating: {loss.gating:g} has none;"
            " use soft or hard."
        )
    if loss.tau_share and loss.gating == "soft" and loss.alpha == 0:
        raise UserError("tau_share has no effect at alpha 0, where every λ is one half; raise alpha.")


def _check_refresh(config: Config) -> None:
    rollout, loss = config.rollout, config.loss
    sampled = rollout.sample_temperature, rollout.sample_top_p, rollout.sample_top_k
    if config.refresh.refresh_drift and sampled != (loss.temperature, 1.0, 0):
        raise UserError(
            "refresh_drift compares the student with the distribution that its rollouts were drawn from;"
            f" set sample_temperature to the loss's temperature ({loss.temperature}), sample_top_p 1 and"
            " sample_top_k 0."
        )


if __name__ == "__main__":
    print(reference(SECTIONS), end="")
