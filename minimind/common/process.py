"""Settings of this process that make computing on a CPU faster; the user's own are kept.

They must be made before torch is loaded, so `import minimind` makes them. The processes that this
one starts inherit them.
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def prepare_process() -> None:
    """Set how OpenMP's threads wait, and keep memory that is freed."""
    # By default the threads spin long while they wait, and a run gets several times slower as soon
    # as anything else uses the cores. Spinning briefly costs nothing on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Keep glibc from giving large buffers back to the system, unless the user has set one of its
    MALLOC_ variables. Other C libraries are left as they are.

    The system hands them out again zeroed page by page, and a step on a CPU frees and takes the
    same ones each time.
    """
    if platform.libc_ver()[0] == "glibc" and not any(map(is_malloc_setting, os.environ)):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # all from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back


def is_malloc_setting(name: str) -> bool:
    """Whether a variable of the environment sets what `keep_freed_memory` would."""
    return name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
