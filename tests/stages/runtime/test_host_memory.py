"""Free host memory: of the machine, or what the limits of control groups leave, in both versions."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.runtime import host_memory

MACHINE, WHOLE = 100_000, 200_000


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of `WHOLE` bytes, `MACHINE` of them available, with its control groups in `tmp_path`."""
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    memory = SimpleNamespace(available=MACHINE, total=WHOLE)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: memory)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_without_control_groups_the_machine_counts() -> None:
    assert host_memory.free_bytes() == MACHINE
    assert host_memory.total_bytes() == WHOLE


def test_a_container_is_bound_by_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    stat = "anon 3000\ninactive_file 400\nactive_file 100"
    write(tmp_path / "groups", max=9000, current=4000, stat=stat)
    assert host_memory.free_bytes() == 5500
    assert host_memory.total_bytes() == 9000
    (tmp_path / "own").write_text("0::/\n")
    assert host_memory.free_bytes() == 5500
    write(tmp_path / "groups", max="max")
    assert host_memory.free_bytes() == MACHINE


@pytest.mark.parametrize("where", ["job", "job/step", "job/step/task"])
@pytest.mark.parametrize("limit", ["max", "high"])
def test_limits_of_outer_groups_hold(tmp_path: Path, where: str, limit: str) -> None:
    (tmp_path / "own").write_text("0::/job/step/task\n")
    for folder in ("job", "job/step", "job/step/task"):
        write(tmp_path / "groups" / folder, max="max", high="max", current=1000, stat="inactive_file 10")
    write(tmp_path / "groups" / where, **{limit: 5000})
    assert host_memory.free_bytes() == 4010


@pytest.mark.parametrize("path", ["/docker/1f", "/slurm/job"])
def test_version_1(tmp_path: Path, path: str) -> None:
    """A container sees its own group as the root, under whatever name the machine knows it."""
    (tmp_path / "own").write_text(f"5:cpu,cpuacct:/x\n4:hugetlb,memory:{path}\n0::/\n")
    unlimited = {"limit_in_bytes": 9223372036854771712, "usage_in_bytes": 7000, "stat": ""}
    limited = {
        "limit_in_bytes": 9000,
        "usage_in_bytes": 4000,
        "stat": "inactive_file 1\ntotal_active_file 50",
    }
    root = tmp_path / "groups" / "memory"
    write(root, **(limited if path.startswith("/docker") else unlimited))
    if path.startswith("/slurm"):
        write(root / "slurm", **unlimited)
        write(root / "slurm/job", **limited)
    assert host_memory.free_bytes() == 5050


def test_more_in_use_than_a_lowered_limit_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "groups", max=1000, current=4000, stat="")
    assert host_memory.free_bytes() == 0
