"""What is free on a GPU and what a piece of work takes, as torch's allocator tells it."""

import math
from typing import Any

import pytest
import torch

from stages.runtime import gpu_memory

CARD = torch.device("cuda", 1)


class FakeCuda:
    """The allocator of one card: bytes in tensors, their peak, and the reserve of two pools."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        self.reserve = {(0, 0): 0, (0, 7): 0}
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.segments)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(gpu_memory, "_highest", {})

    def segments(self) -> list[dict[str, Any]]:
        """One segment of each pool; another card's counts for nothing."""
        own = [
            {"device": 1, "segment_pool_id": pool, "total_size": size + 30, "active_size": 30}
            for pool, size in self.reserve.items()
        ]
        return [*own, {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "active_size": 0}]

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_reserve_is_free_but_for_that_of_captured_steps_and_other_cards(cuda: FakeCuda) -> None:
    cuda.reserve = {(0, 0): 70, (0, 7): 100}
    assert gpu_memory.free_bytes(CARD) == 1070
    assert gpu_memory.free_bytes(torch.device("cpu")) is None


def test_a_peak_is_above_what_was_there_and_counts_new_private_pools(cuda: FakeCuda) -> None:
    cuda.take(500)
    cuda.reserve[0, 7] = 40

    def work() -> None:
        cuda.take(300)
        cuda.take(-250)
        cuda.reserve[0, 7] += 20

    assert gpu_memory.peak_bytes(CARD, work) == 320


def test_a_measurement_leaves_the_record_of_the_highest_use_alone(cuda: FakeCuda) -> None:
    assert gpu_memory.highest_bytes(torch.device("cpu")) == 0
    cuda.take(900)
    cuda.take(-800)
    gpu_memory.peak_bytes(CARD, lambda: (cuda.take(5000), cuda.take(-5000)))
    assert gpu_memory.highest_bytes(CARD) == 900
    cuda.take(1000)
    assert gpu_memory.highest_bytes(CARD) == 1100


def test_work_that_runs_out_of_memory_takes_more_than_there_is(cuda: FakeCuda) -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert gpu_memory.peak_bytes(CARD, work) == math.inf
    with pytest.raises(torch.OutOfMemoryError):  # the others are in the middle of a collective
        gpu_memory.peak_bytes(CARD, work, collective=True)


@pytest.mark.gpu
def test_free_memory_follows_tensors_and_a_peak_is_what_they_take() -> None:
    device = torch.device("cuda")
    before = gpu_memory.free_bytes(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    during = gpu_memory.free_bytes(device)
    del held
    after = gpu_memory.free_bytes(device)
    assert before is not None
    assert during == pytest.approx(before - 2**28, abs=2**25)
    assert after == pytest.approx(before, abs=2**25)

    def work() -> None:
        two = [torch.empty(2**26, dtype=torch.uint8, device=device) for _ in range(2)]
        del two[0]

    assert gpu_memory.peak_bytes(device, work) == pytest.approx(2**27, abs=2**22)
    too_much = torch.cuda.get_device_properties(device).total_memory
    assert gpu_memory.peak_bytes(device, lambda: torch.empty(too_much, device=device)) == math.inf
