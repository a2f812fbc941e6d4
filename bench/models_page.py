"""docs/models.md, written from the results of `bench/architectures.py`."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
COMMON = {
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Llama": "llama",
    "Mistral": "mistral",
    "Gemma 2": "gemma2",
    "Gemma 3, text": "gemma3_text",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
    "SmolLM3": "smollm3",
    "Granite": "granite",
    "GPT-2": "gpt2",
    "GPT-OSS": "gpt_oss",
}
"""Models that people bring most, and their types."""

HEAD = """# Models

Written by `python -m bench.architectures`{dates} with {versions}; raw records in
`bench/results/architectures.json`. Change that program, not this page.

Every type of causal language model that transformers knows was built with random weights, {size}, windows of
12 tokens, and run through both stages like a user's run, in fp32 on a CPU: first with `packing: auto` and
itself as teacher, then padded, with a random LoRA adapter and another teacher. *Right* means that every
log-probability computed by DualKL (rollouts, teacher, student in training) is within 1e-4 nats of
transformers' own forward of that row alone, and that the loss of a student that is its own teacher is below
1e-5. The limit for rollouts by `generate` is 5e-4, because the cached steps of some models with a state
(Nemotron-H) are that far from their own forward. Tiny models only show whether the computation is correct.
Speed, memory and rotary embeddings that change beyond a few hundred tokens are not tested here.

* **right**: the built-in rollout engine is used, and rows are packed.
* **padded**: scoring and training use padded rows instead of packed ones; the run prints why.
* **by generate**: rollouts are written by transformers' `generate`, which is slower; the run prints this.
* **rounding decides a choice**: with some weights, one token in a hundred is off, because two experts (or
  indexed tokens) have equal scores and two correct computations choose differently. With other weights, all
  tokens are right.
* **refused**: the command ends at once with that sentence.
"""

RUN = """## What was run

| | run | not run |
|---|---|---|
| models | the 189 types below, tiny, with random weights, fp32, on a CPU; Qwen3-0.6B from Qwen3-4B in \
their shapes, with random weights, bf16, on one and two H100; SmolLM2-135M-Instruct and a student pruned \
from it, with their own weights, on a CPU and on one and two H100; scoring with a teacher of Qwen3-32B's \
shape | pretrained Qwen3, Llama, Gemma or Mistral; a 32B teacher through a whole run |
| data | every layout of [data.md](data.md), as files and folders; GSM8K; a mix of eight open data sets \
| images, audio; downloads from the hub in tests, which stay offline |
| hardware | Linux on x86-64: CPUs of 2 to 16 cores, one H100, one H200, two H100 over NCCL | A100 and \
smaller cards, more than two GPUs, AMD, Apple, Windows |
| software | Python 3.11, torch 2.11 (CUDA 13.0) and 2.13 (CPU), transformers 5.17 and 5.23, peft 0.21 | \
later Python, nightly builds |
| processes | one; two and four under torchrun on a CPU; two on GPUs under torchrun and accelerate; two \
agents of torchrun on one machine; ZeRO-3 teachers on one and two GPUs; a ZeRO-2 student on one | two \
machines over a network; Slurm itself; NVMe offload; a ZeRO-2 student on several GPUs |
| caches | local disks; an S3 server on the loopback | Google Cloud, Azure, NFS under load |
| exports | loading in transformers and PEFT; lm-eval 0.4.13 on an exported folder; names and shapes of \
merged weights against the base's | serving by vLLM, SGLang and llama.cpp; uploads to the hub |

Figures of these runs: [results.md](results.md), [performance.md](performance.md),
[reliability.md](reliability.md).
"""
"""What has been run and what has not, in words; the sweep below is the first row."""


def page(results: dict[str, Record]) -> str:
    """The whole page in Markdown."""
    versions = {
        " ".join(f"{name} {number}," for name, number in record["versions"].items())
        for record in results.values()
    }
    dates = sorted({record["date"] for record in results.values()})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    head = HEAD.format(
        dates=f" ({span})",
        versions=" or ".join(sorted(versions)).rstrip(","),
        size="two to four layers of width 64",
    )
    excluded = [f"`{kind}`" for kind, record in results.items() if record["verdict"] == "excluded"]
    results = {kind: record for kind, record in results.items() if record["verdict"] != "excluded"}
    types = {kind: record for kind, record in results.items() if ":" not in kind}
    variants = {kind: record for kind, record in results.items() if ":" in kind}
    parts = [
        head,
        *_common(types),
        RUN,
        *_counts(types),
        *_table(types),
        *_excluded(excluded),
        *_variants(variants),
    ]
    return "\n".join(parts) + "\n"


def _common(results: dict[str, Record]) -> list[str]:
    rows = [
        f"| {name} | `{kind}` | {outcome(results[kind])} |"
        for name, kind in COMMON.items()
        if kind in results
    ]
    return ["## Common models", "", "| model | type | result |", "|---|---|---|", *rows, ""]


def _counts(results: dict[str, Record]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for kind, record in results.items():
        kinds.setdefault(record["verdict"], []).append(f"`{kind}`")
    right, refused, not_built = (kinds.get(verdict, []) for verdict in ("right", "refused", "not built"))
    wrong = sorted([*kinds.get("wrong", []), *kinds.get("breaks", [])])
    padded, plain = (
        sum(record["verdict"] == "right" and bool(record[key]) for record in results.values())
        for key in ("padded_because", "by_generate")
    )
    teachers = sum(record.get("teacher") == "right" for record in results.values())
    return [
        "## All types",
        "",
        f"{len(results)} types: {len(right)} right ({padded} of them padded, {plain} by generate),"
        f" {len(refused)} refused as students ({teachers} of them right as teachers), {len(not_built)} not"
        f" built, {len(wrong)} wrong" + (f" ({', '.join(wrong)})." if wrong else "."),
        "",
    ]


def _table(results: dict[str, Record]) -> list[str]:
    rows = [f"| `{kind}` | {outcome(record)} |" for kind, record in sorted(results.items())]
    return ["| type | result |", "|---|---|", *rows, ""]


def _excluded(kinds: list[str]) -> list[str]:
    """What is said of encoder-decoders."""
    if not kinds:
        return []
    return [
        f"Not tried, since they are encoder-decoders and have no causal class: {', '.join(sorted(kinds))}.",
        "",
    ]


def _variants(results: dict[str, Record]) -> list[str]:
    rows = [f"| {kind} | {outcome(record)} |" for kind, record in sorted(results.items())]
    return [
        "## Settings that change how a type computes",
        "",
        "| type and setting | result |",
        "|---|---|",
        *rows,
    ]


def outcome(record: Record) -> str:
    """What became of a type, in one line."""
    verdict = record["verdict"]
    if verdict == "right":
        said = _ways(record)
    elif verdict == "refused":
        said = f"refused: {record['because']}{_as_teacher(record)}"
    elif verdict == "not built":
        said = f"could not be built tiny here: {record['because']}"
    else:
        teacher = [f"as a teacher {record['teacher']}"] if record.get("teacher") else []
        said = f"**{verdict}**: {'; '.join([*_because(record), *teacher])}"
    note = f" ({record['note']})" if record.get("note") else ""
    return f"{said}{note}".replace("|", "\\|").replace("\n", " ")


def _because(record: Record) -> list[str]:
    return [record["because"]] if record.get("because") else record["wrong"]


def _ways(record: Record) -> str:
    ways = [] if record.get("attention") != "eager" else ["with `attn_implementation: eager`"]
    if record["by_generate"]:
        ways.append("by generate")
    if record["padded_because"]:
        ways.append(f"padded ({record['padded_because']})")
    if record.get("ties"):
        ways.append("rounding decides a choice")
    return ", ".join(["right", *ways])


def _as_teacher(record: Record) -> str:
    teacher = record.get("teacher", "")
    if teacher.startswith("refused"):
        return ""
    return f" As a teacher: {teacher}."
