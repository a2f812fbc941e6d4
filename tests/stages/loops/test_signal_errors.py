"""stages.fidelity: what smaller signals would change, measured on caches that hold everything."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dualkl.compress import compress, compress_logits
from stages.runtime.options import split_root
from tests.support.helpers import flags, small
from tests.support.thinning import leading


@pytest.mark.parametrize("signal", leading(1, ["hidden", "full"]))
def test_errors_fall_with_the_bytes_and_vanish_with_all_ids(forked, tmp_path: Path, signal: str) -> None:
    arguments = [*small(tmp_path, rollouts_per_refresh=16), *flags(signal=signal)]
    forked.stage("stages.rollout", *arguments).expect_success()
    config = (tmp_path / "demo/config.yaml").read_text()
    command = [str(tmp_path / "demo/cache"), *small(tmp_path, rollouts_per_refresh=16)]
    finished = forked.stage("stages.fidelity", *command).expect_success()
    assert (tmp_path / "demo/config.yaml").read_text() == config  # a look changes nothing of the run
    found = json.loads((tmp_path / "demo/fidelity.json").read_text())
    whole = [row for row in found["signals"] if row["p"] == 1]
    for name in ("reverse_kl_error", "gate_error", "gradient_error"):
        errors = [row[name] for row in whole]
        assert errors == sorted(errors, reverse=True)
    sizes = [row["bytes_per_token"] for row in whole]
    assert sizes == sorted(sizes)
    assert whole[-1]["k"] == found["vocab_size"] == 230
    assert whole[-1]["gradient_error"] < 5e-3 < whole[0]["gradient_error"]
    assert whole[-1]["reverse_kl_error"] < 5e-3 * found["exact"]["rkl"]
    assert all(row["signal"] in finished.out + finished.err for row in found["signals"])
    assert (tmp_path / "demo/fidelity.png").stat().st_size > 5_000


def test_a_cache_without_the_whole_distribution_is_one_sentence(forked, tmp_path: Path) -> None:
    arguments = small(tmp_path, rollouts_per_refresh=8)
    forked.stage("stages.rollout", *arguments).expect_success()
    forked.stage("stages.fidelity", *arguments, str(tmp_path / "demo/cache")).expect_sentence(
        "holds topk rows", "--signal hidden"
    )


def test_the_cache_is_the_first_argument_or_the_last() -> None:
    assert split_root(["a/cache", "--tau", "1"]) == ("a/cache", ["--tau", "1"])
    assert split_root(["--tau", "1", "a/cache"]) == ("a/cache", ["--tau", "1"])
    assert split_root(["--tau", "1"]) == ("", ["--tau", "1"])
    assert split_root([]) == ("", [])


def test_logits_are_compressed_as_the_head_would_make_them() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 8, generator=random), torch.randn(40, 8, generator=random) * 2
    targets = torch.arange(6)
    logits = hidden @ head.T
    before = logits.clone()
    for p in (1.0, 0.8):
        expected, found = (
            compress(hidden, head, targets, k=5, p=p),
            compress_logits(logits, targets, k=5, p=p),
        )
        for name in ("ids", "logprobs", "log_tail_mass", "entropy", "sampled_logprobs"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="k is 0"):
        compress_logits(logits, targets, k=0)
