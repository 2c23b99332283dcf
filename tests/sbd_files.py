"""SBD's files for tests, in the nested form of the real ones, written by SciPy."""

import io

import numpy as np
import scipy.io
import scipy.sparse


def sbd_bytes(mask: np.ndarray, *, compressed: bool = True) -> bytes:
    """GTcls with one sparse boundary map per class, the mask, and the list of its classes."""
    boundaries = np.empty((20, 1), dtype=object)
    for k in range(20):
        boundaries[k, 0] = scipy.sparse.csc_matrix(np.abs(np.diff(mask == k + 1, axis=1, append=False)).astype(float))
    present = np.setdiff1d(np.unique(mask), [0, 255]).astype(np.uint8)[:, None]
    struct = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
    file = io.BytesIO()
    scipy.io.savemat(file, {"GTcls": struct}, do_compression=compressed)
    return file.getvalue()
