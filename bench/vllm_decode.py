"""vLLM's decode rate on the rows of `bench/stage_one_decode.py`, in a process of its own.

    python -m bench.vllm_decode SPEC.json

SPEC: `config` of the model, `batch`, `prompt`, `new`, `lengths` (of the spread), `runs`, `out`. Weights are
made by vLLM; texts have the lengths asked for, and the sampled tokens' log-probabilities come with them. The
first call of a case, which captures, is not counted. Imports nothing of this project.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    started = time.perf_counter()
    engine = open_engine(spec)
    found: dict[str, Any] = {"start_seconds": time.perf_counter() - started}
    random = np.random.default_rng(0)
    batch, new = spec["batch"], spec["new"]
    cases = {
        "whole": (batch, 1, [new]),
        "groups": (batch // 4, 4, [new]),
        "spread": (4 * batch, 1, spec["lengths"]),
    }
    for name, (count, group, lengths) in cases.items():
        lengths = lengths * (count // len(lengths))
        rates = []
        for _ in range(1 + spec["runs"]):
            vocabulary = spec["config"]["vocab_size"]
            prompts = random.integers(10, vocabulary - 10, (count, spec["prompt"])).tolist()
            rates.append(rate(engine, prompts, lengths, group))
        found[f"{name}_tokens_per_second"] = statistics.median(rates[1:])
        Path(spec["out"]).write_text(json.dumps(found))
        print(name, rates, flush=True)


def open_engine(spec: dict[str, Any]) -> Any:
    from vllm import LLM

    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(spec["config"]))
    return LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.85,
        max_num_seqs=spec["batch"],
        seed=0,
        attention_config={"backend": "FLASH_ATTN"},
    )


def rate(engine: Any, prompts: list[list[int]], lengths: list[int], group: int) -> float:
    """Tokens of the completions per second of the call."""
    from vllm import SamplingParams

    fixed = {
        "temperature": 1.0,
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,
        "flat_logprobs": True,
    }
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    started = time.perf_counter()
    done = engine.generate(
        asked, [SamplingParams(n=group, max_tokens=n, **fixed) for n in lengths], use_tqdm=False
    )
    seconds = time.perf_counter() - started
    tokens = sum(len(text.token_ids) for request in done for text in request.outputs)
    assert tokens == group * sum(lengths), (tokens, group * sum(lengths))
    return tokens / seconds


if __name__ == "__main__":
    main()
