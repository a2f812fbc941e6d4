"""The planner: its arithmetic against real modules, its verdicts, and what it says of wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bench import plan_check
from bench.counted_memory import CountedMemory
from stages import plan as command
from stages.loops import cpu_plan, planning
from stages.loops.planning import Machine, make_plan
from stages.models import memory, speed
from stages.models.memory import GIB
from stages.models.teacher import resident_bytes
from stages.runtime import host_memory
from stages.runtime.config import Config, LoraSection, parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, flags

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig, "gemma": GemmaConfig, "mistral": MistralConfig}
QWEN3 = {  # width, MLP, layers, heads, tied, parameters
    "Qwen3-0.6B": (1024, 3072, 28, 16, True, 596_049_920),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True, 1_720_574_976),
    "Qwen3-4B": (2560, 9728, 36, 32, True, 4_022_468_096),
    "Qwen3-8B": (4096, 12288, 36, 32, False, 8_190_735_360),
    "Qwen3-32B": (5120, 25600, 64, 64, False, 32_762_123_264),
}
LAUNCH = [
    "--batch_size",
    "256",
    "--group_size",
    "4",
    "--grad_accum",
    "8",
    "--max_new_tokens",
    "512",
    "--use_lora",
    "--lora_r",
    "64",
    "--dtype",
    "bf16",
    "--tau",
    "1.0",
    "--alpha",
    "5.0",
    "--gating",
    "soft",
    "--rkl",
    "exact",
    "--fkl",
    "full",
    "--teacher_ds_zero3",
    "--gen_micro_batch",
    "4",
    "--lp_micro_batch",
    "8",
]
TWO_80GB = Machine(speed.GPUS["h100"], 2, 79.1)


def qwen3(name: str) -> Qwen3Config:
    width, mlp, layers, heads, tied, _ = QWEN3[name]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that hold config.json and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name in QWEN3:
        qwen3(name).save_pretrained(root / name)
    return root


def configured(folders: Path, student: str = "Qwen3-4B", teacher: str = "Qwen3-32B", *more: str) -> Config:
    models = ["--student_model", str(folders / student), "--teacher_model", str(folders / teacher)]
    return parse_arguments([*models, *more], "")


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `main`."""
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    try:
        command.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_adapters_and_keys_are_those_of_the_real_model(family: str) -> None:
    config = FAMILIES[family](**TINY)
    shape = memory.shape_of(config)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.head == model.get_output_embeddings().weight.numel()
    cache = DynamicCache()
    model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
    layers: list[Any] = cache.layers
    kept = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    assert kept == 2 * 5 * memory.kv_bytes(shape, 4)
    for targets in ("all-linear", "q_proj,v_proj"):
        names: str | list[str] = targets if targets == "all-linear" else targets.split(",")
        adapted = get_peft_model(
            AutoModelForCausalLM.from_config(config),
            LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM"),
        )
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        lora = LoraSection(use_lora=True, lora_r=8, lora_targets=targets)
        assert memory.trained_parameters(shape, lora) == trained
    assert memory.trained_parameters(shape, LoraSection(use_lora=False)) == shape.parameters


@pytest.mark.parametrize("name", QWEN3)
def test_published_sizes_come_out(name: str) -> None:
    assert memory.shape_of(qwen3(name)).parameters == QWEN3[name][-1]


def test_only_the_experts_that_a_token_visits_work() -> None:
    sizes = TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shape = memory.shape_of(Qwen3MoeConfig(**sizes))
    embedding = 0 if shape.parameters == shape.used else 96 * 128
    assert shape.parameters - shape.used == 4 * 6 * 3 * 128 * 32 + embedding  # layers, idle experts, matrices


def counted(lora: bool, checkpointing: bool, shape: dict[str, Any]) -> float:
    """Bytes a token at the peak of a real forward and backward under bf16 autocast."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        Qwen3Config(**shape), dtype=torch.bfloat16 if lora else torch.float32
    )
    model = (
        get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        if lora
        else base
    )
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(1, 96, (16, 64))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with CountedMemory() as count:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden.to(torch.bfloat16)
        hidden.backward(torch.ones_like(hidden))
    return count.peak / ids.numel()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "widths", [{}, {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}]
)
def test_activations_are_within_a_quarter_of_those_counted(
    lora: bool, checkpointing: bool, widths: dict[str, int]
) -> None:
    sizes = TINY | widths
    shape = memory.shape_of(Qwen3Config(**sizes))
    planned = sum(memory.training_bytes(shape, 2, checkpointing, lora))
    if not lora:  # bf16 copies of the weights are a part of their own in the plan
        planned += 2 * shape.parameters // (shape.layers if checkpointing else 1) // 1024
    assert planned == pytest.approx(counted(lora, checkpointing, sizes), rel=0.25)


def test_a_forward_without_gradients_is_within_15_percent_of_the_one_counted() -> None:
    config = Qwen3Config(**TINY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 96, (16, 64))
    with torch.no_grad(), CountedMemory() as count:
        model.get_decoder()(input_ids=ids, use_cache=False)
    planned = memory.forward_bytes(memory.shape_of(config), 2)
    assert planned == pytest.approx(count.peak / ids.numel(), rel=0.15)


@pytest.mark.parametrize("cell", ["packed", "uncompiled"])
def test_a_training_step_takes_what_performance_md_measured(folders: Path, cell: str) -> None:
    """bench/stage_two.py at the 4B shape: a forward of a quarter of its step, four in five tokens scored."""
    record = json.loads((Path(__file__).parents[3] / "bench/results/stage_two.json").read_text())[
        "NVIDIA H200"
    ][cell]
    tokens = str(round(record["tokens_per_step"] / 4))
    flags = ["--lora_r", "64", "--dtype", "bf16", "--micro_batch_tokens", tokens]
    config = configured(folders, "Qwen3-4B", "Qwen3-8B", *flags)
    plan = make_plan(config, Machine(speed.GPUS["h200"], 1, 139.8))
    parts = next(phase.parts for phase in plan.phases if phase.name == "train")
    above = planning.total(parts) - parts["student"] - parts["adapters"]
    assert above / GIB == pytest.approx(record["gib_above_weights"], rel=0.25)


def test_the_codec_takes_what_cache_md_measured(folders: Path) -> None:
    packed = make_plan(configured(folders), TWO_80GB).bytes_per_token - planning.PLAIN_COLUMN_BYTES
    assert packed == pytest.approx(152.4, rel=0.02)


@pytest.mark.parametrize(
    ("signal", "per_token"), [("hidden", 0.663 * 2 * 5120), ("full", 0.49 * 2 * 151_936)]
)
def test_dense_signals_take_their_share_of_the_raw_numbers(
    folders: Path, signal: str, per_token: float
) -> None:
    config = configured(folders, "Qwen3-4B", "Qwen3-32B", "--signal", signal, "--teacher_dtype", "bf16")
    assert make_plan(config, TWO_80GB).bytes_per_token == pytest.approx(
        per_token + planning.PLAIN_COLUMN_BYTES
    )


def test_the_rates_reproduce_performance_md() -> None:
    """Stage two at 4B, a plain 8B and 32B teacher, decoding at 4B: the figures that the shares come from."""
    h200 = speed.GPUS["h200"]
    shapes = {name: memory.shape_of(qwen3(f"Qwen3-{name}")) for name in ("4B", "8B", "32B")}
    for compiled, rate in ((True, 16_116), (False, 10_488)):
        seconds = speed.train_seconds(shapes["4B"], h200, True, True, compiled)
        assert 49_152 / 61_686.5 / seconds == pytest.approx(rate, rel=0.05)
    for name, rate in (("8B", 29_935), ("32B", 7_664)):
        assert 1 / speed.forward_seconds(shapes[name], h200) == pytest.approx(rate, rel=0.06)
    assert 256 / speed.decode_seconds(shapes["4B"], 2, h200, 256, 256) == pytest.approx(27_550, rel=0.05)


def test_no_step_is_planned_faster_than_its_launches() -> None:
    """A 4B student is far from that bound, few slots or many; four layers of next to no width are at it."""
    h200, tiny = speed.GPUS["h200"], memory.shape_of(Qwen3Config(**TINY))
    for slots in (1, 256):
        shape = memory.shape_of(qwen3("Qwen3-4B"))
        assert speed.decode_seconds(shape, 2, h200, slots, 256) > 3 * shape.layers * speed.LAYER_SECONDS
        assert speed.decode_seconds(tiny, 2, h200, slots, 256) == 4 * speed.LAYER_SECONDS
    measured = 12 * 0.08158e-3 / 36  # bench/results/stage_one.json
    assert measured == pytest.approx(speed.LAYER_SECONDS, rel=0.05)


def test_what_real_shapes_measured_is_within_15_percent(folders: Path) -> None:
    """docs/results.md: rollout 34.8, training with its refresh 35.8 GiB, by `generate` with a dynamic cache
    of 512 rows.

    That cache holds the padded prompt and what is written; the longest of the 512 prompts drawn there has 165
    tokens, not max_prompt_tokens (512), which the plan would reserve. It was freed before the teacher scored;
    the engine's slots stay.
    """
    config = configured(
        folders,
        "Qwen3-0.6B",
        "Qwen3-4B",
        "--max_new_tokens",
        "256",
        "--max_prompt_tokens",
        "165",
        "--gen_micro_batch",
        "512",
        "--rollouts_per_unit",
        "512",
        "--lp_micro_batch",
        "64",
        "--micro_batch_tokens",
        "32768",
        "--grad_accum",
        "4",
        "--group_size",
        "4",
        "--rollouts_per_refresh",
        "2048",
    )
    phases = {p.name: p for p in make_plan(config, Machine(speed.GPUS["h200"], 1, 139.8)).phases}
    rollout = phases["generate"].peak / GIB
    state = sum(phases["train"].parts[name] for name in ("optimizer", "gradients")) / GIB
    assert rollout == pytest.approx(34.8, rel=0.15)
    assert rollout + state == pytest.approx(35.8, rel=0.15)


def test_a_larger_run_never_takes_less(folders: Path) -> None:
    """Except in `evaluate`, whose plain teacher is skipped where it does not fit, and where models take
    turns.
    """

    def peaks(*more: str, gpus: int = 2) -> dict[str, float]:
        config = configured(folders, "Qwen3-4B", "Qwen3-32B", *LAUNCH, *more)
        phases = make_plan(config, Machine(speed.GPUS["h100"], gpus, 79.1)).phases
        return {phase.name: phase.peak for phase in phases if phase.name != "evaluate"}

    base, on_four = peaks(), peaks(gpus=4)
    assert all(on_four[name] <= base[name] for name in base)
    for key, value in {
        "max_new_tokens": "2048",
        "lp_micro_batch": "16",
        "lora_r": "256",
        "use_lora": "false",
        "gen_micro_batch": "64",
    }.items():
        more = peaks(f"--{key}", value)
        turns = {"score"} if key == "use_lora" else set()
        assert all(more[name] >= base[name] for name in base.keys() - turns), key
        assert sum(more.values()) > sum(base.values()), key


@pytest.mark.parametrize(("use_lora", "crowded"), [("true", False), ("false", True)])
def test_a_student_that_crowds_the_card_is_away_while_the_teacher_scores(
    folders: Path, use_lora: str, crowded: bool
) -> None:
    config = configured(folders, "Qwen3-4B", "Qwen3-32B", *LAUNCH, "--use_lora", use_lora)
    phases = {phase.name: phase.parts for phase in make_plan(config, TWO_80GB).phases}
    assert "student" in phases["generate"]
    assert "teacher shard" in phases["score"]
    assert ("student" in phases["score"]) is not crowded


def test_plan_and_run_count_the_same_weights_of_a_sharded_teacher(folders: Path) -> None:
    """Both decide by them whether the models take turns; the head is whole on every card."""
    config = configured(folders, "Qwen3-4B", "Qwen3-32B", *LAUNCH)
    score = next(phase.parts for phase in make_plan(config, TWO_80GB).phases if phase.name == "score")
    assert score["teacher head"] == 151_936 * 5120 * 2
    assert score["teacher shard"] == QWEN3["Qwen3-32B"][-1] * 2 / 2
    assert score["teacher shard"] + score["teacher head"] == resident_bytes(config, 2)


def test_a_teacher_that_one_process_loads_is_whole(folders: Path) -> None:
    """On two cards four layers are gathered at a time; one card has no shard and gathers nothing."""
    config = configured(folders, "Qwen3-4B", "Qwen3-32B", *LAUNCH)
    attention, mlp = 2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128, 3 * 5120 * 25_600
    layer = attention + mlp + 2 * 5120 + 2 * 128
    two = next(phase.parts for phase in make_plan(config, TWO_80GB).phases if phase.name == "score")
    assert two["gathered weights"] == 4 * layer * 2
    one = next(
        phase.parts
        for phase in make_plan(config, Machine(speed.GPUS["h100"], 1, 79.1)).phases
        if phase.name == "score"
    )
    assert one["teacher"] == resident_bytes(config, 1) == QWEN3["Qwen3-32B"][-1] * 2
    assert "gathered weights" not in one


def test_hours_and_cache_grow_with_the_run(folders: Path) -> None:
    short = make_plan(configured(folders), TWO_80GB, 128, 128)
    long = make_plan(configured(folders), TWO_80GB, 256, 128)
    assert all(long.hours[name] > short.hours[name] for name in short.hours)
    assert long.cache_bytes == pytest.approx(2 * short.cache_bytes)
    assert short.rollouts == 8 * 8192


def test_rows_of_a_group_read_their_prompt_once(folders: Path) -> None:
    def plan(*flags: str) -> planning.Plan:
        return make_plan(configured(folders, "Qwen3-4B", "Qwen3-32B", *flags), TWO_80GB, 512, 1024)

    prompts = ("--max_prompt_tokens", "1024", "--max_new_tokens", "512")
    alone, four = plan(*prompts, "--group_size", "1"), plan(*prompts, "--group_size", "4")
    for phase in ("score", "train"):
        assert four.rates[phase] == pytest.approx(2 * alone.rates[phase])
    assert four.rates["generate"] == pytest.approx(alone.rates["generate"], rel=0.1)
    padded = plan(*prompts, "--group_size", "4", "--packing", "off")
    assert padded.rates["score"] == pytest.approx(alone.rates["score"])


@pytest.mark.parametrize(
    ("role", "others"), [("generate", {"teacher shard", "scoring"}), ("score", {"student", "logits"})]
)
def test_a_role_is_planned_on_cards_of_its_own(folders: Path, role: str, others: set[str]) -> None:
    """6 cards that a step's 256 rows could not be cut into: nobody trains there."""
    plan = make_plan(
        configured(folders, "Qwen3-4B", "Qwen3-32B", "--role", role), Machine(speed.GPUS["h100"], 6, 79.1)
    )
    (phase,) = plan.phases
    assert (phase.name, *plan.rates, *plan.hours) == (role, role, role)
    assert not others & phase.parts.keys()
    whole = make_plan(configured(folders), TWO_80GB)
    assert others < {part for phase in whole.phases for part in phase.parts}
    assert phase.peak < next(other.peak for other in whole.phases if other.name == role)


def test_the_readme_launch_line_has_a_verdict(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--student_model", str(folders / "Qwen3-4B"), "--teacher_model", str(folders / "Qwen3-32B")]
    machine = ["--gpus", "2", "--gpu_memory", "80"]
    assert run_command(monkeypatch, *models, *LAUNCH, *machine) == 0
    said = capsys.readouterr().out
    assert "It fits: 2 ×" in said
    assert "A plan, not a measurement." in said
    assert [line.split()[0] for line in said.splitlines()[4:9]] == [
        "evaluate",
        "generate",
        "score",
        "train",
        "refresh",
    ]
    assert run_command(monkeypatch, *models, *LAUNCH, *machine, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["student_parameters"] == QWEN3["Qwen3-4B"][-1]
    for phase in found["phases"].values():
        assert phase["peak"] == pytest.approx(sum(v for k, v in phase.items() if k != "peak"), abs=10)


def test_extreme_machines_have_a_readable_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiny models are bounded by launches, at rates of seven digits; a card may be smaller than what it must
    keep free.
    """
    demo = [
        "--config",
        str(ROOT / "pipeline.yaml"),
        "--student_model",
        str(ROOT / "examples/arithmetic/student"),
        "--teacher_model",
        str(ROOT / "examples/arithmetic/teacher"),
    ]
    assert run_command(monkeypatch, *demo, "--gpu", "h200") == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("generate")]
    _, gib, rate, *_ = line.split()
    assert float(gib) < 1
    assert int(rate.replace(",", "")) == round(256 / (4 * speed.LAYER_SECONDS))  # 256 slots, 4 layers
    assert run_command(monkeypatch, *demo, "--gpu_memory", "0.5") == 1
    assert "0.0 GiB usable each" in capsys.readouterr().out


def test_what_does_not_fit_leaves_with_1_and_says_what_to_lower(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--student_model", str(folders / "Qwen3-8B"), "--teacher_model", str(folders / "Qwen3-32B")]
    assert run_command(monkeypatch, *models, "--use_lora", "false", "--gpus", "2", "--gpu", "h100") == 1
    said = capsys.readouterr().out
    assert "does NOT fit" in said
    assert "use_lora or lora_r, or shard them with ZeRO-2" in said


@pytest.mark.parametrize("recipe", ["qwen3-1.7b", "qwen3-4b", "qwen3-8b"])
def test_every_recipe_fits_the_cards_it_names(folders: Path, recipe: str) -> None:
    name = recipe.replace("q", "Q", 1).replace("b", "B")
    models = ["--student_model", str(folders / name), "--teacher_model", str(folders / "Qwen3-32B")]
    config = parse_arguments(["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *models], "")
    assert make_plan(config, TWO_80GB).fits


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpuz", "2", "--gpu", "h100"], "unknown key gpuz"),
        (["--gpu", "h1000"], "gpu h1000 is not known here; choose one of"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus: expected a whole number above 0, got 0"),
        (["--gpu", "h100", "--gpus", "two"], "--gpus: expected a whole number, got two"),
        (
            ["--gpu", "h100", "--student_model", "nowhere/student"],
            "nothing here has that path, and a hub name needs a network",
        ),
        (["--gpu", "h100", "--teacher_model", ""], "teacher_model is missing"),
        (["--gpu", "h100", "--lora_targets", "nothing"], "no linear layer named nothing"),
        (["--gpu", "h100", "--gpus", "3"], "batch_size 256 cannot be cut into 3 process"),
        (["--gpu", "h100", "--mean_completion_tokens", "513"], "more than max_new_tokens 512"),
        (["--gpu", "h100", "--mean_prompt_tokens", "1025"], "more than max_prompt_tokens 1024"),
    ],
)
def test_wrong_input_is_one_sentence(
    folders: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    models = ["--student_model", str(folders / "Qwen3-4B"), "--teacher_model", str(folders / "Qwen3-32B")]
    with pytest.raises(UserError, match=sentence) as refused:
        run_command(monkeypatch, *models, *arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_several_gpus_of_unknown_size_are_one_sentence(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["--student_model", str(folders / "Qwen3-4B"), "--teacher_model", "x"]
    with pytest.raises(UserError, match="no GPU here to plan for"):
        run_command(monkeypatch, *models, "--gpus", "2")


def test_on_a_cpu_it_plans_the_cpu_and_says_what_it_assumed(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["--config", str(ROOT / "pipeline.yaml"), "--device", "cpu"]
    monkeypatch.chdir(ROOT)
    assert run_command(monkeypatch, *demo) == 0
    said = capsys.readouterr().out
    assert "It fits: this machine's CPU" in said
    (line,) = [line for line in said.splitlines() if line.startswith("assumed")]
    assert "GFLOP/s, as just measured" in line
    models = ["--student_model", str(folders / "Qwen3-8B"), "--teacher_model", str(folders / "Qwen3-32B")]
    monkeypatch.setattr(host_memory, "total_bytes", lambda: 16 * GIB)
    assert run_command(monkeypatch, *models, "--device", "cpu") == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_the_printed_parts_of_the_time_add_up_to_the_total() -> None:
    for hours in ({"a": 0.0101, "b": 0.0301, "c": 0.00001}, {"a": 0.51, "b": 0.261}, {"a": 1.26, "b": 2.26}):
        text = cpu_plan._durations(hours)
        total, parts = re.findall(r"^about ([\d.]+) (?:min|h),.*: (.*)$", text)[0]
        assert float(total) == pytest.approx(sum(float(part.split()[1]) for part in parts.split(", ")))
    assert cpu_plan._durations({"a": 0.1, "b": 0.0}).endswith(": a 6.0")


def test_a_cpu_takes_longer_for_more_work_and_at_a_lower_rate(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"student_model": folders / "Qwen3-4B", "teacher_model": folders / "Qwen3-8B"}

    def hours(rate: float, **values: Any) -> dict[str, float]:
        monkeypatch.setattr(cpu_plan, "matmul_rate", lambda: rate)
        config = parse_arguments(flags(**models, **values), "")
        return cpu_plan.make_cpu_plan(config).hours

    usual = hours(1e11)
    times = dict.fromkeys(usual, 2) | {"load": 1}
    assert hours(5e10) == pytest.approx({name: times[name] * value for name, value in usual.items()})
    longer = hours(1e11, max_steps=512)
    assert longer["train"] == pytest.approx(2 * usual["train"])
    assert longer["evaluate"] == usual["evaluate"]
    assert hours(1e11, eval_prompts=0)["evaluate"] == 0


class CannedPeak:
    """Gives the next of some peaks, and notes how often a phase began."""

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.num_resets = list(peaks), 0

    def reset(self) -> None:
        self.num_resets += 1

    def read(self) -> int:
        return self.peaks.pop(0)


def test_plan_check_runs_each_phase_and_compares_it(tmp_path: Path) -> None:
    """The bench's own work at a tiny size on the CPU; only the meter, which needs a GPU, is canned."""
    options = plan_check.Options(folder=tmp_path, device="cpu", tiny=True)
    planned = plan_check.planned_peaks(options, 80)
    factors = {"generate": 1.1, "score": 1.0, "train": 1.25}
    peak = CannedPeak(*(round(planned[phase] / factor) for phase, factor in factors.items()))
    compared = plan_check.compare(options, 80, peak)
    first = next(compared)
    assert (first.phase, peak.num_resets) == ("generate", 1)  # known before the next phase begins
    rows = [first, *compared]
    assert [(row.phase, round(row.ratio, 2), row.is_within) for row in rows] == [
        ("generate", 1.1, True),
        ("score", 1.0, True),
        ("train", 1.25, False),
    ]
    assert [str(row).endswith("beyond 15 %") for row in rows] == [False, False, True]
    assert peak.num_resets == 4  # both steps begin anew, the second counts
