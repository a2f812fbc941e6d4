"""`bench/stage_one.py`, part decode: a Qwen3-4B-shaped student against the memory floor and `generate`.

    decode/steps/B             steps alone: B live slots from place 128 on, 256 captured steps
    decode/whole/B             the engine's call: prefill of B prompts of 128 tokens, 256 new tokens each,
                               log-probabilities on the host
    decode/groups/B            the same with four completions per prompt
    decode/spread/B            4 B requests with lengths spread over 16..512, in useful tokens
    decode/generate/B          transformers' generate by default (dynamic cache), sampling at temperature 1
    decode/generate-static/B   the same with its static cache, compiled; the compiling call is not counted
    vllm/B                     vLLM's rates for whole, groups and spread, in a process of its own
    decode/parts/B             milliseconds of a step's parts, each captured, at 256 places per row

All cells except generate's have LoRA on all linear layers, merged, as in stage one by default.

The floor of a step is max(weight bytes / copy rate, 2 · weights · B / product rate) + bytes of K and V read
/ copy rate, with 256 places per row on average; the head counts as weights once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from bench.cells import Bench, Cell
from bench.measuring import Record, measure, peak_gib, reset_peak, synchronize
from bench.trl_peer import run_with_vllm
from stages.engine.decoder import Decoder
from stages.engine.fused_layers import FusedMLP
from stages.engine.opening import open_engine
from stages.engine.protocol import Request, Sampling
from stages.engine.sampling import choose
from stages.engine.slots import SlotCache
from stages.engine.weights import DecodingWeights

SOURCES = (
    "bench/cells.py",
    "bench/measuring.py",
    "bench/stage_one_decode.py",
    "stages/engine/*.py",
)


@dataclass(frozen=True)
class Shape:
    """The student, and the text that it writes."""

    config: dict[str, int]
    batches: tuple[int, ...]
    prompt: int
    new: int
    shortest: int
    longest: int


STUDENT = Shape(
    {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    batches=(64, 256),
    prompt=128,
    new=256,
    shortest=16,
    longest=512,
)
TINY = Shape(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
    },
    batches=(4,),
    prompt=8,
    new=12,
    shortest=2,
    longest=20,
)


def cells(tiny: bool) -> list[Cell]:
    shape = TINY if tiny else STUDENT
    kinds = {
        "steps": steps,
        "whole": partial(whole, group=1),
        "groups": partial(whole, group=4),
        "spread": spread,
        "parts": parts,
        "generate": partial(theirs, cache="dynamic"),
        "generate-static": partial(theirs, cache="static"),
    }
    return [
        Cell(
            f"decode/{kind}/{batch}",
            partial(_measured, function, shape, batch, kind.startswith("generate")),
            SOURCES,
        )
        for kind, function in kinds.items()
        for batch in shape.batches
    ]


def vllm_cells(tiny: bool, vllm: Path | None) -> list[Cell]:
    shape = TINY if tiny else STUDENT
    batch = max(shape.batches)
    sources = (*SOURCES[:3], "bench/vllm_decode.py")
    return [Cell(f"vllm/{batch}", partial(_with_vllm, shape, batch, vllm), sources)]


def _with_vllm(shape: Shape, batch: int, vllm: Path | None, bench: Bench) -> Record:
    bench.clear()
    config = make_config(shape)
    config.architectures = ["Qwen3ForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder, "found.json"), Path(folder, "spec.json")
        spec = {
            "config": config.to_dict(),
            "batch": batch,
            "prompt": shape.prompt,
            "new": shape.new,
            "lengths": spread_lengths(shape, batch).tolist(),
            "runs": 3,
            "out": str(out),
        }
        path.write_text(json.dumps(spec))
        run_with_vllm(["-m", "bench.vllm_decode", str(path)], vllm)
        found: Record = json.loads(out.read_text())
        return found


def _measured(
    function: Callable[..., Record], shape: Shape, batch: int, is_plain: bool, bench: Bench
) -> Record:
    make = make_model if is_plain else make_adapted
    model = bench.make(make.__name__, lambda: make(shape, bench.device))
    reset_peak(bench.device)
    with torch.no_grad():
        return function(bench, model, shape, batch)


def make_config(shape: Shape) -> Qwen3Config:
    return Qwen3Config(
        **shape.config,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )


def make_model(shape: Shape, device: str) -> Any:
    config = make_config(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def make_adapted(shape: Shape, device: str) -> Any:
    """The same with LoRA in its modules; its adapter adds nothing, but is merged like any other."""
    lora = LoraConfig(
        r=min(64, shape.config["hidden_size"]), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(make_model(shape, device), lora).eval().get_base_model()


def prompts_of(shape: Shape, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(10, shape.config["vocab_size"] - 10, (count, shape.prompt)))


def spread_lengths(shape: Shape, batch: int) -> np.ndarray:
    """Of 4 B completions: an even spread in a seeded order."""
    lengths = np.linspace(shape.shortest, shape.longest, 4 * batch).astype(int)
    return np.random.default_rng(1).permutation(lengths)


def floor_ms(bench: Bench, model: Any, shape: Shape, batch: int) -> float:
    """Milliseconds of a step that only reads its weights (or multiplies by them) and its keys and values."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    places = shape.prompt + shape.new / 2
    kv_bytes = (
        4 * shape.config["num_hidden_layers"] * shape.config["num_key_value_heads"] * shape.config["head_dim"]
    )
    copy, product = bench.ceilings["copy_tb_per_second"] * 1e9, bench.ceilings["product_tflops"] * 1e9
    return max(2 * weights / copy, 2 * weights * batch / product) + batch * places * kv_bytes / copy


def against_floor(bench: Bench, model: Any, shape: Shape, batch: int, ms: float) -> Record:
    floor = floor_ms(bench, model, shape, batch)
    return {
        "tokens_per_second": 1e3 * batch / ms,
        "floor_tokens_per_second": 1e3 * batch / floor,
        "share_of_floor": floor / ms,
        "step_ms": ms,
        "floor_ms": floor,
    }


def sampling_of(shape: Shape) -> Sampling:
    return Sampling(shape.config["vocab_size"])


def seconds_of(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def steps(bench: Bench, model: Any, shape: Shape, batch: int) -> Record:
    decoder = Decoder(model, sampling_of(shape), batch, shape.prompt + shape.new, shape.new, None)
    requests = [Request(prompt, shape.new, i) for i, prompt in enumerate(prompts_of(shape, batch))]

    def fill() -> None:
        decoder.clear(batch)
        decoder.fill(list(enumerate(requests)))

    num_steps, last = shape.new - 1, shape.prompt + shape.new - 1
    with DecodingWeights(model.get_decoder(), None).swapped():
        fill()
        decoder.run(num_steps, last)
        prefill = seconds_of(fill, bench.device)
        seconds = seconds_of(lambda: decoder.run(num_steps, last), bench.device)
    found = against_floor(bench, model, shape, batch, 1e3 * seconds / num_steps)
    return found | {"prefill_ms": 1e3 * prefill, "num_graphs": len(decoder.graphs)}


def whole(bench: Bench, model: Any, shape: Shape, batch: int, group: int) -> Record:
    prompts = [prompt for prompt in prompts_of(shape, batch // group) for _ in range(group)]
    requests = [Request(prompt, shape.new, i) for i, prompt in enumerate(prompts)]
    with closing(open_engine(model)) as engine:

        def call() -> None:
            engine.generate(requests, sampling_of(shape), batch)

        first = seconds_of(call, bench.device)
        second = seconds_of(call, bench.device)
    found = against_floor(bench, model, shape, batch, 1e3 * second / shape.new)
    return found | {"seconds": second, "first_call_seconds": first, "peak_gib": peak_gib(bench.device)}


def spread(bench: Bench, model: Any, shape: Shape, batch: int) -> Record:
    """Useful tokens: those of the completions."""
    lengths = spread_lengths(shape, batch)
    rows = zip(prompts_of(shape, 4 * batch), lengths.tolist(), strict=True)
    requests = [Request(prompt, n, forced=np.zeros(n, np.int64)) for prompt, n in rows]
    with closing(open_engine(model)) as engine:

        def call(num_rows: int) -> None:  # forced texts give each row a length of its own
            engine.generate(requests[:num_rows], sampling_of(shape), batch)

        call(batch)  # captures
        seconds = seconds_of(lambda: call(4 * batch), bench.device)
    return {
        "tokens_per_second": float(lengths.sum() / seconds),
        "seconds": seconds,
        "mean_length": float(lengths.mean()),
    }


def theirs(bench: Bench, model: Any, shape: Shape, batch: int, cache: str) -> Record:
    """transformers' own, sampling from the whole distribution."""
    ids = torch.from_numpy(np.stack(prompts_of(shape, batch))).to(bench.device)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    if cache == "static":
        settings["cache_implementation"] = "static"

    def call() -> None:
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=shape.new, **settings
        )
        assert found.shape[1] == shape.prompt + shape.new

    first = seconds_of(call, bench.device)
    second = seconds_of(call, bench.device)
    found = against_floor(bench, model, shape, batch, 1e3 * second / shape.new)
    return found | {"seconds": second, "first_call_seconds": first, "peak_gib": peak_gib(bench.device)}


def parts(bench: Bench, model: Any, shape: Shape, batch: int) -> Record:
    """Each part as often as a step has it, at the mean number of places; what is missing to a step is rotary,
    gates and residual sums.
    """
    device = torch.device(bench.device)
    places = shape.prompt + shape.new // 2
    config, dtype = model.config, torch.bfloat16
    size = (batch, config.num_key_value_heads, places, config.head_dim)
    slots = SlotCache(
        [torch.randn(size, device=device, dtype=dtype)], [torch.randn(size, device=device, dtype=dtype)]
    )
    slots.longest = places
    slots.begin_step(
        torch.full((batch,), places - 1, device=device), torch.ones(batch, dtype=torch.bool, device=device)
    )
    new = torch.randn(batch, config.num_key_value_heads, 1, config.head_dim, device=device, dtype=dtype)
    query = torch.randn(batch, config.num_attention_heads, 1, config.head_dim, device=device, dtype=dtype)
    decoder = Decoder(model, sampling_of(shape), batch, places, shape.new, None)
    with DecodingWeights(model.get_decoder(), None).swapped():
        modules = list(model.model.modules())
        # As read in a step; those of an MLP of one launch lie behind it.
        modules += [
            own for module in modules if isinstance(module, FusedMLP) for own in module._mlp[0].children()
        ]
    linears = [module for module in modules if isinstance(module, torch.nn.Linear)]
    norms = [module for module in modules if "Norm" in type(module).__name__]
    inputs = {
        n: torch.randn(batch, n, device=device, dtype=dtype) for n in {layer.in_features for layer in linears}
    }
    hidden = inputs[config.hidden_size]
    normed = {len(hidden[0]): hidden, config.head_dim: query.squeeze(2)}
    logits = decoder.sampler.logits(hidden)
    uniforms, forced = (
        torch.rand(batch, dtype=torch.float64, device=device),
        torch.full((batch,), -1, device=device),
    )
    attention = model.model.layers[0].self_attn
    layers = range(config.num_hidden_layers)
    from stages.engine.slot_attention import attend

    functions: dict[str, Callable[[], Any]] = {
        "linear_ms": lambda: [layer(inputs[layer.in_features]) for layer in linears],
        "attention_ms": lambda: [
            attend(attention, query, slots.keys[0], slots.values[0], None, slots=slots) for _ in layers
        ],
        "norms_ms": lambda: [norm(normed[len(norm.weight)]) for norm in norms],
        "store_ms": lambda: [slots.update(new, new, 0) for _ in layers],
        "head_ms": lambda: decoder.sampler.logits(hidden),
        "draw_ms": lambda: choose(logits, uniforms, forced, sampling_of(shape)),
    }
    return {
        name: measure(replayable(function, device), bench.device, bench.seconds).median
        for name, function in functions.items()
    }


def replayable(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function captured, so that a part is not timed by its launches; on a CPU the function itself."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
