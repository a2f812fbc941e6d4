"""The CUDA kernels without a GPU: their logic under Triton's interpreter, and that they compile for an A100
or A800.

`tests/gpu/test_loss.py` runs them on a GPU.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualkl import DualKLConfig, kernels
from dualkl.kernels import usable
from dualkl.targets import LogitsTeacher, TopKTeacher
from tests.dualkl.test_losses import GATED
from tests.support.interpreter import SHARES, pass_interpreted

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
POINTERS = {
    **dict.fromkeys(("student_ptr", "teacher_ptr", "weights_ptr", "out_ptr"), "*fp32"),
    **dict.fromkeys(("student_bias_ptr", "teacher_bias_ptr", "logprobs_ptr", "log_tail_ptr"), "*fp32"),
    **dict.fromkeys(("teacher_logprobs_ptr", "behaviour_logprobs_ptr", "tau_ptr"), "*fp32"),
    **{"gradient_ptr": "*bf16", "ids_ptr": "*i32", "sampled_ptr": "*i64"},
    **dict.fromkeys(("logits_ptr", "bias_ptr", "maxima_ptr", "sums_ptr", "parts_ptr"), "*fp32"),
    **{"hits_ptr": "*i32", "packed_ptr": "*i64"},
}
SIZES = ("student_stride", "teacher_stride", "gradient_stride", "width", "num_ids", "teacher_width", "stride")
COUNTS = ("num_slots", "out_stride", "num_segments", "num_hits", "k")


@linux_only
@pytest.mark.parametrize(
    "name", ["interpreted_kernels.py", pytest.param("interpreted_selection.py", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("share", SHARES)
def test_the_kernels_give_the_oracles_numbers_under_the_interpreter(name: str, share: str) -> None:
    pass_interpreted(name, share)


def compiled(kernel: Any, num_warps: int, **constants: Any) -> Any:
    """A kernel compiled for sm_80, all pointers given, sizes multiples of 16 as at V = 151,936."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        integer = name in SIZES or name in COUNTS
        signature[name] = (
            "constexpr" if name in constants else POINTERS.get(name, "i32" if integer else "fp32")
        )
        if name in SIZES or name in POINTERS:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": num_warps, "enable_fp_fusion": True}
    )


@linux_only
@pytest.mark.parametrize("objective", ["gated", "everything"])
def test_the_kernels_compile_for_sm_80_within_its_shared_memory(objective: str) -> None:
    """ptxas comes with Triton; without it this fails."""
    from dualkl.kernels import fused
    from dualkl.kernels.dense import dense_kernel
    from dualkl.kernels.sparse import sparse_kernel

    everything = objective == "everything"
    shared: dict[str, Any] = {
        "STUDENT_CAPPED": everything,
        "MC": everything,
        "ARGMAX": everything,
        "GATING": 0,
        "GRADIENT": True,
    }
    if not everything:
        shared |= {"tau_ptr": None}
    dense = compiled(
        dense_kernel,
        fused.DENSE.num_warps,
        LANES=fused.DENSE.lanes,
        TEACHER_CAPPED=everything,
        **shared,
    )
    slots = kernels.MAX_SLOTS if everything else 64
    sparse = compiled(sparse_kernel, fused.SPARSE.num_warps, LANES=fused.SPARSE.lanes, SLOTS=slots, **shared)
    for kernel in (dense, sparse):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 163 * 1024


@linux_only
@pytest.mark.parametrize("k", [1, 64, 256, kernels.MAX_SELECTED])
def test_the_selection_compiles_for_sm_80_within_its_shared_memory(k: int) -> None:
    from dualkl.kernels import selection

    shape = {"LANES": selection.LANES, "STEPS": selection.STEPS, "CAPPED": False}
    warps = selection.warps_for(k * selection.STEPS * 4)
    for kernel in (
        compiled(selection.groups_kernel, 4, **shape),
        compiled(selection.choose_kernel, 16, SEGMENTS=16, **shape),
        compiled(selection.pick_kernel, warps, HITS=k, **shape),
    ):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 163 * 1024


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, dualkl, dualkl.losses, dualkl.kernels; print('dualkl.kernels.fused' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_cpu_and_a_machine_without_triton_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    teacher, config = LogitsTeacher(torch.empty(1, 5)), DualKLConfig()
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert usable(OnGpu, teacher, config)
    assert not usable(torch.empty(1, 3), teacher, config)
    ids = torch.empty(1, kernels.MAX_SLOTS + 1, dtype=torch.int32)
    assert not usable(OnGpu, TopKTeacher(ids, ids, ids), config)
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not usable(OnGpu, teacher, config)
    assert importlib.util.find_spec("dualkl.kernels.fused") is not None


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize(
    "other",
    [
        {"objective": "jsd", "gating": "fixed", "rkl": "exact", "fkl": "full"},
        {"teacher_smoothing": 0.1},
        {"gate_on": "fkl", "gating": "soft"},
        {"gate_on": "teacher_entropy", "gating": "hard"},
    ],
)
def test_the_kernels_serve_every_gated_method_and_nothing_else(
    method: dict[str, Any], other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    teacher = LogitsTeacher(torch.empty(1, 5))
    assert usable(OnGpu, teacher, DualKLConfig(**method))
    assert not usable(OnGpu, teacher, DualKLConfig(**(method | other)))


def test_the_selection_runs_in_kernels_on_cuda_up_to_so_many_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    class Exact(OnGpu):
        dtype = torch.float64

    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert kernels.selectable(OnGpu, kernels.MAX_SELECTED)
    assert not kernels.selectable(OnGpu, kernels.MAX_SELECTED + 1)
    assert not kernels.selectable(Exact, 5)
    assert not kernels.selectable(torch.empty(1, 3), 5)
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    assert not kernels.selectable(OnGpu, 5)


@linux_only
def test_default_groups_fill_whole_tiles_and_stay_within_their_memory() -> None:
    from dualkl.kernels.fused import groups_of

    hidden = torch.empty(8192, 0)
    for num_buffers, limit in ((1, 0.88), (2, 1.17)):
        groups, chunk = groups_of(hidden, None, 151_936, num_buffers, torch.bfloat16)
        sizes = [rows.stop - rows.start for rows in groups]
        assert sizes == [2048] * 4
        assert [rows.start for rows in groups[1:]] == [rows.stop for rows in groups[:-1]]
        assert all(size % 256 == 0 for size in [chunk, *sizes])
        assert 151_936 * (max(sizes) * 2 + chunk * num_buffers * 4) <= limit * 2**30

    def sizes_of(num_rows: int, chunk_rows: int | None) -> list[int]:
        found = groups_of(hidden[:num_rows], chunk_rows, 503, 1, torch.bfloat16)[0]
        return [rows.stop - rows.start for rows in found]

    assert sizes_of(5, None) == [5]
    assert sizes_of(5, 2) == [1, 2, 2]
    assert sizes_of(0, None) == []
