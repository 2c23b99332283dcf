"""The dense CRF of one image after the other, in processes of their own while the network computes the next batch.

Processes and not threads: each computes with one thread of its own, whatever number the network is given. What goes to
them is small, the decoder's maps at token size and the image as bytes; what comes back is the label map.
"""

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from toco_core.errors import ToCoError
from toco_core.labels import merged_logits
from toco_core.machine.device import keep_freed_memory
from toco_core.predict.segmentation import crf_label


class CRFWorkers:
    """`workers` processes; with 0 of them everything is computed at once, on the device of the maps.

    On a CPU the label maps are the same, bit for bit, with any number of workers.
    """

    def __init__(self, workers: int, options: Mapping, *, max_over_scales: bool = True):
        if workers < 0:
            raise ToCoError(f"crf_workers = {workers} must be at least 0")
        self.arguments = (dict(options), max_over_scales)
        self.pool = None
        if workers:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads, or CUDA, may hang
            self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)

    def submit(self, maps: Sequence[Tensor], image: UInt8[Tensor, "1 3 H W"]) -> Future:
        """The label map (uint8 H W) of an image from the decoder's logits, 1 C h w each, one per scale."""
        if self.pool is None:
            done: Future = Future()
            done.set_result(segmentation_label(maps, image, *self.arguments))
            return done
        exact = [m if m.dtype == torch.float64 else m.float() for m in maps]
        return self.pool.submit(_in_worker, [m.cpu().numpy() for m in exact], image.cpu().numpy(), *self.arguments)

    def __enter__(self) -> "CRFWorkers":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        if kind is BrokenProcessPool:
            raise ToCoError(
                "a process of the CRF ended: too little memory, or a script that calls this outside of "
                "`if __name__ == '__main__':`; try crf_workers=0"
            ) from error


def segmentation_label(
    maps: Sequence[Tensor], image: UInt8[Tensor, "1 3 H W"], options: Mapping, max_over_scales: bool
) -> UInt8[np.ndarray, "H W"]:
    """The decoder's maps merged at the image's size, after the dense CRF; on the device of the maps."""
    logits = merged_logits(maps, image.shape[-2:], max_over_scales=max_over_scales)
    unit = image.to(logits.device).float() / 255
    return crf_label(logits, unit, options)[0].to(torch.uint8).cpu().numpy()


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, be it killed: else it would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_worker(maps: list[np.ndarray], image: np.ndarray, options: Mapping, max_over_scales: bool) -> np.ndarray:
    tensors = [torch.from_numpy(m.copy()) for m in maps]
    return segmentation_label(tensors, torch.from_numpy(image.copy()), options, max_over_scales)
