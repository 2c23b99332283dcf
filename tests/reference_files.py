"""Where the reference arrays lie: inputs and outputs of the published release, one `.npz` per component.

The folder is the environment variable `TOCO_REFERENCE` if set, otherwise the small copy in `tests/reference_values`. A
case whose file is not in the folder is skipped with the reason. Any folder with the same file names works: a test takes
its sizes, classes and thresholds from the arrays, never from what the shipped files happen to hold.

    from reference_files import reference          # the fixture

    def test_par(reference):
        arrays = reference("par.npz")              # dict of torch tensors, or the test is skipped
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

RTOL, ATOL = 1e-4, 1e-6  # of float32 values and gradients
AGREEING_PIXELS = 0.999  # of label maps that pass through floating point refinement


def reference_folder() -> Path:
    """The folder named by TOCO_REFERENCE, or the small copy beside the tests."""
    return Path(os.environ.get("TOCO_REFERENCE") or Path(__file__).parent / "reference_values")


def reference_path(name: str) -> Path:
    """The path of one reference file; skips the calling test where the file is absent."""
    path = reference_folder() / name
    if not path.is_file():
        source = "TOCO_REFERENCE" if os.environ.get("TOCO_REFERENCE") else "the small copy under tests/reference_values"
        pytest.skip(f"{name} is not in {source}; set TOCO_REFERENCE to a folder that has it")
    return path


def load_reference(name: str) -> dict[str, Tensor]:
    """The arrays of one reference file as tensors of the stored type (0-dimensional where a number is stored)."""
    with np.load(reference_path(name), allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def assert_labels_agree(ours: Tensor, theirs: Tensor, share: float = AGREEING_PIXELS) -> None:
    """Label maps are equal in at least `share` of the pixels."""
    assert ours.shape == theirs.shape, f"label maps of shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    agreement = (ours.long() == theirs.long()).double().mean().item()
    assert agreement >= share, f"only {agreement:.4%} of the pixels agree, {share:.1%} are needed"


@pytest.fixture
def reference():
    """`reference("par.npz")` gives that file's tensors, or skips the test."""
    return load_reference
