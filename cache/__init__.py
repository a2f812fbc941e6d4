"""The teacher cache: shards of scored rollouts, committed atomically, verified by digest, read as numpy.

Imports neither torch nor the stages. FORMAT.md specifies the files; the names below are the public API.
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m cache` is starting, and the imports below take a second
    from cache.interrupt import install

    install()

from cache.commit import CommitRecord
from cache.fingerprint import Fingerprint
from cache.matrices import Full, Hidden, TeacherHead, to_float32
from cache.reader import Snapshot, exists
from cache.reader import open_cache as open
from cache.schema import CacheError, Record, Signal
from cache.store import StoreError
from cache.stream import stream
from cache.topk import TopK
from cache.verify import Finding, verify
from cache.writer import CommitResult, Writer

__all__ = [
    "CacheError",
    "CommitRecord",
    "CommitResult",
    "Finding",
    "Fingerprint",
    "Full",
    "Hidden",
    "Record",
    "Signal",
    "Snapshot",
    "StoreError",
    "TeacherHead",
    "TopK",
    "Writer",
    "exists",
    "open",
    "stream",
    "to_float32",
    "verify",
]
