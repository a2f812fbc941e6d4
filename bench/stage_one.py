"""Stage one against the hardware's floors: how fast a student writes rollouts, and a teacher scores and
keeps them.

    python bench/stage_one.py --list                    the names of all cells
    python bench/stage_one.py --only 'decode/*'         some of them; none begins after 8 minutes
    python bench/stage_one.py --only 'decode/[wgs]*/256' 'vllm/*' --vllm /tmp/vllm_site    both on one card
    python bench/stage_one.py --table                   a Markdown table of bench/results/stage_one.json

Models have seeded random weights made on the device. Each part documents its cells: decode in
`stage_one_decode.py`, selection in `stage_one_scoring.py`, scoring and zero3 in `stage_one_teacher.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import stage_one_decode, stage_one_scoring, stage_one_teacher
from bench.cells import Cell, Program, table
from bench.trl_peer import add_vllm


def all_cells(tiny: bool, vllm: Path | None = None) -> list[Cell]:
    """Every part's cells; a tiny run does the same at sizes for a CPU."""
    parts = stage_one_decode, stage_one_scoring, stage_one_teacher
    own = [cell for part in parts for cell in part.cells(tiny)]
    return [*stage_one_decode.vllm_cells(tiny, vllm), *own]


PROGRAM = Program(
    __doc__ or "",
    "stage_one.json",
    lambda options: all_cells(options.tiny, options.vllm and options.vllm.resolve()),
    table,
    minutes=8.0,
    add_options=add_vllm,
)

if __name__ == "__main__":
    PROGRAM.main()
