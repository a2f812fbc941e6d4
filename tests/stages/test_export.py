"""Exported students: what other software loads, from which weights, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import export
from stages.engine.weights import DecodingWeights
from stages.models import exporting, folders, hub
from stages.models.readout import decoder_of
from stages.runtime import checkpoint
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, environment, make_run
from tests.support.tiny_runs import TINY, student_of, train_from

IDS = torch.tensor([[5, 40, 41, 99, 7, 12, 3, 77]])
TWO_STEPS: dict[str, Any] = {"max_steps": 2, "refresh_every": 0, "checkpoint_every": 1, "lr": 2e-2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, caches: Callable[..., str]) -> Path:
    """The folder of a run with LoRA, trained for two steps. Tests must not change it."""
    return train_from(tmp_path_factory.mktemp("trained"), caches(), **TWO_STEPS).folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "demo"))


def run_export(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    export.main()


def test_the_result_alone_is_printed_on_request(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(monkeypatch, run_folder, "--json")
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["folder"] == str(run_folder / "export")
    assert (facts["step"], facts["merged"]) == (2, False)
    assert any("AutoPeftModelForCausalLM" in line for line in facts["usage"])
    assert "exporting step 2 of 2" in err
    run_export(monkeypatch, run_folder, "--quiet", "--overwrite")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "exported  step 2, the adapter"
    assert "exporting step" not in out + err


def student_in(run: Path) -> Any:
    """The run's student as training had it last."""
    config = export._config_of(run)
    student = exporting.load_trained(config, exporting.find_source(run, config, []))
    return student.model.float()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def test_an_adapter_loads_with_its_base_from_any_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_export(monkeypatch, run_folder)
    out = run_folder / "export"
    wanted = logits(student_in(run_folder))
    monkeypatch.chdir(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), wanted)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), wanted)
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        ROOT / STUDENT
    )
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "weights of step 2" in (out / "README.md").read_text()


def test_merged_weights_have_the_layout_of_the_base_and_compute_the_same(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(monkeypatch, run_folder, "--merge")
    out = run_folder / "export-merged"
    assert folders.stored_shapes(str(out)) == folders.stored_shapes(STUDENT)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16  # the base's
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    base = AutoModelForCausalLM.from_pretrained(STUDENT)
    wanted = logits(student_in(run_folder))
    assert (logits(loaded) - wanted).norm() < 0.1 * (logits(base) - wanted).norm()
    assert "try       vllm serve" in capsys.readouterr().out
    run_export(monkeypatch, run_folder, "--merge", "--dtype", "fp32", "--out", run_folder / "exact")
    exact = AutoModelForCausalLM.from_pretrained(run_folder / "exact", dtype="auto")
    assert exact.dtype == torch.float32
    torch.testing.assert_close(logits(exact), wanted, atol=1e-3, rtol=1e-3)


def test_merged_weights_are_those_that_the_engine_generates_with(trained: Path) -> None:
    model = student_in(trained)
    decoder = decoder_of(model.get_base_model())
    with DecodingWeights(decoder, torch.bfloat16).swapped():
        wanted = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    found = decoder_of(exporting.merge(model, torch.bfloat16)).state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_a_fully_trained_student_is_exported_in_the_dtype_of_its_base(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_from(tmp_path, caches(), **(TWO_STEPS | {"use_lora": "false"})).folder
    run_export(monkeypatch, folder)
    assert folders.stored_shapes(str(folder / "export")) == folders.stored_shapes(STUDENT)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export", dtype="auto")
    kept = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="auto")
    assert (kept.dtype, loaded.dtype) == (torch.float32, torch.bfloat16)
    wanted = {name: tensor.bfloat16() for name, tensor in kept.state_dict().items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


# Which weights


def test_an_unfinished_run_is_exported_from_its_newest_checkpoint_and_says_so(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 9"))
    shutil.rmtree(run_folder / "student")
    run_export(monkeypatch, run_folder)
    assert "not finished (2 of 9 steps)" in capsys.readouterr().out
    card = (run_folder / "export/README.md").read_text()
    assert "**The run is not finished: 2 of 9 steps were trained.**" in card


def test_without_checkpoints_the_students_folder_is_exported(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(student_in(run_folder))
    shutil.rmtree(run_folder / "checkpoints")
    run_export(monkeypatch, run_folder, "--merge", "--dtype", "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(run_folder / "export-merged")
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-3, rtol=1e-3)
    shutil.rmtree(run_folder / "student")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        run_export(monkeypatch, run_folder, "--out", run_folder / "other")


def test_the_best_weights_are_exported_where_the_run_keeps_them(trained: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, **(TINY | {"export_checkpoint": "best", "eval_every": 1}))
    checkpoints = run.folder / "checkpoints"
    shutil.copytree(trained / "checkpoints", checkpoints)
    student = student_of(run)
    trainable = {name: torch.nn.Parameter(p + 1) for name, p in student.trainable.items()}
    checkpoint.save_best(checkpoints, trainable, checkpoint.Best(1, 0.5, "text"))
    source = exporting.find_source(run.folder, run.config, [])
    assert (source.kind, source.step) == ("best", 1)
    found = exporting.load_trained(run.config, source).trainable
    assert all(torch.equal(found[name], trainable[name]) for name in trainable)


def test_another_base_than_the_one_that_was_trained_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: Callable[..., str]
) -> None:
    base = Path(shutil.copytree(STUDENT, tmp_path / "base"))
    folder = train_from(tmp_path, caches(), **(TWO_STEPS | {"student_model": base})).folder
    changed = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        changed.model.norm.weight += 1
    changed.save_pretrained(base)
    with pytest.raises(
        UserError, match=r"base is not the model that the run was trained on.*put that model back"
    ):
        run_export(monkeypatch, folder)
    assert not (folder / "export").exists()


# Generation settings


def test_the_generation_config_is_the_bases_with_the_ends_of_the_rollouts(tmp_path: Path) -> None:
    base = Path(shutil.copytree(STUDENT, tmp_path / "base"))
    GenerationConfig(eos_token_id=[1, 2], do_sample=True, temperature=0.6, top_k=20).save_pretrained(base)
    found = exporting.generation_of(str(base), (1, 7))
    assert (found["temperature"], found["top_k"], found["eos_token_id"]) == (0.6, 20, [1, 7])
    (base / "generation_config.json").unlink()
    assert exporting.generation_of(str(base), (7,))["eos_token_id"] == 7


# What is refused


def test_a_folder_is_not_overwritten_unasked(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_export(monkeypatch, run_folder)
    (run_folder / "export/mine").write_text("")
    with pytest.raises(UserError, match=r"export exists; give --overwrite"):
        run_export(monkeypatch, run_folder)
    assert (run_folder / "export/mine").exists()
    run_export(monkeypatch, run_folder, "--overwrite")
    assert not (run_folder / "export/mine").exists()
    with pytest.raises(UserError, match=r"checkpoints was not written by this command"):
        run_export(monkeypatch, run_folder, "--overwrite", "--out", run_folder / "checkpoints")
    model = run_folder / "own-model"
    model.mkdir()
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"own-model was not written by this command"):
        run_export(monkeypatch, run_folder, "--overwrite", "--out", model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"there is no run at nowhere; there are"),
        (["stages"], r"stages is not the folder of a run \(it has no config.yaml\)"),
        ([ROOT / "pipeline.yaml"], r"pipeline.yaml is a file; give the folder of a run"),
        ([ROOT / STUDENT], r"is a model's folder already; give the folder of the run"),
        ([], r"RUN is missing; `dualkl export --help`"),
        (["nowhere", "--dtype", "int3"], r"--dtype: expected bf16 or fp16 or fp32, got int3"),
        (["nowhere", "--merged"], r"unknown option --merged of dualkl export; did you mean --merge\?"),
    ],
)
def test_wrong_input_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, arguments: list[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_export(monkeypatch, *arguments)


def test_a_full_disk_leaves_no_folder(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "replace_text", full)
    with pytest.raises(UserError, match=r"could not be written to .*export.*No space left.*another --out"):
        run_export(monkeypatch, run_folder)
    assert [path.name for path in run_folder.iterdir() if "export" in path.name] == []


# The hub


def test_a_push_without_the_hub_is_one_sentence_before_any_work(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--push alone: expected USER/NAME"):
        run_export(monkeypatch, run_folder, "--merge", "--push", "alone")
    with pytest.raises(
        UserError, match=r"--push me/it: the Hugging Face hub cannot be used from here.*hf upload"
    ):
        run_export(monkeypatch, run_folder, "--merge", "--push", "me/it")
    with pytest.raises(UserError, match=r"this one's is the folder .*, which nobody else has; add --merge"):
        run_export(monkeypatch, run_folder, "--push", "me/it")
    assert not (run_folder / "export").exists()


def test_a_push_uploads_the_folder_to_a_private_repository(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def whoami(self) -> None:
            calls.append(("whoami", None))

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            calls.append(("create", (name, private, exist_ok)))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", (repo_id, sorted(path.name for path in folder_path.iterdir()))))

    monkeypatch.setattr(hub, "HfApi", Hub)
    run_export(monkeypatch, run_folder, "--merge", "--push", "me/it")
    assert [name for name, _ in calls] == ["whoami", "create", "upload"]
    assert calls[1][1] == ("me/it", True, True)
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(calls[2][1][1])
    assert "pushed    https://huggingface.co/me/it" in capsys.readouterr().out


# Other software

TASK = """task: arithmetic_word_problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "The answer is {{{{answer}}}}."
generation_kwargs: {{until: [], max_gen_toks: 56, do_sample: false}}
filter_list:
  - name: answer
    filter:
      - {{function: regex, regex_pattern: "(The answer is -?\\\\d+\\\\.)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_lm_eval_reads_the_folder_alone_and_solves_what_the_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed here (0.4.13 works with transformers 5)")
    command = [
        sys.executable,
        "-m",
        "stages.pipeline",
        "--config",
        "pipeline.yaml",
        "--runs_dir",
        str(tmp_path),
    ]
    smaller = ["--max_steps", "16", "--eval_prompts", "64"]
    subprocess.run([*command, *smaller], check=True, env=environment(), cwd=ROOT)
    run_export(monkeypatch, tmp_path / "demo", "--merge")
    model = Path(shutil.move(tmp_path / "demo/export-merged", tmp_path / "alone"))
    after = json.loads((tmp_path / "demo/eval/after.json").read_text())["accuracy"]
    shutil.rmtree(tmp_path / "demo")
    (tmp_path / "task.yaml").write_text(TASK.format(data=ROOT / "examples/arithmetic/heldout.jsonl"))
    arguments = f"--model hf --model_args pretrained={model} --tasks arithmetic_word_problems --limit 64"
    arguments += f" --include_path {tmp_path} --output_path {tmp_path}/out"
    more = "--apply_chat_template --device cpu --batch_size 64"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split(), *more.split()],
        check=True,
        env=environment(),
        cwd=tmp_path,
    )
    (result,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(result.read_text())["results"]["arithmetic_word_problems"]
    assert found["exact_match,answer"] == pytest.approx(after, abs=2 / 64)
