"""`bench/stage_one.py`, part selection (`stage_one_scoring.py`), at a tiny shape on the CPU."""

from bench import stage_one_scoring
from bench.cells import Bench


def test_every_cell_has_its_times_and_ratios() -> None:
    bench = Bench("cpu", 0.01, {})
    for cell in stage_one_scoring.cells(tiny=True):
        record = cell.measure(bench)
        assert all(value > 0 for value in record.values())
        assert record["selection_over_topk"] == record["selection_ms"] / record["topk_ms"]
        assert record["compress_over_product"] == record["compress_ms"] / record["product_ms"]
