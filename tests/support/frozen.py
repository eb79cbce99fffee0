"""Keep the garbage collector from looking through what has been imported, in every process forked from this one."""

import gc

gc.collect()
gc.freeze()
