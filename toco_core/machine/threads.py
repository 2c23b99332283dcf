"""Let the threads of PyTorch's operations sleep while they wait for each other.

An operation on two threads ends when both are done; the one that is first waits. By default GNU's OpenMP, which torch
uses on Linux, waits for milliseconds by turning round at full speed. Where the other thread's core has other work, too,
each of a step's thousands of operations then lasts a time slice of the scheduler: beside a test run a step of the
embedded recipe took 21 s by default, 2.4 s with 10,000 turns and 1.0 s with none. A wait of `SPINS` turns (some ten
microseconds) bridges the gap between two operations, so that a quiet machine loses nothing.
Microseconds of an addition to 200,000 numbers on two threads:

    turns                    0    300    1,000    3,000    10,000    default
    two free cores          29      7        8        8        10          8
    beside a busy process   22     35       69      165       495      7,700

The runtime reads its settings once, when torch is loaded. So `toco_core` sets them first of all; where torch was
imported before it, only processes that are started later are helped. Import `toco_core` first, or set both variables
where Python or Jupyter is started:

    export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=300
"""

import os

SPINS = 300
SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
"""The first is for every OpenMP (Intel's and LLVM's sleep at once by it), the second for GNU's, where it prevails."""

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_waiting_threads_sleep() -> None:
    """Set `SETTINGS` in the environment, unless one of `CHOSEN_BY_USER` is there already."""
    if not any(name in os.environ for name in CHOSEN_BY_USER):
        os.environ.update(SETTINGS)
