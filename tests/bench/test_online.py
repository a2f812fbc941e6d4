"""`bench/online.py` at a tiny shape on the CPU: what its cells measure, and the ratios of its table."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bench import online
from stages.loops import budgets
from stages.models.memory import GIB
from stages.runtime import gpu_memory

NO_TRL = importlib.util.find_spec("trl") is None


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    online.PROGRAM.main(["--device", "cpu", "--tiny", "--out", str(folder), "--seconds", "0.01", *arguments])
    return json.loads((folder / "online.json").read_text())["cpu"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return bench(tmp_path_factory.mktemp("online"))


def test_on_a_gpu_auto_batch_sizes_find_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda world: 30 * GIB)
    monkeypatch.setattr(gpu_memory, "peak_bytes", lambda device, work, **_: float(bool(work()) + GIB))
    found = bench(tmp_path, "--only", "ours/both")
    assert found["ours/both"]["status"] == "ok", found


def test_our_cells_have_their_rates(found: dict[str, dict[str, Any]]) -> None:
    first, both = found["ours/stage_one"], found["ours/both"]
    assert (first["status"], both["status"]) == ("ok", "ok"), (first, both)
    assert first["rollouts_per_second"] == pytest.approx(8 / first["stage_one_seconds"])
    assert both["stage_one_seconds"] == first["stage_one_seconds"]  # the same rows
    seconds = both["stage_one_seconds"] + both["stage_two_seconds"]
    assert both["tokens_per_second"] == pytest.approx(8 * 12 / seconds)
    assert first["share_generate"] + first["share_score"] <= 1


def test_both_stages_can_be_measured_alone(tmp_path: Path) -> None:
    assert bench(tmp_path, "--only", "ours/both")["ours/both"]["tokens_per_second"] > 0


@pytest.mark.skipif(NO_TRL, reason="TRL is not installed here")
@pytest.mark.parametrize("name", ["trl/4", "trl/2", "trl/4/static"])
def test_a_step_of_the_peer_holds_its_parts(found: dict[str, dict[str, Any]], name: str) -> None:
    record, batch = found[name], int(name.split("/")[1])
    assert record["status"] == "ok", record
    assert 0 < record["generate_seconds"] + record["teacher_seconds"] < record["step_seconds"]
    assert record["tokens_per_second"] == pytest.approx(batch * 12 / record["step_seconds"])
    assert len(record["steps"]) == 2


def test_four_completions_of_a_prompt_on_our_side(found: dict[str, dict[str, Any]]) -> None:
    for kind, length in (("group", 12), ("long", 16)):
        record = found[f"ours/both/{kind}"]
        assert record["status"] == "ok", record
        seconds = record["stage_one_seconds"] + record["stage_two_seconds"]
        assert record["tokens_per_second"] == pytest.approx(8 * length / seconds)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_its_cells_say_how_to_name_it(found: dict[str, dict[str, Any]]) -> None:
    record = found["trl/vllm/group"]
    assert record["status"] == "not installed"
    assert "--vllm" in record["message"]


@pytest.mark.skipif(not NO_TRL, reason="TRL is installed here")
def test_a_peer_that_is_not_installed_says_so(found: dict[str, dict[str, Any]]) -> None:
    assert found["trl/4"]["status"] == "not installed"
    assert "trl" in found["trl/4"]["message"]


def test_the_table_compares_with_the_best_batch_of_the_peer() -> None:
    def rates(rollouts: float, tokens: float) -> dict[str, Any]:
        return {"status": "ok", "rollouts_per_second": rollouts, "tokens_per_second": tokens}

    cells: dict[str, dict[str, Any]] = {
        "ceilings": {"status": "ok"},
        "ours/stage_one": {"status": "ok", "rollouts_per_second": 60.0},
        "ours/both": rates(50.0, 9000.0),
        "trl/128": {"status": "OOM", "message": ""},
        "trl/64": rates(10.0, 1500.0),
        "trl/32": rates(5.0, 2000.0),
        "ours/both/group": rates(60.0, 12_000.0),
        "trl/vllm/group": rates(20.0, 4000.0),
    }
    assert online.table({"card": cells}).splitlines()[2:] == [
        "| card | ours/stage_one | 60.0 | 6.00 | – | – |",
        "| card | ours/both | 50.0 | 5.00 | 9000.0 | 4.50 |",
        "| card | trl/128 | OOM |  |  |  |",
        "| card | trl/64 | 10.0 | 1.00 | 1500.0 | 0.75 |",
        "| card | trl/32 | 5.0 | 0.50 | 2000.0 | 1.00 |",
        "| card | ours/both/group | 60.0 | 3.00 | 12000.0 | 3.00 |",
        "| card | trl/vllm/group | 20.0 | 1.00 | 4000.0 | 1.00 |",
    ]


def test_words_have_the_ids_of_both_models_and_eos_has_none() -> None:
    setting = online.TINY
    tokenizer = online.tokenizer_of(setting.vocab_size)
    ids = online.prompts_of(setting, 3)
    texts = [" ".join(map(online.word_of, row)) for row in ids]
    assert tokenizer(text=texts)["input_ids"] == ids.tolist()
    assert tokenizer.pad_token_id == 0
    assert 0 < ids.min() <= ids.max() < setting.vocab_size == tokenizer.eos_token_id


def test_the_shapes_are_those_of_the_models() -> None:
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(online.REAL.student.model)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(1.72, abs=0.01)
    assert online.REAL.vocab_size == online.REAL.teacher_size.vocabulary == 151_936
    assert online.REAL.num_rows == 2048
