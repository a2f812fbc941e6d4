"""The teacher cache: shards of scored rollouts that are committed whole, checked by digest, and read as numpy.

Knows neither torch nor the stages. FORMAT.md is what is on disk; the names below are what other packages use.
"""

import sys

if sys.argv[:1] == ["-m"]:  # the command `python -m cache` begins: what follows imports for a second
    from cache.interrupt import install

    install()

from cache.commit import CommitRecord
from cache.fingerprint import Fingerprint
from cache.reader import Snapshot, exists
from cache.reader import open_cache as open
from cache.schema import CacheError, Full, Hidden, Record, Signal, TeacherHead, TopK, to_float32
from cache.soundness import Finding, verify
from cache.store import StoreError
from cache.stream import stream
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
