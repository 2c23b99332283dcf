"""Check every shape in every signature of `toco_core` while the tests run; workers of `pytest -n` share the cores.

Without a GPU Triton's kernels are interpreted, which it wants to know before it is imported.
"""

import os
import shutil

if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from shape_check import check_shapes  # noqa: E402

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

check_shapes("toco_core")

from toco_core.machine.torchvision_shim import make_importable  # noqa: E402

make_importable()  # some tests import timm by themselves


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `exhaustive`, unless `-m` names it."""
    left = [item for item in items if item.get_closest_marker("exhaustive")]
    if left and "exhaustive" not in (config.option.markexpr or ""):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
