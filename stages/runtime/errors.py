"""One sentence for the user instead of a traceback: what went wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable

import torch

import cache

OUT_OF_MEMORY = (
    "The accelerator is out of memory. Lower, in this order: gen_micro_batch, lp_micro_batch, then group_size, batch_size or"
    " max_new_tokens; then use DeepSpeed ZeRO-2 for the student (recipes/accelerate_zero2.yaml). What is committed is kept."
)
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG,
}  # fmt: skip


CLOSED_PIPE = 128 + 13  # as shells report a program that SIGPIPE ended


class UserError(ValueError):
    """A mistake or a condition outside the code; its message is all that the user needs."""


def command(main: Callable[[], None]) -> None:
    """Runs a stage's `main`; user errors become one line on stderr and exit code 2, out of memory exit code 3.

    Where nobody reads its output any more (`| head`) it ends without a word, with exit code 141.
    """
    try:
        _flushed(main)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # left to the interpreter's exit, its threads now and then abort it
    except (UserError, cache.CacheError) as error:
        _leave(f"error: {error}", 2)
    except torch.OutOfMemoryError as error:
        _leave(f"error: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})", 3)
    except BrokenPipeError as error:
        if _drop_unread():
            _leave("", CLOSED_PIPE)
        traceback.print_exception(error)  # a socket
        _leave("", 1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            traceback.print_exc()
            _leave("", 1)
        _leave(f"error: {error.strerror}: {error.filename or 'a file of the run'}. Make room or choose another folder, then run the"
               " same command again; what is committed is kept.", 2)  # fmt: skip
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on from what is committed", 130)
    except Exception:
        traceback.print_exc()
        _leave("", 1)


def _flushed(main: Callable[[], None]) -> None:
    """`main`, and what it printed on its way: left to the interpreter's exit, a closed pipe would be noted there."""
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _drop_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads; what is left for it goes nowhere from now on."""
    unread = [descriptor for descriptor in (1, 2) if _is_unread(descriptor)]
    for descriptor in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(unread)


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _leave(message: str, code: int) -> None:
    """Ends the process at once: a clean interpreter exit would wait for the collectives of the other ranks."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
    raise SystemExit(code)
