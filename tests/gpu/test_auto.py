"""`auto` sizes on a GPU: measured, within the memory given, and most of it used."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.modeling_utils import PreTrainedModel

from stages.engine.opening import open_engine
from stages.loops import budgets, collect, setup, steps
from stages.loops.scoring import Scoring, _states_and_kept
from stages.models import student as students
from stages.models import teacher as teachers
from stages.models.memory import GIB
from stages.models.student import Student
from stages.runtime import gpu_memory
from stages.runtime.run import Run
from tests.support.helpers import make_run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
V = 8_000
LONGEST = 768 + 256


def random_model(width: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    teachers.restore_buffers(model)
    return model.eval()


def make(folder: Path, **values: str) -> Run:
    return make_run(
        folder,
        device="cuda",
        dtype="bf16",
        teacher_dtype="bf16",
        teacher_ds_zero3="false",
        gen_micro_batch="auto",
        max_prompt_tokens=768,
        max_new_tokens=256,
        rollouts_per_unit=512,
        lora_r=16,
        **({"lora_dropout": "0.1"} | values),
    )


def student_of(run: Run, tokenizer: PreTrainedTokenizerFast) -> Student:
    base = random_model(512, 12)
    student = students.assemble(run.config, base, tokenizer, "random", V, (V - 1,), run.world.device)
    student.model.to(run.world.device)
    return student


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Tells the run how many bytes are free."""
    monkeypatch.setattr(budgets, "_peaks", {})
    return lambda free: monkeypatch.setattr(budgets, "free_bytes", lambda world: free)


def share_of(free: float, run: Run, work: Callable[[], object]) -> float:
    share = gpu_memory.peak_bytes(run.world.device, work) / free
    print(f"{share:.2f} of {free / GIB:.1f} GiB")
    return share


def test_slots_fill_the_memory_given_and_no_more(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, given: Callable[[float], None]
) -> None:
    run, free = make(tmp_path, compile="false"), 4.0 * GIB
    student = student_of(run, tokenizer)
    policy = setup.student_policy(run, student, open_engine(student.model), 0)
    allocated = torch.cuda.memory_allocated()
    given(free)
    slots = collect.slots_for(run, policy, scores_too=False)
    assert torch.cuda.memory_allocated() <= allocated + 2**27  # workspaces of the matrix library
    assert 8 <= slots < 512
    assert 0.6 <= share_of(free, run, partial(budgets._generate, policy, LONGEST, slots)) <= 1
    policy.engine.close()
    assert 8 <= collect.slots_for(run, policy, scores_too=True) < slots
    given(1.0)
    assert collect.slots_for(run, policy, scores_too=True) == 1


def test_scoring_forwards_fill_the_memory_given_and_no_more(
    tmp_path: Path, given: Callable[[float], None]
) -> None:
    run, free = make(tmp_path), 1.0 * GIB
    model = random_model(1024, 8).requires_grad_(False)
    teacher = teachers.plain_teacher(model, run.world, run.config.train.packing)
    score = partial(_states_and_kept, Scoring(run.config.teacher_signal, V, 0), teacher)
    given(free)
    tokens = budgets.score_tokens_of_run(run, teacher, V, score)
    assert 2048 < tokens < 32_768
    batch = partial(budgets._dummy_batch, tokens, LONGEST, V, run.world.device, packed=teacher.packs)
    assert 0.6 <= share_of(free, run, lambda: score(batch())) <= 1
    teacher.close()


@pytest.mark.parametrize(
    ("checkpointing", "dropout", "is_compiled", "gib"),
    [("true", "0.0", True, 1), ("true", "0.1", False, 1), ("false", "0.1", True, 4)],
)
def test_training_forwards_fill_the_memory_given_and_no_more(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    given: Callable[[float], None],
    checkpointing: str,
    dropout: str,
    is_compiled: bool,
    gib: float,
) -> None:
    run, free = make(tmp_path, gradient_checkpointing=checkpointing, lora_dropout=dropout), gib * GIB
    student = student_of(run, tokenizer)
    random, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    given(free)
    assert student.is_compiled is is_compiled
    training = steps.prepare(run, student)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert all(p.grad is None for p in student.trainable.values())
    assert torch.cuda.memory_allocated() <= allocated + 2**27
    rows, tokens = training.caps
    assert rows is None
    assert tokens is not None
    assert 2048 < tokens < 32_768
    batch = partial(budgets._dummy_batch, tokens, LONGEST, V, run.world.device, packed=student.packs)
    step = partial(budgets._train, run.config, student, training.module)
    assert 0.6 <= share_of(free, run, lambda: step(batch(), None)) <= 1
    given(1.0)
    assert steps.prepare(run, student).caps.tokens == budgets.LEAST_TOKENS


def test_out_of_memory_in_a_trial_ends_in_a_smaller_size(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, given: Callable[[float], None]
) -> None:
    """More seems free than is there: the trial that fails is not used, and its memory is given back."""
    run = make(tmp_path, compile="false")
    student, device = student_of(run, tokenizer), run.world.device
    torch.cuda.empty_cache()
    there = gpu_memory.free_bytes(device)
    assert there is not None
    held = torch.empty(int(there - 1.25 * GIB), dtype=torch.uint8, device=device)
    given(1000.0 * GIB)
    tokens = steps.prepare(run, student).caps.tokens
    assert tokens is not None
    assert 2048 <= tokens < 32_768
    del held
    after = gpu_memory.free_bytes(device)
    assert after is not None
    assert after >= there - 2**27
    assert all(p.grad is None for p in student.trainable.values())
