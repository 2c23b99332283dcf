"""Let the threads of PyTorch's operations sleep while they wait for each other.

An operation on two threads ends when both are done; the one that is first waits, and so do all between operations. By
default GNU's OpenMP, which torch uses on Linux, waits for milliseconds by turning round at full speed. Where the other
thread's core has other work, too, each of a step's thousands of operations then lasts a time slice of the scheduler:
beside a test run a step of the embedded recipe took 21 s. A thread that sleeps at once has to be woken for the next
operation, which takes longer than most operations do. `SPINS` turns, some tens of microseconds, bridge the gap between
two operations. Seconds of a step of the embedded recipe on two threads (`experiments/benchmarks/spins.py`):

    turns                       0     300   1,000   2,000   3,000   10,000    one thread
    two free cores           0.40    0.38    0.30    0.30    0.30     0.29          0.44
    beside a busy process    0.52    0.49    0.64    0.68    0.77     1.10          0.42

Training as a whole has longer gaps: 0.51 s a step with 300 turns, 0.43 with 1,000, 0.29 from 1,500 on.

The runtime reads its settings once, when torch is loaded. So `toco_core` sets them first of all; where torch was
imported before it, only processes that are started later are helped. Import `toco_core` first, or set both variables
where Python or Jupyter is started:

    export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000
"""

import os

SPINS = 2000
SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
"""The first is for every OpenMP (Intel's and LLVM's sleep at once by it), the second for GNU's, where it prevails."""

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """Set `SETTINGS` in the environment, unless one of `CHOSEN_BY_USER` is there already."""
    if not any(name in os.environ for name in CHOSEN_BY_USER):
        os.environ.update(SETTINGS)
