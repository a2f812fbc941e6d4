"""`bench/stage_one.py`, part scoring (`stage_one_teacher.py`), at a tiny shape on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import stage_one, stage_one_teacher


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    stage_one.PROGRAM.main(["--device", "cpu", "--tiny", "--out", str(folder), *arguments])
    return json.loads((folder / "stage_one.json").read_text())["cpu"]


def test_scoring_has_its_rates(tmp_path: Path) -> None:
    found = bench(tmp_path, "--only", "scoring")["scoring"]
    assert found["scored_share_of_bare"] == pytest.approx(
        found["scored_tokens_per_second"] / found["bare_tokens_per_second"]
    )
    assert found["backbone_tokens_per_second"] > 0
    assert 0 <= found["share_waiting_for_writer"] < 1


@pytest.mark.thorough
def test_zero3_says_what_plain_says(tmp_path: Path) -> None:
    found = bench(tmp_path, "--only", "zero3")["zero3"]
    assert found["processes"] == 2
    for name in ("zero3", "modules"):
        assert found[f"max_logprob_gap_{name}_plain"] == 0
        assert found[f"{name}_share_of_plain"] == pytest.approx(
            found[f"{name}_tokens_per_second"] / found["plain_tokens_per_second"]
        )


def test_the_shapes_are_those_of_the_models() -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    for name, billions in (("32B", 32.8), ("8B", 8.2)):
        config = Qwen3Config(
            vocab_size=stage_one_teacher.VOCABULARY,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=False,
            **stage_one_teacher.SHAPES[name],
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)


def test_shared_prompts_score_the_same_logprobs(tmp_path: Path) -> None:
    found = bench(tmp_path, "--only", "sharing/*")
    for name in stage_one_teacher.SHARING:
        record = found[f"sharing/{name}"]
        assert record["mean_logprob_gap"] < 1e-6
        assert record["shared_over_alone"] == pytest.approx(
            record["shared_rows_per_second"] / record["alone_rows_per_second"]
        )
