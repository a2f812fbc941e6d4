"""The ZeRO-3 teacher is the plain model, bit by bit, however many processes share it."""

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import deepspeed.comm
import numpy as np
import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules

from bench.tiny_types import tiny_model
from stages.data.alignment import Aligned, align, at_scored
from stages.loops.leaks import allocated_bytes
from stages.models import pretrained
from stages.models.sharding import decoder_layers
from stages.models.student import load_student
from stages.models.teacher import (
    Teacher,
    TeacherLoader,
    is_sharded,
    load_teacher,
    plain_teacher,
    restore_buffers,
    sharded_teacher,
    zero3_settings,
)
from stages.runtime import config as configuration
from stages.runtime import distributed
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, Forker, make_config, run_python, small

LENGTHS = (7, 300, 41, 1)


def batch(packed: bool = False) -> Aligned:
    """Sequences of random ids of these lengths, padded or packed; all tokens but each first are scored."""
    random = np.random.default_rng(0)
    sequences = [random.integers(4, 230, length + 1) for length in LENGTHS]
    return align(
        [s[:1] for s in sequences], [s[1:] for s in sequences], 0, torch.device("cpu"), packed=packed
    )


def group(shared: bool) -> Aligned:
    """Packed completions of these lengths of two prompts."""
    random = np.random.default_rng(1)
    prompts = [prompt for length in (40, 1) for prompt in [random.integers(4, 230, length)] * len(LENGTHS)]
    completions = [random.integers(4, 230, length) for length in 2 * LENGTHS]
    return align(prompts, completions, 0, torch.device("cpu"), packed=True, shared=shared)


def gathers_of(teacher: Teacher) -> tuple[int, list[list[float]]]:
    """Collectives of a forward, and the share of each layer that is gathered or in flight as a layer begins.

    After as many forwards as DeepSpeed needs to know the order of the modules.
    """
    for _ in range(3):
        teacher.hidden(batch())
    layers = decoder_layers(teacher.engine.module)
    calls: list[Any] = []
    shares: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        gather = deepspeed.comm.allgather_fn
        patch.setattr(deepspeed.comm, "allgather_fn", lambda *a, **k: calls.append(1) or gather(*a, **k))
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: shares.append([share_present(x) for x in layers]))
        teacher.hidden(batch())
    return len(calls), shares


def share_present(layer: torch.nn.Module) -> float:
    weights: list[Any] = list(layer.parameters())
    present = sum(p.ds_numel for p in weights if p.ds_status.name != "NOT_AVAILABLE")
    return present / sum(p.ds_numel for p in weights)


def score(folder: Path, flags: list[str]) -> None:
    """In a process of its own: load the teacher, score `batch`, write the results to folder/RANK.pt."""
    config = configuration.parse_arguments(flags, "")
    world = distributed.start("cpu")
    teacher = load_teacher(config, world)
    found: dict[str, Any] = {"hidden": teacher.hidden(batch()), "collective": teacher.is_collective}
    teacher.dummy()
    found["again"] = teacher.hidden(batch())
    found["packs"] = teacher.packs
    if teacher.packs:
        found["packed"] = at_scored(teacher.hidden(batch(packed=True)), batch(packed=True))
        found["shared"] = at_scored(teacher.hidden(group(shared=True)), group(shared=True))
        found["alone"] = at_scored(teacher.hidden(group(shared=False)), group(shared=False))
    found["shares"], found["layers"] = teacher.shares, teacher.config.num_hidden_layers
    found["head"] = teacher.head.weight
    if teacher.engine is not None:
        parameters = list(teacher.engine.module.model.named_parameters())
        found["sizes"] = {n: (p.ds_numel, p.numel(), p.ds_tensor.numel()) for n, p in parameters}
        found["dtypes"] = {p.ds_tensor.dtype for _, p in parameters}
        rotary = teacher.engine.module.model.model.rotary_emb
        found["inv_freq"] = rotary.inv_freq.clone()
        found["leaves"] = [type(module).__name__ for module in get_z3_leaf_modules(teacher.engine.module)]
        found["gathers"] = gathers_of(teacher)
    teacher.close()
    found["closed"] = teacher.engine is None and teacher.forward is None and teacher.head is None
    vocabulary = pretrained.load_tokenizer(config.models.student_model)
    student = load_student(config, world.device, 230, vocabulary)
    found["student_is_whole"] = not any(
        hasattr(p, "ds_tensor") or p.numel() == 0 for p in student.model.parameters()
    )
    torch.save(found, folder / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def scored(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `score` saw, one entry a rank; the same request is run once."""
    kept: dict[Any, list[dict[str, Any]]] = {}

    def get(processes: int, **values: Any) -> list[dict[str, Any]]:
        key = (processes, tuple(values.items()))
        if key not in kept:
            folder = tmp_path_factory.mktemp("scored")
            forked.call(score, folder, small(folder, **values), processes=processes).expect_success()
            kept[key] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
        return kept[key]

    return get


@pytest.fixture(scope="module")
def plain(scored: Any) -> Any:
    """Hidden states of the plain teacher in a dtype."""
    return lambda dtype: scored(1, teacher_dtype=dtype, teacher_ds_zero3="false")[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_sharded_teacher_is_the_plain_model_bit_by_bit(scored: Any, plain: Any, dtype: str) -> None:
    mask = batch().attention_mask
    assert mask is not None
    for seen in scored(2, teacher_dtype=dtype):
        assert seen["collective"]
        assert seen["hidden"].dtype == pretrained.DTYPES[dtype]
        assert torch.equal(seen["hidden"][mask.bool()], plain(dtype)["hidden"][mask.bool()])
        assert torch.equal(seen["head"], plain(dtype)["head"])


def test_the_plain_teacher_is_transformers_own_forward(plain: Any, teacher_model: Any) -> None:
    rows = batch()
    with torch.no_grad():
        output = teacher_model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True
        )
    seen = plain("fp32")
    assert not seen["collective"]
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(seen["hidden"][row, :length], output.hidden_states[-1][row, :length])
        logits = seen["hidden"][row, :length] @ seen["head"].T
        torch.testing.assert_close(logits, output.logits[row, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "processes"),
    [({"teacher_ds_zero3": "false"}, 1), ({}, 2)],
    ids=["plain", "zero3 on two"],
)
def test_packed_rows_are_scored_as_padded_ones(scored: Any, values: dict[str, Any], processes: int) -> None:
    seen = scored(processes, teacher_dtype="fp32", **values)[0]
    assert seen["packs"]
    torch.testing.assert_close(seen["packed"], at_scored(seen["hidden"], batch()), atol=1e-5, rtol=1e-5)
    assert seen["shares"]
    torch.testing.assert_close(seen["shared"], seen["alone"], atol=1e-5, rtol=1e-5)


def test_a_teacher_that_may_not_pack_says_so(scored: Any) -> None:
    assert not scored(1, teacher_ds_zero3="false", packing="off")[0]["packs"]


def test_every_parameter_is_partitioned(scored: Any) -> None:
    for seen in scored(2, teacher_dtype="bf16"):
        assert seen["sizes"]
        for name, (whole, present, part) in seen["sizes"].items():
            assert present == 0, f"{name} is whole"
            assert part == -(-whole // 2), name
        assert seen["dtypes"] == {torch.bfloat16}


def test_the_rotary_frequencies_are_in_fp32_under_bf16(scored: Any, teacher_model: Any) -> None:
    for seen in scored(2, teacher_dtype="bf16"):
        assert seen["inv_freq"].dtype == torch.float32
        assert torch.equal(seen["inv_freq"], teacher_model.model.rotary_emb.inv_freq)


def test_forwards_between_dummies_repeat(scored: Any) -> None:
    for seen in scored(2, teacher_dtype="fp32"):
        assert torch.equal(seen["hidden"], seen["again"])


def test_a_layer_is_gathered_at_once_while_the_one_before_it_runs(scored: Any, teacher_model: Any) -> None:
    layers = teacher_model.config.num_hidden_layers
    for seen in scored(2, teacher_dtype="fp32"):
        assert seen["leaves"] == [type(teacher_model.model.layers[0]).__name__] * layers
        num_gathers, shares = seen["gathers"]
        assert num_gathers <= layers + 2
        for index, present in enumerate(shares):
            assert present[index : index + 2] == [1.0] * min(2, layers - index)
            assert sum(present) < 2.5


@pytest.mark.thorough
def test_settings_that_choose_the_modules_are_kept(scored: Any, plain: Any, tmp_path: Path) -> None:
    own = {"zero_optimization": {"leaf_module": {"classes": []}, "stage3_prefetch_bucket_size": 0}}
    mask = batch().attention_mask
    assert mask is not None
    layers = plain("fp32")["layers"]
    for seen in scored(2, teacher_dtype="fp32", teacher_ds_config=write_settings(tmp_path, own)):
        assert seen["gathers"][0] > 5 * layers
        assert torch.equal(seen["hidden"][mask.bool()], plain("fp32")["hidden"][mask.bool()])


def test_with_one_process_the_teacher_is_whole(scored: Any, plain: Any, tmp_path: Path) -> None:
    assert torch.equal(scored(1, teacher_dtype="fp32")[0]["hidden"], plain("fp32")["hidden"])
    assert not scored(1, teacher_dtype="fp32")[0]["collective"]
    said: list[str] = []
    for value in ("true", "false"):
        config = make_config(tmp_path, teacher_ds_zero3=value)
        with TeacherLoader(config, distributed.start("cpu"), said.append) as loader:
            assert not loader.get().is_collective
    assert said == [
        "loading the teacher (whole: one process) and checking how it computes",
        "loading the teacher and checking how it computes",
    ]


def test_one_process_shards_a_teacher_whose_weights_are_offloaded(tmp_path: Path) -> None:
    path = write_settings(tmp_path, OWN_SETTINGS)
    assert is_sharded(make_config(tmp_path, teacher_ds_config=path), 1)
    assert not is_sharded(make_config(tmp_path), 1)
    assert is_sharded(make_config(tmp_path), 2)
    assert not is_sharded(make_config(tmp_path, teacher_ds_zero3="false"), 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_after_closing_a_student_loads_whole(scored: Any, processes: int) -> None:
    for seen in scored(processes, teacher_dtype="fp32"):
        assert seen["closed"]
        assert seen["student_is_whole"]


def score_with_experts(folder: Path) -> None:
    """In a process of its own: a mixture of experts on other tokens in each process, plain and sharded."""
    world, config = distributed.start("cpu"), make_config(folder, teacher_dtype="fp32")
    model = tiny_model("qwen3_moe")
    whole = plain_teacher(copy.deepcopy(model), world, "auto")
    distributed.ensure_process_group(world)
    sharded = sharded_teacher(model, zero3_settings(config), world, "auto")
    random = np.random.default_rng(world.rank)
    for length in (1, 2, 40, 2, 1):
        row = random.integers(4, 200, length + 1)
        rows = align([row[:1]], [row[1:]], 0, world.device)
        assert torch.equal(sharded.hidden(rows), whole.hidden(rows))


def test_processes_that_choose_different_experts_score_as_the_plain_model(
    forked: Forker, tmp_path: Path
) -> None:
    forked.call(score_with_experts, tmp_path, processes=2).expect_success()


def write_settings(folder: Path, settings: Any) -> str:
    path = folder / "teacher.json"
    path.write_text(json.dumps(settings))
    return str(path)


OWN_SETTINGS = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.mark.thorough
def test_ones_own_deepspeed_settings_with_autos_and_offload_score_the_same(
    scored: Any, plain: Any, tmp_path: Path
) -> None:
    path = write_settings(tmp_path, OWN_SETTINGS)
    mask = batch().attention_mask
    assert mask is not None
    for seen in scored(2, teacher_dtype="fp32", teacher_ds_config=path):
        assert torch.equal(seen["hidden"][mask.bool()], plain("fp32")["hidden"][mask.bool()])


def test_autos_are_filled_in_and_training_parts_left_out(tmp_path: Path) -> None:
    path = write_settings(tmp_path, OWN_SETTINGS)
    settings = zero3_settings(make_config(tmp_path, teacher_ds_config=path, teacher_dtype="bf16"))
    assert "auto" not in json.dumps(settings)
    assert settings["bf16"] == {"enabled": True}
    assert settings["train_micro_batch_size_per_gpu"] == 1
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert settings["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert not settings.keys() & {
        "optimizer",
        "scheduler",
        "fp16",
        "train_batch_size",
        "gradient_accumulation_steps",
    }


def test_the_built_in_settings_keep_no_parameter_whole(tmp_path: Path) -> None:
    settings = zero3_settings(make_config(tmp_path))
    assert settings["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 0}
    assert settings["bf16"] == {"enabled": False}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_another_zero_stage_is_refused(tmp_path: Path, stage: int) -> None:
    path = write_settings(tmp_path, {"zero_optimization": {"stage": stage}})
    with pytest.raises(UserError, match=f"asks for ZeRO stage {stage}; the teacher is sharded with stage 3"):
        zero3_settings(make_config(tmp_path, teacher_ds_config=path))


@pytest.mark.parametrize("content", ["{not json", "", "[]", '"text"', '{"zero_optimization": 3}'])
def test_settings_that_are_no_json_object_are_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "teacher.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"teacher\.json"):
        zero3_settings(make_config(tmp_path, teacher_ds_config=path))


def test_missing_settings_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        zero3_settings(make_config(tmp_path, teacher_ds_config="nowhere.json"))


def test_rounded_rotary_frequencies_are_put_back(teacher_model: Any) -> None:
    model = copy.deepcopy(teacher_model).to(torch.bfloat16)
    rotary = model.model.rotary_emb
    expected = teacher_model.model.rotary_emb.inv_freq
    rotary.inv_freq = expected.to(torch.bfloat16)
    assert not torch.equal(rotary.inv_freq.float(), expected)  # bf16 cannot hold them
    restore_buffers(model)
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, expected)
    assert "inv_freq" in dict(rotary.named_buffers())


def test_the_loader_loads_once_and_frees_at_the_end(tmp_path: Path) -> None:
    with TeacherLoader(make_config(tmp_path, teacher_ds_zero3="false"), distributed.start("cpu")) as loader:
        teacher = loader.get()
        assert loader.get() is teacher
    assert teacher.forward is None
    assert teacher.head is None


def test_a_teacher_that_is_not_asked_for_is_not_loaded(tmp_path: Path) -> None:
    with TeacherLoader(make_config(tmp_path, teacher_model="nowhere/at-all"), distributed.start("cpu")):
        pass


@pytest.mark.thorough
def test_scoring_needs_no_compiler(tmp_path: Path) -> None:
    """No PATH, nothing compiled before: DeepSpeed on a CPU would ask for g++ and ninja."""
    code = (
        "from pathlib import Path; from tests.stages.models.test_teacher import score; from"
        f" tests.support.helpers import small; score(Path({str(tmp_path)!r}),"
        f" small(Path({str(tmp_path)!r})))"
    )
    extensions = tmp_path / "extensions"
    run_python("-c", code, PATH="", TORCH_EXTENSIONS_DIR=str(extensions)).expect_success()
    assert (tmp_path / "0.pt").exists()
    assert not extensions.exists() or not list(extensions.rglob("*.so"))


def test_the_identity_of_a_model_follows_its_weights_and_configuration(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(ROOT / STUDENT, folder)
    same = pretrained.identity(str(ROOT / STUDENT))
    assert pretrained.identity(str(folder)) == same
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = pretrained.identity(str(folder))
    assert changed != same
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert pretrained.identity(str(folder)) not in (same, changed)


def score_and_close(flags: list[str], num_refreshes: int) -> None:
    """In a process of its own: loads, uses and closes a teacher again and again; checks that nothing holds
    its weights.

    DeepSpeed fills its caches once a forward has run along a complete trace, so each use has forwards of
    several shapes.
    """
    world, bytes_after = distributed.start("cpu"), []
    for _ in range(num_refreshes):
        loaded = load_teacher(configuration.parse_arguments(flags, ""), world)
        parameters = list(loaded.engine.module.parameters())
        size = sum(parameter.ds_tensor.nbytes for parameter in parameters)
        kept = [weakref.ref(part) for parameter in parameters for part in (parameter, parameter.ds_tensor)]
        del parameters
        loaded.hidden(batch())
        for length in (3, 17, 9):
            row = np.arange(4, 4 + length)
            loaded.hidden(align([row[:1]], [row[1:]], 0, world.device))
        loaded.dummy()
        loaded.close()
        bytes_after.append(allocated_bytes(world.device))
        assert [part() for part in kept] == [None] * len(kept)
    assert size > 4e6  # this process's part
    assert max(bytes_after) - bytes_after[0] <= 0.01 * size, bytes_after


def test_closed_teachers_leave_nothing_in_memory(tmp_path: Path, forked: Forker) -> None:
    forked.call(score_and_close, small(tmp_path), 4, processes=2).expect_success()


def keep_all_and_close(flags: list[str]) -> None:
    """In a process of its own: whatever holds a closed teacher's modules holds no weights."""
    loaded = load_teacher(configuration.parse_arguments(flags, ""), distributed.start("cpu"))
    module, before = loaded.engine.module, allocated_bytes(loaded.device)
    size = sum(parameter.ds_tensor.nbytes for parameter in module.parameters())
    loaded.close()
    assert before - allocated_bytes(torch.device("cpu")) >= size
    assert len(list(module.parameters())) > 40


def test_a_closed_teacher_that_is_held_somewhere_is_hollow(tmp_path: Path, forked: Forker) -> None:
    forked.call(keep_all_and_close, small(tmp_path), processes=2).expect_success()
