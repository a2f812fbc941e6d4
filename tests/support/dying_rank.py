"""Stage two in which rank 1 ends at its third forward; run by tests under torchrun.

    dying_rank.py killed|refuses|hangs FLAGS

killed: by SIGKILL. refuses: with a user error, as on damaged rows. hangs: like refuses, but rank 0 never
returns from its collective, as under NCCL.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import stages.train
from stages.loops import steps
from stages.runtime.errors import UserError, command

count = [0]
backward = steps._backward


def dying(training: Any, batch: Any, world_size: int, last: bool) -> Any:
    count[0] += 1
    is_doomed = os.environ["RANK"] == "1"
    if count[0] == 3 and how == "hangs" and not is_doomed:
        time.sleep(600)
    if count[0] == 3 and is_doomed:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("rank 1 cannot go on.")
    return backward(training, batch, world_size, last)


if __name__ == "__main__":
    how = sys.argv.pop(1)
    steps._backward = dying
    command(stages.train.main)
