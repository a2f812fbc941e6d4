"""User-facing errors: one sentence that says what went wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable

import cache
from cache.plain import plain
from stages.runtime import ending

OUT_OF_MEMORY = (
    "The accelerator is out of memory. While generating, lower gen_micro_batch. While scoring or training,"
    " lower micro_batch_tokens or lp_micro_batch, then set gradient_checkpointing: true. If that is not"
    " enough, lower max_new_tokens, or use DeepSpeed ZeRO-2 for the student (recipes/accelerate_zero2.yaml)."
    " What is committed is kept."
)
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ENOLCK,
    errno.ENOMEM,
}
REMEDIES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Close other programs",
    errno.ENOMEM: "Free memory",
}


CLOSED_PIPE = 128 + 13  # the exit code shells report for a program ended by SIGPIPE


class UserError(ValueError):
    """A user mistake or an external condition; the message is all the user needs."""


def one_line(error: Exception) -> str:
    """A library's message on one line, without a final full stop, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:299]}…").rstrip(".")


def command(main: Callable[[], None]) -> None:
    """Run a stage's `main`; user errors become one line on stderr and exit code 2, out of memory exit code 3.

    If the output pipe is closed (`| head`), exit silently with code 141.
    """
    try:
        _flushed(main)
        if _is_joined():
            # at interpreter exit its threads sometimes abort the process
            sys.modules["torch"].distributed.destroy_process_group()
        ending.run_tasks()
        if ending.ends_hard():
            _leave("", 0)
    except (UserError, cache.CacheError) as error:
        _leave(f"error: {error}", 2)
    except ending.Stopped as error:
        _leave(str(error), error.code)
    except MemoryError:
        _leave(
            "error: this machine is out of memory. Close other programs, or lower rollouts_per_unit and"
            " micro_batch_tokens or lp_micro_batch; what is committed is kept.",
            3,
        )
    except BrokenPipeError as error:
        if _drop_unread():
            _leave("", CLOSED_PIPE)
        _fail(error)  # a socket
    except OSError as error:
        if error.errno not in DISK_ERRORS | {errno.ENOENT} or not error.filename:
            _fail(error)
        _leave(f"error: {machine_error(error)}", 2)
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to resume", 130)
    except Exception as error:
        if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
            _leave(f"error: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})", 3)
        _fail(error)


def machine_error(error: OSError) -> str:
    """Describe a file system error and its remedy in one sentence."""
    if error.errno == errno.ENOENT:
        return (
            f"{error.filename} does not exist; was a folder moved or removed while this ran? Put it"
            " back, or start with another --run_name."
        )
    remedy = REMEDIES.get(error.errno or 0, "Make it accessible, or choose another folder")
    return (
        f"{error.strerror}: {error.filename or 'a file of the run'}. {remedy}, then run the same command"
        " again; what is committed is kept."
    )


def _fail(error: Exception) -> None:
    """Print the traceback of a bug; not if it results from a signal that ended other processes."""
    ending.end_if_asked(patience=1.0 if _is_joined() else 0.0)
    print(plain("".join(traceback.format_exception(error)), kept="\n"), end="", file=sys.stderr)
    _leave("", 1)


def _is_joined() -> bool:
    """Whether this process belongs to a group of processes. Imports no torch: not every command needs it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _flushed(main: Callable[[], None]) -> None:
    """Run `main` and flush stdout; at interpreter exit, a closed pipe would be reported on stderr."""
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _drop_unread() -> bool:
    """Whether stdout or stderr is a closed pipe; if so, send further output to /dev/null."""
    unread = [descriptor for descriptor in (1, 2) if _is_unread(descriptor)]
    for descriptor in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(unread)


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _leave(message: str, code: int) -> None:
    """Exit at once: a clean interpreter exit would wait for the other ranks' collectives."""
    ending.run_tasks()
    if message:
        print(plain(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if _is_joined() or ending.ends_hard():
        os._exit(code)
    raise SystemExit(code)
