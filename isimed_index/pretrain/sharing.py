"""How the threads of a training share few cores: those that wait rest soon, those that draw give way.

PyTorch splits every operation among the cores and waits at its end for all of them, and GNU OpenMP waits by spinning
for milliseconds. A core that spins draws no batch, and an operation whose core is taken is late as a whole.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

_SPINS = "GOMP_SPINCOUNT"  # read by libgomp when it is loaded, with PyTorch
_SPIN_COUNT = "1000"  # about 10 µs; what libgomp itself takes once it sees more threads than cores
_NICER = 10  # of 19 steps; a thread's own on Linux


def rest_soon() -> None:
    """Have OpenMP's threads sleep soon when they wait; nothing where PyTorch is loaded or the user has chosen."""
    if "torch" not in sys.modules and not os.environ.keys() & {_SPINS, "OMP_WAIT_POLICY"}:
        os.environ[_SPINS] = _SPIN_COUNT


def give_way() -> None:
    """Have this thread compute alone, where the training leaves a core idle; no other thread is changed."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # PyTorch sets the number of a new thread when it is first asked, and would do so later
    threadpool_limits(1, user_api="openmp")  # of the calling thread, where torch.set_num_threads is for all new ones
    thread = threading.get_native_id()
    with suppress(OSError):  # some containers forbid it
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
