"""The sweep over model types: what it calls right and wrong, and the page made of its results."""

import json
from pathlib import Path

import pytest

from bench import architectures, models_page


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logits are divided by 3."""
    return architectures.save("granite", tmp_path_factory.mktemp("models") / "granite")


def test_a_type_that_is_computed_right_is_judged_right(granite: Path, tmp_path: Path) -> None:
    found = architectures.Found()
    architectures.judge(found, tmp_path / "run", architectures.Models(granite, granite), "own teacher")
    assert found.wrong == []
    assert len(found.gaps) == 4
    assert max(found.gaps.values()) < architectures.EXACT
    assert found.padded_because == ""
    assert not found.by_generate


def test_logits_off_by_a_factor_are_judged_wrong(
    granite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs take `granite`; transformers computes it with its logits divided by 3.3 instead of 3."""
    read = architectures.reference_logprobs

    def doctored(folder: Path, *rest):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"logits_scaling": 1.1 * config["logits_scaling"]})
        )
        try:
            return read(folder, *rest)
        finally:
            (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(architectures, "reference_logprobs", doctored)
    found = architectures.Found()
    architectures.judge(found, tmp_path / "run", architectures.Models(granite, granite), "own teacher")
    assert [each.split(": ")[1] for each in found.wrong] == [
        "behaviour",
        "teacher",
        "student without gradients",
        "student in training",
    ]


@pytest.mark.parametrize(
    ("kind", "looks_ahead"), [("qwen3", False), ("prophetnet", True)], ids=["causal", "sees what follows"]
)
def test_a_forward_that_looks_ahead_is_found(kind: str, looks_ahead: bool, tmp_path: Path) -> None:
    folder = architectures.save(kind, tmp_path / "model")
    assert (architectures.leak_of(folder) > architectures.EXACT) == looks_ahead


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads(architectures.RESULTS.read_text())
    assert architectures.PAGE.read_text() == models_page.page(results)


def test_no_type_is_wrong_and_the_common_ones_are_right() -> None:
    results = json.loads(architectures.RESULTS.read_text())
    assert {kind for kind, record in results.items() if record["verdict"] in ("wrong", "breaks")} == set()
    assert {kind for kind in models_page.COMMON.values() if results[kind]["verdict"] != "right"} == set()


def test_a_type_has_one_line() -> None:
    record = {
        "verdict": "right",
        "by_generate": True,
        "padded_because": "it has custom attention",
        "attention": "eager",
    }
    line = "right, with `attn_implementation: eager`, by generate, padded (it has custom attention)"
    assert models_page.outcome(record) == line
    record = {"verdict": "refused", "because": "a model of type x | y cannot be used.", "teacher": "right"}
    assert (
        models_page.outcome(record) == "refused: a model of type x \\| y cannot be used. As a teacher: right."
    )
    record["verdict"], record["teacher"] = "wrong", "wrong: teacher: off by 2"
    line = "**wrong**: a model of type x \\| y cannot be used.; as a teacher wrong: teacher: off by 2"
    assert models_page.outcome(record) == line
    record = {"verdict": "wrong", "wrong": ["behaviour: off by 2", "teacher: off by 3"]}
    assert models_page.outcome(record) == "**wrong**: behaviour: off by 2; teacher: off by 3"
