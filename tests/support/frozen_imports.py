"""Imported last by the server that `forked` forks from: what is imported by then is left out of every garbage collection.

The processes share that memory with the server; a collection would touch, and so copy, all of it.
"""

import atexit
import gc

gc.freeze()
atexit.register(
    gc.unfreeze
)  # of the server alone; what is never collected, extension modules report as leaked
