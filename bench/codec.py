"""The packed top-k signal against other ways to store it, on a trained teacher's distributions.

    python bench/codec.py train --tokenizer bpe-16384.json --corpus train.jsonl.zst --out runs/codec/bpe16k \\
        --minutes 2.5
    python bench/codec.py measure --teacher runs/codec/bpe16k/teacher --student runs/codec/bpe16k/student \\
        --texts heldout.jsonl.zst --name bpe16k --out bench/results

`train` makes a Qwen3-architecture teacher (12 layers of width 640), and keeps the same model at a quarter of
the time as the student whose gradients are compared. `measure` takes the distributions of held-out text. Per
format it measures signal bytes per token, encoding and decoding on one thread, KL(exact || decoded) over kept
ids and tail, and the relative error of the loss's gradient by the student's hidden states (reverse and
forward KL) against the same ids in fp32. It adds to codec.json.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import torch
import zstandard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from cache import codec
from dualkl import DualKLConfig, TopKTeacher, dual_kl
from dualkl.compress import compress

LENGTH = 512  # tokens of a training sequence and of a rollout that is stored
FLOOR = 4  # fewest ids of a nucleus
TERMS = {"recommended": (0, 1, 2, 3, 4, "sqrt"), "budget": (0, 1, "sqrt")}


# Teachers


def train(options: argparse.Namespace) -> None:
    """Trains for `--minutes`; saves the model after a quarter (student) and at the end (teacher)."""
    tokenizer = load_tokenizer(options.tokenizer)
    ids = torch.tensor(np.concatenate(token_rows(tokenizer, options.corpus)), dtype=torch.int32)
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).to(options.device)
    model = make_model(tokenizer, options.tiny).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    random = torch.Generator().manual_seed(0)
    seconds, started, step, loss = 60 * options.minutes, time.perf_counter(), 0, torch.tensor(0.0)
    kept_student = False
    while (elapsed := time.perf_counter() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3
                * min(1, (step + 1) / 50)
                * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * elapsed / seconds)))
            )
        batch = sequences[torch.randint(len(sequences), (options.batch,), generator=random)].long()
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            loss.item()  # keeps the clock honest
        if not kept_student and elapsed > seconds / 4:
            save(model, tokenizer, options.out / "student")
            kept_student = True
    save(model, tokenizer, options.out / "teacher")
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, {step} steps of {options.batch * LENGTH:,} tokens over {len(ids):,}, loss"
        f" {loss.item():.3f}"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, tiny: bool) -> Any:
    shape = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        if tiny
        else {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            num_attention_heads=10,
            num_key_value_heads=5,
            head_dim=64,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            **shape,
        ),
        dtype=torch.float32,
    )


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(read_text(path)))


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (
        zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
    ).decode()


def token_rows(tokenizer: PreTrainedTokenizerFast, path: Path) -> list[np.ndarray]:
    """Each record of a JSONL file as one text of chat turns, tokenised."""
    texts = []
    for line in filter(None, read_text(path).split("\n")):
        turns = json.loads(line)["messages"]
        texts.append("".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array(row, np.int32) for row in encoded if row]


def arithmetic_rows(tokenizer: Any, path: Path) -> list[np.ndarray]:
    """The demo's held-out problems with their solutions, through the chat template."""
    rows = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        turns = record.get("messages") or [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": record["solution"]},
        ]
        rows.append(
            np.array(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False), np.int32)
        )
    return rows


# Formats: each encodes the signals of some rollouts to bytes, and back


@dataclass(frozen=True)
class Format:
    """`encode` gives bytes that `decode` turns into signals with the same number of positions."""

    name: str
    encode: Callable[[list[cache.TopK]], list[bytes]]
    decode: Callable[[list[bytes]], list[cache.TopK]]


def packed() -> Format:
    return Format(
        "DualKL packed",
        lambda s: [codec.encode(x) for x in s],
        lambda b: [cast(cache.TopK, codec.decode(x)) for x in b],
    )


def raw() -> Format:
    def encode(signals: list[cache.TopK]) -> list[bytes]:
        return [s.ids.tobytes() + s.logprobs.tobytes() + s.log_tail_mass.tobytes() for s in signals]

    def decode(blobs: list[bytes]) -> list[cache.TopK]:
        found = []
        for blob in blobs:
            numbers = np.frombuffer(blob, np.float32)
            ids, logprobs = np.split(numbers[:-LENGTH].reshape(2 * LENGTH, -1), 2)
            found.append(cache.TopK(ids.view(np.int32), logprobs, numbers[-LENGTH:]))
        return found

    return Format("raw int32 + fp32", encode, decode)


def to_table(signals: list[cache.TopK]) -> pa.Table:
    """Ragged lists: the kept ids and logprobs of each position, and the tail."""
    ids, logprobs = np.concatenate([s.ids for s in signals]), np.concatenate([s.logprobs for s in signals])
    kept = ids >= 0
    offsets = pa.array(np.r_[0, np.cumsum(kept.sum(1))].astype(np.int32))
    return pa.table(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ids[kept])),
            "logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs[kept])),
            "tail": pa.array(np.concatenate([s.log_tail_mass for s in signals])),
        }
    )


def of_table(table: pa.Table) -> list[cache.TopK]:
    table = table.combine_chunks()
    offsets = table["ids"].chunk(0).offsets.to_numpy()
    counts = np.diff(offsets)
    kept = np.arange(counts.max()) < counts[:, None]
    ids, logprobs = np.full(kept.shape, -1, np.int32), np.full(kept.shape, -np.inf, np.float32)
    ids[kept] = table["ids"].chunk(0).values.to_numpy()
    logprobs[kept] = table["logprobs"].chunk(0).values.to_numpy()
    tail = table["tail"].chunk(0).to_numpy()
    rows = [slice(i, i + LENGTH) for i in range(0, len(tail), LENGTH)]
    return [cache.TopK(ids[r], logprobs[r], tail[r]) for r in rows]


def arrow_zstd() -> Format:
    def encode(signals: list[cache.TopK]) -> list[bytes]:
        table, sink = to_table(signals), io.BytesIO()
        with ipc.new_file(
            sink, table.schema, options=ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        ) as writer:
            writer.write_table(table)
        return [sink.getvalue()]

    return Format("Arrow IPC, zstd", encode, lambda b: of_table(ipc.open_file(b[0]).read_all()))


def parquet_zstd() -> Format:
    def encode(signals: list[cache.TopK]) -> list[bytes]:
        sink = io.BytesIO()
        pq.write_table(to_table(signals), sink, compression="zstd", use_dictionary=False)
        return [sink.getvalue()]

    return Format(
        "Parquet, zstd", encode, lambda b: of_table(pq.read_table(io.BytesIO(b[0]), use_threads=False))
    )


def distillkit(config: str, k: int, num_exact: int, vocab_size: int) -> Format:
    """DistillKit's polynomial compressor by its published configuration: the first logprobs in bfloat16, the
    others as the least-squares fit of fp32 coefficients over their rank, ids bit-packed at ceil(log2 V) bits.
    It keeps no tail."""
    bits = math.ceil(math.log2(vocab_size))
    rank = np.arange(k - num_exact, dtype=np.float64) / max(1, k - num_exact - 1)
    basis = np.stack([np.sqrt(rank) if term == "sqrt" else rank ** int(term) for term in TERMS[config]], 1)
    solve = np.linalg.pinv(basis)

    def encode(signals: list[cache.TopK]) -> list[bytes]:
        found = []
        for signal in signals:
            exact = (
                torch.from_numpy(signal.logprobs[:, :num_exact].copy())
                .to(torch.bfloat16)
                .view(torch.uint16)
                .numpy()
            )
            terms = (signal.logprobs[:, num_exact:].astype(np.float64) @ solve.T).astype(np.float32)
            planes = (signal.ids[..., None] >> np.arange(bits - 1, -1, -1)) & 1
            ids = np.packbits(planes.reshape(len(signal.ids), -1).astype(np.uint8), axis=1)
            found.append(exact.tobytes() + terms.tobytes() + ids.tobytes())
        return found

    def decode(blobs: list[bytes]) -> list[cache.TopK]:
        found = []
        num_terms = len(TERMS[config])
        for blob in blobs:
            first, second = 2 * LENGTH * num_exact, 4 * LENGTH * num_terms
            exact = (np.frombuffer(blob, np.uint16, LENGTH * num_exact).astype(np.uint32) << 16).view(
                np.float32
            )
            terms = (
                np.frombuffer(blob, np.float32, LENGTH * num_terms, first)
                .reshape(LENGTH, -1)
                .astype(np.float64)
            )
            packed_ids = np.frombuffer(blob, np.uint8, offset=first + second).reshape(LENGTH, -1)
            planes = np.unpackbits(packed_ids, axis=1)[:, : k * bits].reshape(LENGTH, k, bits)
            ids = planes.astype(np.int32) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int32))
            logprobs = np.concatenate(
                [exact.reshape(LENGTH, -1), (terms @ basis.T).astype(np.float32)], axis=1
            )
            mass = np.exp(logprobs.astype(np.float64)).sum(1)
            tail = np.log(np.maximum(1 - mass, 1e-8))
            total = np.logaddexp(np.log(mass), tail)
            found.append(cache.TopK(ids, logprobs - total[:, None], tail - total))
        return found

    return Format(f"DistillKit {config} (k {k})", encode, decode)


# Measuring


@torch.no_grad()
def hidden_states(folder: str, rows: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, d] of all positions, and the lm_head [V, d], fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    states = [
        model.model(input_ids=torch.from_numpy(row).long()[None].to(device)).last_hidden_state[0]
        for row in rows
    ]
    return torch.cat(states), model.get_output_embeddings().weight.detach()


def top_k(states: torch.Tensor, head: torch.Tensor, k: int, p: float) -> list[cache.TopK]:
    """Signals of `LENGTH` positions each."""
    found = []
    for start in range(0, len(states) // LENGTH * LENGTH, LENGTH):
        part = states[start : start + LENGTH]
        kept = compress(
            part,
            head,
            torch.zeros(LENGTH, dtype=torch.long, device=part.device),
            k=k,
            p=p,
            floor=min(FLOOR, k),
        )
        found.append(cache.TopK(*(t.cpu().numpy() for t in (kept.ids, kept.logprobs, kept.log_tail_mass))))
    return found


def timed(function: Callable[[], Any], repeats: int = 5) -> tuple[Any, float]:
    """The result and the least time of some calls."""
    best, result = math.inf, None
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - started)
    return result, best


def divergence(exact: cache.TopK, decoded: cache.TopK) -> np.ndarray:
    """KL(exact || decoded) of each position over kept ids and tail, nats, float64."""
    kept = exact.ids >= 0
    p = np.where(kept, np.exp(exact.logprobs.astype(np.float64)), 0)
    with np.errstate(invalid="ignore"):
        gap = np.where(kept, exact.logprobs.astype(np.float64) - decoded.logprobs, 0)
        tail = exact.log_tail_mass.astype(np.float64)
        rest = np.where(np.isfinite(tail), np.exp(tail) * (tail - decoded.log_tail_mass), 0)
    return (p * gap).sum(1) + rest


def gradient(signals: list[cache.TopK], states: torch.Tensor, head: torch.Tensor, mix: float) -> torch.Tensor:
    """Gradient [N, d] of the loss by the student's hidden states; mix 1 is the reverse, 0 the forward KL."""
    hidden = states[: LENGTH * len(signals)].clone().requires_grad_()
    width = max(s.ids.shape[1] for s in signals)
    ids = torch.from_numpy(np.concatenate([widen(s.ids, width, -1) for s in signals])).long()
    logprobs = torch.from_numpy(np.concatenate([widen(s.logprobs, width, -np.inf) for s in signals]))
    tail = torch.from_numpy(np.concatenate([s.log_tail_mass for s in signals]))
    order = torch.sort(logprobs, dim=1, descending=True, stable=True).indices  # a fitted curve need not fall
    parts = (ids.gather(1, order), logprobs.gather(1, order), tail)
    teacher = TopKTeacher(*(part.to(states.device) for part in parts))
    weights = torch.ones(len(hidden), device=states.device)
    dual_kl(hidden, head, teacher, DualKLConfig(gating="fixed", mix=mix), weights=weights).loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def widen(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)


def measure_format(
    form: Format, exact: list[cache.TopK], states: torch.Tensor, head: torch.Tensor
) -> dict[str, float]:
    num_tokens = LENGTH * len(exact)
    num_kept = sum(int((s.ids >= 0).sum()) for s in exact)
    blobs, encoding = timed(lambda: form.encode(exact))
    decoded, decoding = timed(lambda: form.decode(blobs))
    kl = np.concatenate([divergence(a, b) for a, b in zip(exact, decoded, strict=True)])
    assert all(
        np.array_equal(a.ids[a.ids >= 0], b.ids[b.ids >= 0]) for a, b in zip(exact, decoded, strict=True)
    )
    errors = {}
    for name, mix in (("reverse", 1.0), ("forward", 0.0)):
        wanted = gradient(exact, states, head, mix)
        errors[f"{name}_gradient_error"] = float(
            (gradient(decoded, states, head, mix) - wanted).norm() / wanted.norm()
        )
    size = sum(map(len, blobs))
    return {
        "kept_ids_per_token": num_kept / num_tokens,
        "bytes_per_token": size / num_tokens,
        "encode_tokens_per_second": num_tokens / encoding,
        "decode_tokens_per_second": num_tokens / decoding,
        "encode_mb_per_second": (8 * num_kept + 4 * num_tokens) / encoding / 1e6,
        "decode_mb_per_second": (8 * num_kept + 4 * num_tokens) / decoding / 1e6,
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        **errors,
    }


def measure_matrix(signal: cache.Hidden | cache.Full) -> dict[str, float]:
    """A lossless signal of raw numbers."""
    array = signal.states if isinstance(signal, cache.Hidden) else signal.logits
    blob, encoding = timed(lambda: codec.encode(signal), 3)
    decoded, decoding = timed(lambda: codec.decode(blob), 3)
    back = decoded.states if isinstance(decoded, cache.Hidden) else decoded.logits
    assert np.array_equal(array, back)
    return {
        "bytes_per_token": len(blob) / len(array),
        "share_of_raw": len(blob) / array.nbytes,
        "encode_mb_per_second": array.nbytes / encoding / 1e6,
        "decode_mb_per_second": array.nbytes / decoding / 1e6,
    }


def matrices(states: torch.Tensor, head: torch.Tensor) -> Iterator[tuple[str, cache.Hidden | cache.Full]]:
    def bits(tensor: torch.Tensor) -> np.ndarray:
        return tensor.to(torch.bfloat16).view(torch.uint16).cpu().numpy()

    yield "hidden, bf16", cache.Hidden(bits(states[:LENGTH]), "bfloat16")
    rows = min(LENGTH, 64) if len(head) > 50_000 else LENGTH
    yield "full, bf16", cache.Full(bits(states[:rows] @ head.T), "bfloat16")


def disk_speed(folder: Path, megabytes: int = 512) -> dict[str, float]:
    """What the disk below `folder` takes and gives: a file of random bytes, written to the platter and read
    past the page cache.
    """
    block = np.random.default_rng(0).bytes(10**6)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        writing = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        while file.read(10**7):
            pass
        reading = time.perf_counter() - started
    return {"write_mb_per_second": megabytes / writing, "read_mb_per_second": megabytes / reading}


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.teacher)
    read = arithmetic_rows if options.arithmetic else token_rows
    rows, size = [], 0
    for row in read(tokenizer, options.texts):
        rows.append(row[:LENGTH])
        size += len(rows[-1])
        if size >= options.tokens:
            break
    states, head = hidden_states(options.teacher, rows, options.device)
    student_states, student_head = hidden_states(options.student, rows, options.device)
    vocab_size = len(head)
    found: dict[str, Any] = {"vocab_size": vocab_size, "tokens": len(states) // LENGTH * LENGTH}
    forms = [packed(), raw(), arrow_zstd(), parquet_zstd()]
    k = min(64, vocab_size)
    for name, p in ((f"top-{k}", 1.0), (f"nucleus 0.99, {FLOOR} to {k}", 0.99)):
        exact = top_k(states, head, k, p)
        for form in forms:
            if form.name.startswith("raw") and p < 1:
                continue
            found[f"{name}: {form.name}"] = measure_format(form, exact, student_states, student_head)
    for config, k, num_exact in (("recommended", 128, 16), ("budget", 50, 1)):
        k = min(k, vocab_size - 1)
        form = distillkit(config, k, num_exact, vocab_size)
        found[form.name] = measure_format(form, top_k(states, head, k, 1.0), student_states, student_head)
    for name, signal in matrices(states, head):
        found[name] = measure_matrix(signal)
    options.out.mkdir(parents=True, exist_ok=True)
    found["disk"] = disk_speed(options.out)
    found["machine"] = {"torch": torch.__version__, "device": options.device}
    path = options.out / "codec.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(everything | {options.name: found}, indent=1))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    lines = []
    for name, row in found.items():
        if isinstance(row, dict) and "kl_mean" in row:
            lines.append(
                f"{name:<48}{row['bytes_per_token']:>8.1f} B {row['encode_tokens_per_second'] / 1e3:>8.0f}k"
                f" {row['decode_tokens_per_second'] / 1e3:>8.0f}k tok/s  KL {row['kl_mean']:.1e} p99"
                f" {row['kl_p99']:.1e}  grad {row['reverse_gradient_error']:.1e}"
                f" {row['forward_gradient_error']:.1e}  k {row['kept_ids_per_token']:.1f}"
            )
        elif isinstance(row, dict) and "share_of_raw" in row:
            lines.append(
                f"{name:<48}{row['bytes_per_token']:>8.1f} B {100 * row['share_of_raw']:.1f} % of raw,"
                f" {row['encode_mb_per_second']:.0f} / {row['decode_mb_per_second']:.0f} MB/s, of raw bytes;"
                f" the disk {found['disk']['write_mb_per_second']:.0f} /"
                f" {found['disk']['read_mb_per_second']:.0f} MB/s"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("train")
    make.add_argument("--tokenizer", type=Path, required=True)
    make.add_argument("--corpus", type=Path, required=True)
    make.add_argument("--minutes", type=float, default=2.5)
    make.add_argument("--batch", type=int, default=64)
    make.add_argument("--tiny", action="store_true", help="a small model: does everything run?")
    look = commands.add_parser("measure")
    look.add_argument("--teacher", required=True)
    look.add_argument("--student", required=True)
    look.add_argument("--texts", type=Path, required=True)
    look.add_argument("--arithmetic", action="store_true", help="the texts are the demo's problems")
    look.add_argument("--tokens", type=int, default=16_384)
    look.add_argument("--name", required=True)
    for command in (make, look):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    {"train": train, "measure": measure}[options.command](options)


if __name__ == "__main__":
    main()
