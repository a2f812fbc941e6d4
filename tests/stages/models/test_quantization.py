"""Quantised teachers: weights near the plain ones, independent rows, and what is refused."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import FP8Linear

from stages.loops import setup
from stages.models import quantization
from stages.models.teacher import load_plain_model, plain_teacher, resident_bytes
from stages.runtime.config import parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import make_config, make_run, refused
from tests.support.tiny_runs import TINY

CPU = torch.device("cpu")
NEAR = {"bnb-4bit": 0.11, "bnb-8bit": 0.01}
"""Relative error of a quantised weight."""
needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here")


@needs_bnb
@pytest.mark.parametrize("kind", sorted(NEAR))
def test_layers_multiply_by_weights_near_the_plain_ones(
    tmp_path: Path, kind: str, teacher_model: Any
) -> None:
    run = make_run(tmp_path, **(TINY | {"teacher_quantization": kind}))
    model = load_plain_model(run.config, run.world)
    x = torch.randn(5, 224, generator=torch.Generator().manual_seed(0))
    for found, plain in zip(model.model.layers, teacher_model.model.layers, strict=True):
        wanted = plain.mlp.up_proj(x)
        assert (found.mlp.up_proj(x) - wanted).norm() < NEAR[kind] * wanted.norm()
        assert torch.equal(found.mlp.up_proj(x[:2]), found.mlp.up_proj(x)[:2]) or torch.allclose(
            found.mlp.up_proj(x[:2]), found.mlp.up_proj(x)[:2], rtol=1e-5, atol=1e-6
        )
    assert model.lm_head.weight.dtype == torch.float32
    teacher = plain_teacher(model, run.world, "auto")  # its checks at loading
    assert teacher.packs
    teacher.close()


@needs_bnb
def test_the_doctor_measures_the_error(tmp_path: Path, forked: Any) -> None:
    flags = ["--teacher_ds_zero3", "false", "--teacher_quantization", "bnb-8bit"]
    done = forked.stage("stages.doctor", "pipeline.yaml", *flags).expect_success()
    assert "pass  quantised = plain: bnb-8bit against fp32: KL" in done.out


@pytest.mark.parametrize("block", [None, (128, 128), (16, 32)])
def test_fp8_weights_are_blocks_times_their_scales(block: tuple[int, int] | None) -> None:
    layer = FP8Linear(70, 40, block_size=block)
    values = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    layer.weight.data = values.to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) + 0.5
    rows, columns = block or (40, 70)
    wanted = layer.weight.float().clone()
    for i in range(40):
        for j in range(70):
            scale = layer.weight_scale_inv
            wanted[i, j] *= scale[i // rows, j // columns] if block else scale
    torch.testing.assert_close(quantization._fp8_weight(layer), wanted)


def test_quantised_teachers_have_a_fingerprint_and_a_size_of_their_own(tmp_path: Path) -> None:
    plain, four = (
        make_config(tmp_path, **(TINY | {"teacher_quantization": kind})) for kind in ("none", "bnb-4bit")
    )
    vocabulary = setup.shared_vocabulary(plain)
    before, after = (
        setup.fingerprint(config, vocabulary, config.teacher_signal).must_match for config in (plain, four)
    )
    assert "teacher_quantization" not in before
    assert after == before | {"teacher_quantization": "bnb-4bit"}
    assert resident_bytes(four, 1) < 0.5 * resident_bytes(plain, 1)


def test_fp8_without_a_gpu_and_bitsandbytes_that_is_missing_are_sentences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9.*this is cpu"):
        quantization.check_available("fp8", CPU)
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"bnb-4bit needs bitsandbytes.*pip install bitsandbytes"):
        quantization.check_available("bnb-4bit", CPU)
    quantization.check_available("none", CPU)


def test_a_quantised_teacher_is_not_sharded(tmp_path: Path, forked: Any) -> None:
    with pytest.raises(UserError, match=r"keeps the whole teacher on each GPU; set teacher_ds_zero3: false"):
        parse_arguments(["--config", "pipeline.yaml", "--teacher_quantization", "bnb-4bit"], "")
    values = {"teacher_ds_zero3": "false", "teacher_quantization": "fp8"}
    refused(forked, "rollout", tmp_path, "teacher_quantization fp8 needs a GPU", **values)
