"""The engine's kernels without a GPU: their logic under Triton's interpreter, and that they compile for sm_80
and sm_90.

`tests/gpu/test_engine.py` runs them on a GPU.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.interpreter import SHARES, pass_interpreted
from tests.support.thinning import thinned

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")
INTEGERS = (
    "window",
    "num_ids",
    "num_blocks",
    "query_row",
    "query_head",
    "keys_row",
    "keys_head",
    "keys_place",
    "values_row",
    "values_head",
    "values_place",
    "key_row",
    "key_head",
    "value_row",
    "value_head",
    "logits_row",
    "size",
    "cos_row",
    "sin_row",
    "num_rows",
    "inner",
    "outer_stride",
    "inner_stride",
    "query_place",
    "key_place",
    "cos_place",
    "sin_place",
    "num_places",
    "gate_row",
    "up_row",
)
POINTERS = {
    "attended_ptr": "*i32",
    "places_ptr": "*i64",
    "partial_ptr": "*fp32",
    "log_mass_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "peak_ptr": "*fp64",
    "mass_ptr": "*fp64",
    "moment_ptr": "*fp64",
}


@pytest.mark.parametrize("share", SHARES)
def test_the_kernels_give_pytorchs_numbers_under_the_interpreter(share: str) -> None:
    pass_interpreted("interpreted_engine.py", share)


def compiled(
    kernel: Any,
    dtype: str,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    fusion: bool = True,
    **constants: Any,
) -> Any:
    """A kernel compiled for a GPU that is not here; pointers and strides are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        pointer = POINTERS.get(name, f"*{dtype}") if name.endswith("_ptr") else None
        number = "i32" if name in INTEGERS else "fp32"
        signature[name] = "constexpr" if name in constants else pointer or number
        if name not in constants and (pointer or (name in INTEGERS and name != "window")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("dtype", "width", "block", "capability"),
    thinned(3, [("bf16", 128, 64), ("bf16", 256, 32), ("bf16", 64, 128), ("fp32", 128, 32)], [80, 90]),
)
def test_attention_compiles_within_the_shared_memory_of_an_sm_86(
    dtype: str, width: int, block: int, capability: int
) -> None:
    """ptxas comes with Triton; without it this fails."""
    from stages.engine.kernels import combine_kernel, decode_kernel

    for splits, capped, windowed in ((1, False, False), (4, True, True)):
        kernel = compiled(
            decode_kernel,
            dtype,
            capability,
            GROUP=4,
            LANES=16,
            WIDTH=width,
            WIDTH_PADDED=width,
            VALUE_WIDTH=width,
            VALUE_PADDED=width,
            BLOCK=block,
            SPLITS=splits,
            CAPPED=capped,
            WINDOWED=windowed,
            PRECISION="ieee",
        )
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 99 * 1024
        assert " bytes spill" not in kernel.asm["ptx"]
    combine = compiled(
        combine_kernel, dtype, capability, WIDTH=width, WIDTH_PADDED=width, SPLITS=4, SPLITS_PADDED=4
    )
    assert combine.asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_small_kernels_compile(capability: int) -> None:
    """Norms and rotary embeddings of a step, where Triton makes the number 1 a constant, and of a prefill."""
    from stages.engine.kernels import (
        blocks_kernel,
        gated_kernel,
        norm_kernel,
        rotary_kernel,
        store_kernel,
    )

    store = compiled(store_kernel, "bf16", capability, num_warps=1, WIDTH=128, VALUE_WIDTH=128, PADDED=128)
    blocks = compiled(blocks_kernel, "fp32", capability, SIZE=1024, PADDED=1024)
    gated = compiled(gated_kernel, "bf16", capability, num_warps=4, BLOCK=2048)
    found = [store, blocks, gated]
    for one in ({"inner": 1}, {}):
        found.append(
            compiled(
                norm_kernel, "bf16", capability, num_warps=8, ROWS=1, PADDED=4096, ONE_CENTRED=False, **one
            )
        )
        found.append(
            compiled(
                norm_kernel, "bf16", capability, num_warps=4, ROWS=8, PADDED=128, ONE_CENTRED=True, **one
            )
        )
    for one in ({"num_places": 1}, {}):
        sizes = {"HEADS": 32, "KV_HEADS": 8, "TILE": 8, "QUERY_TILES": 4, "HALF": 64, "PADDED": 64}
        rotary = compiled(rotary_kernel, "bf16", capability, num_warps=4, fusion=False, **sizes, **one)
        # Each product is rounded; an sm_80 multiplies bfloat16 by an fma whose third number is 0.
        assert capability < 90 or "fma" not in rotary.asm["ptx"]
        found.append(rotary)
    for kernel in found:
        assert kernel.asm["cubin"]
        assert " bytes spill" not in kernel.asm["ptx"]


@pytest.mark.thorough
def test_a_cpu_engine_does_not_import_triton() -> None:
    code = "import sys, stages.engine.opening; print('stages.engine.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
