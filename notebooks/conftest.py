"""Notebooks under test train anew, in a folder of this session: what an older version trained proves nothing.

Workers of `pytest -n` inherit the folder, so that each run is trained once, and share the cores.
"""

import os
import tempfile

LONGEST = ("train.ipynb",)
"""Taken first: these train a run of their own. The others open runs that come with the package."""

os.environ.setdefault("TOCO_NOTEBOOK_STEPS", "20")  # of train.ipynb: what it says of the default run is for that one
if "TOCO_RUNS" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="toco-runs-")
    os.environ["TOCO_RUNS"] = _folder.name
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path.suffix != ".ipynb"))
