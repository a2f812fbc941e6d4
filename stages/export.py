"""Export a run's student for transformers, PEFT, vLLM and SGLang.

    dualkl export runs/demo             the adapter alone, to runs/demo/export
    dualkl export runs/demo --merge     all weights, to runs/demo/export-merged

Writes weights, tokenizer, chat template, generation settings and a model card.
A run that is not finished is exported from its newest checkpoint.

    --merge              all weights with the adapter in them, named and shaped
                         as the base's
    --dtype bf16|fp16|fp32    default: the base's; an adapter alone: fp32
    --out DIR            another folder
    --overwrite          replace a student that was exported there before
    --license ID         licence for the model card, such as apache-2.0
                         (default: the one in the base's README.md)
    --push USER/NAME     upload to the Hugging Face hub, into a private
                         repository if it is new
    --quiet, --json      only results and warnings; the result as JSON
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "export")

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

from peft import PeftModel

from cache.plain import plain
from stages.models import exporting, hub
from stages.models.exporting import Source
from stages.models.student import Student, policy_hash
from stages.runtime import card, metrics, options
from stages.runtime import config as configuration
from stages.runtime.config import Config
from stages.runtime.errors import UserError, command, one_line
from stages.runtime.files import new_folder, publish_folder, replace_text
from stages.runtime.run import quieten_libraries
from stages.runtime.run_folders import run_folder
from stages.runtime.terminal import take_style

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""
NO_LICENCE = "no licence of the base is known, so the model card says unknown; --license ID names one"


def main() -> None:
    style, arguments = take_style(sys.argv[1:])
    own = options.of_export(arguments)
    quieten_libraries()
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed, which PEFT imports, warns where it finds no GPU
    folder = run_folder(own.run)
    config = _config_of(folder)
    records = metrics.read(folder / "metrics.jsonl")
    exports = [record for record in records if record["kind"] == "export"]
    merges = own.merge or not config.lora.use_lora
    out = Path(own.out) if own.out else folder / ("export-merged" if own.merge else "export")
    _check_out(out, own.overwrite)
    if own.push:
        _check_push(config, own.push, merges)
        hub.check(own.push, out)
    source = exporting.find_source(folder, config, exports)
    style.say(f"exporting step {source.step} of {config.train.max_steps}, from {source.path}")
    student = exporting.load_trained(config, source)
    weights = card.Weights(source.step, policy_hash(student), merges and config.lora.use_lora, own.license)
    weights = replace(weights, usage=tuple(_usage(own.push or out.name, config, student, merges)))
    text = card.model_card(records, config, weights)
    for warning in _write(student, out, own.dtype, config, merges, text):
        style.say(f"warning: {warning}")
    if own.push and card.NO_LICENCE in text:
        style.say(f"warning: {NO_LICENCE}")
    usage = [line.strip() for line in _usage(str(out), config, student, merges)]
    lines = [*_done(config, merges, source), f"folder    {out}", *(f"try       {line}" for line in usage)]
    facts = {"folder": str(out), "step": source.step, "merged": merges, "usage": usage}
    if own.push:
        facts["pushed"] = hub.upload(out, own.push)
        lines.append(f"pushed    {facts['pushed']}")
    style.conclude("\n".join(lines), facts)


def _check_push(config: Config, name: str, merges: bool) -> None:
    """UserError for an adapter whose base nobody else has."""
    base = config.models.student_model
    if not merges and Path(base).is_dir():
        raise UserError(
            f"--push {name}: an adapter needs its base, and this one's is the folder {base}, which nobody"
            " else has; add --merge, which uploads all weights."
        )


def _config_of(folder: Path) -> Config:
    """The run's own configuration, at the place where the folder is now."""
    place = folder.resolve()
    where = ["--run_name", place.name, "--runs_dir", str(place.parent)]
    return configuration.parse_arguments(["--config", str(folder / "config.yaml"), *where], "")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError if `out` exists, unless it is to be replaced and holds an exported model."""
    if not out.exists() and not out.is_symlink():
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        return
    if not _is_export(out):
        raise UserError(f"{out} was not written by this command, so it is not replaced; give another --out.")
    if not overwrite:
        raise UserError(f"{out} exists; give --overwrite to replace it, or --out for another folder.")


def _is_export(out: Path) -> bool:
    """Whether a folder holds what this command wrote, by its model card: any model has the other files."""
    card = out / "README.md"
    return (
        out.is_dir()
        and not out.is_symlink()
        and card.is_file()
        and "- dualkl\n" in card.read_text("utf-8", "replace")
    )


def _write(
    student: Student, out: Path, dtype: str | None, config: Config, merges: bool, text: str
) -> list[str]:
    """Write the export to `out`, which is complete or as before; warnings where tensors are not the base's."""
    base = config.models.student_model
    wanted = exporting.DTYPES[dtype] if dtype else exporting.dtype_of(base) if merges else None
    if isinstance(student.model, PeftModel):
        if merges:
            assert wanted is not None
            student = replace(student, model=exporting.merge(student.model, wanted))
        else:
            exporting.name_base(cast(PeftModel, student.model), base)
    partial = out.with_name(f".partial-{out.name}")
    try:
        new_folder(partial)
        exporting.save(student, partial, wanted, exporting.generation_of(base, student.eos_ids))
        replace_text(partial / "README.md", text)
        odd = exporting.differing(partial, base) if merges else []
        publish_folder(partial, out)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) and "os error" not in str(error):  # safetensors has its own class
            raise
        raise UserError(
            f"the student could not be written to {out} ({one_line(error)}). Free space, or give another"
            " --out."
        ) from error
    if not odd:
        return []
    return [
        f"{len(odd)} tensors are named or shaped other than in the files of {base}, the first is {odd[0]};"
        " transformers loads them, other software may not"
    ]


def _usage(name: str, config: Config, student: Student, merges: bool) -> list[str]:
    """Lines of the model card: how to load the folder called `name`."""
    quoted, run = shlex.quote(plain(name)), shlex.quote(plain(config.run.run_name))
    base = shlex.quote(plain(exporting.absolute(config.models.student_model)))
    if merges or not isinstance(student.model, PeftModel):
        return [
            f'    AutoModelForCausalLM.from_pretrained({plain(name)!r}, dtype="auto")     # transformers',
            f"    vllm serve {quoted}",
            f"    python -m sglang.launch_server --model-path {quoted}",
            f"    lm_eval --model hf --model_args pretrained={quoted} --tasks gsm8k --apply_chat_template",
            f"    python llama.cpp/convert_hf_to_gguf.py {quoted} --outfile {run}.gguf --outtype bf16",
        ]
    own_rank = max(getattr(settings, "r", 0) for settings in student.model.peft_config.values())
    rank = next((rank for rank in VLLM_RANKS if rank >= own_rank), own_rank)
    return [
        f'    AutoPeftModelForCausalLM.from_pretrained({plain(name)!r}, dtype="auto")     # PEFT',
        f"    vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {run}={quoted}",
        f"    lm_eval --model hf --model_args pretrained={base},peft={quoted} --tasks gsm8k"
        " --apply_chat_template",
        f"    python llama.cpp/convert_lora_to_gguf.py {quoted} --base {base} --outfile {run}-lora.gguf",
    ]


def _done(config: Config, merges: bool, source: Source) -> list[str]:
    what = "the adapter"
    if merges:
        what = "all weights" + (" with the adapter merged" if config.lora.use_lora else "")
    lines = [f"exported  step {source.step}, {what}"]
    if source.step < config.train.max_steps and source.kind != "best":
        lines.append(f"          the run is not finished ({source.step} of {config.train.max_steps} steps)")
    return lines


if __name__ == "__main__":
    command(main)
