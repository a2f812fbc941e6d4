"""The model card: figures with intervals, whose weights they are, and no markup from paths and settings."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.runtime import card
from stages.runtime.card import Weights, model_card
from tests.support.helpers import make_config


def configured(**values: Any) -> dict[str, Any]:
    return {
        "kind": "config",
        "from_step": 1,
        "config": {"train": values},
        "command": "python -m stages.pipeline",
    }


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "tokens": 100, "cut_share": 0.25} | values


def evaluation(label: str, policy_hash: str, accuracy: float, kl: float) -> dict[str, Any]:
    kls = {"forward_kl": kl, "forward_kl_error": 0.01, "reverse_kl": 2 * kl, "reverse_kl_error": None}
    own = {"on_student": kls, "accuracy": accuracy, "answers": 100, "cut_share": 0.0}
    return {"kind": "evaluation", "label": label, "policy_hash": policy_hash} | kls | own


RECORDS = [
    evaluation("before", "old", 0.4, 0.5),
    configured(),
    *(step(n) for n in (1, 2, 3, 4)),
    evaluation("after", "new", 0.5, 0.25),
]


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_has_figures_before_and_after_with_intervals() -> None:
    _, body = parts(model_card(RECORDS, make_config(Path("runs"), max_steps=4), Weights(4, "new")))
    assert "| problems solved | 40.0% (30.9 to 49.8) | 50.0% (40.4 to 59.6) | – |" in body
    assert "| forward KL on its own text | 0.5000 ± 0.0196 | 0.2500 ± 0.0196 | – |" in body
    assert "| reverse KL on teacher text | 1.0000 | 0.5000 | – |" in body
    assert "100 prompts of examples/arithmetic/heldout.jsonl" in body
    assert "400 tokens were trained on; 25 % of completions were cut at max_new_tokens." in body
    assert "not finished" not in body
    assert "    python -m stages.pipeline" in body


def test_figures_of_other_weights_are_left_out() -> None:
    _, body = parts(model_card(RECORDS, make_config(Path("runs"), max_steps=4), Weights(2, "between")))
    assert "| problems solved | 40.0% (30.9 to 49.8) | – | – |" in body
    assert "These weights were not measured after training." in body


def test_an_unfinished_run_says_so() -> None:
    _, body = parts(model_card(RECORDS, make_config(Path("runs"), max_steps=9), Weights(4, "new")))
    assert "**The run is not finished: 4 of 9 steps were trained.**" in body


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "λ KL(student ‖ teacher) + (1 − λ) KL(teacher ‖ student); λ = σ(α (τ − d)), τ = 0.1 nats"),
        ({"gating": "hard", "gate_on": "teacher_entropy"}, "d being the teacher's entropy"),
        (
            {"gating": 0.25, "fkl": "argmax"},
            "cross-entropy on the teacher's argmax; λ = 0.25.",
        ),
        ({"objective": "jsd", "gating": 0.5}, "Jensen-Shannon divergence"),
    ],
)
def test_the_objective_is_spelled_out(values: dict[str, Any], expected: str) -> None:
    _, body = parts(model_card(RECORDS, make_config(Path("runs"), **values), Weights(4)))
    assert expected in body


def test_the_licence_is_that_of_the_base_unless_another_is_given(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    config = make_config(Path("runs"), student_model=tmp_path)
    head, body = parts(model_card(RECORDS, config, Weights(4)))
    assert head["license"] == "apache-2.0"
    assert f"* the base model, {tmp_path.name} (a local folder): apache-2.0" in body
    assert str(tmp_path) not in body
    assert "* the teacher, examples/arithmetic/teacher (a local folder): not named in its files" in body
    assert parts(model_card(RECORDS, config, Weights(4, licence="mit")))[0]["license"] == "mit"
    assert "base_model" not in head  # the hub refuses names that it does not have


@pytest.mark.parametrize("text", ["---\n- a\n---\n", "---\nlicense: [\n---\n", "# no front matter\n"])
def test_a_readme_without_a_licence_names_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card._licence_of(str(tmp_path)) == ""


def test_names_on_the_hub_are_in_the_front_matter() -> None:
    config = make_config(
        Path("runs"), student_model="Qwen/Qwen3-4B@main", dataset="openai/gsm8k:main:train", use_lora="false"
    )
    head, _ = parts(model_card(RECORDS, config, Weights(4)))
    assert head["base_model"] == "Qwen/Qwen3-4B"
    assert head["base_model_relation"] == "finetune"
    assert head["datasets"] == ["openai/gsm8k"]


def test_paths_are_text() -> None:
    path = "e\U0001f600\n# Title | <img src=x> [a](b) `c` \udcff"
    records = [
        {"kind": "config", "from_step": 1, "config": {"data": {"dataset": path}}},
        {"kind": "step", "step": 1},
    ]
    config = make_config(Path("runs"), student_model=path, teacher_model=path, eval_dataset=path)
    _, body = parts(model_card(records, config, Weights(1)))
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# demo",
        "## Training",
        "## Licence",
    ]
    assert re.findall(r"(?<!\\)[<>`\[\]]", body) == []
    (row,) = [line for line in body.splitlines() if line.startswith("| 1 to 1")]
    assert re.findall(r"(?<!\\)\|", row) == ["|"] * 3
    assert body.replace("\n", "").isprintable()
