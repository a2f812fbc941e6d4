"""Exclude all imported objects from garbage collection in the server of `forked`; imported last.

Forked processes share this memory with the server; a collection would touch it, and so copy all of it.
"""

import atexit
import gc

gc.freeze()
# only in the server; extension modules report objects that are never collected as leaked
atexit.register(gc.unfreeze)
