"""Notebooks under test train anew, in a folder of this session: what an older version trained proves nothing."""

import os
import tempfile

if "TOCO_RUNS" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="toco-runs-")
    os.environ["TOCO_RUNS"] = _folder.name
