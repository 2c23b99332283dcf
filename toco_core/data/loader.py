"""Batches for training and images for evaluation, the same bits with any number of worker processes.

Which images a step sees, and how they are varied, follows from (seed, step, place in the batch) alone: a run resumed at
step 1000 sees what the uninterrupted run saw, and no random state needs saving.

Batches hold `uint8` (a quarter of the bytes between processes); `to_unit` makes floats on the training
device.
"""

import contextlib
import functools
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from toco_core.data.augment import resize, training_views
from toco_core.data.files import image_size, map_files
from toco_core.data.split import Split
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine.memory import GIB, free_memory


@runtime_checkable
class ImageSource(Protocol):
    """What the loaders ask of a data set; `VOCFolder` is one."""

    names: Sequence[str]

    def __len__(self) -> int: ...
    def image(self, index: int) -> np.ndarray: ...
    def mask(self, index: int) -> np.ndarray | None: ...
    @property
    def image_labels(self) -> np.ndarray: ...


class Batch(NamedTuple):
    """One step's images. See `training_views` for the three kinds of view."""

    names: tuple[str, ...]
    images: UInt8[Tensor, "B 3 H W"]
    global_view: UInt8[Tensor, "B 3 H W"]
    local_image: UInt8[Tensor, "B 3 H W"]
    image_labels: Float[Tensor, "B K"]
    valid_box: Int64[Tensor, "B 4"]  # top, bottom, left, right


class EvalItem(NamedTuple):
    """One image to evaluate; `mask` is always of native size."""

    name: str
    image: UInt8[Tensor, "1 3 H W"]
    mask: UInt8[np.ndarray, "h w"] | None
    image_labels: Float[Tensor, "1 K"]
    native: UInt8[Tensor, "1 3 h w"] | None = None  # the image before it was stretched, where asked for


def training_batches(
    source: ImageSource,
    *,
    crop_size: int | tuple[int, int],
    batch_size: int,
    seed: int,
    part: slice | None = None,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    cache: bool = False,
    views_per_image: int = 0,
    start_method: str | None = None,
    pin_memory: bool = False,
    **view_options,
) -> Iterator[Batch]:
    """Batches of the steps `start_step` .. `stop_step` - 1; without `stop_step` they never end.

    The images come in a fresh random order per pass (see `sample_order`); a batch goes on into the next pass, so that
    each is full also where the split is smaller than the batch.

    part: which images of every batch to load, where several processes share it; None: all.
    workers: processes that load; 0 loads here. start_method: "fork", "spawn" or "forkserver", None: Python's default.
    cache: decode every image once, before the first step, and keep it (H W 3 bytes each, once for all workers).
    views_per_image: in how many ways an image is varied, the same ones again after so many passes; 0: anew in each.
    view_options: keywords of `training_views` besides image, crop size and rng.

    Raises ToCoError at once for bad numbers and, while iterating, BrokenFile where an image cannot be read.
    """
    _check_at_least(1, batch_size=batch_size)
    _check_at_least(0, seed=seed, start_step=start_step, workers=workers, views_per_image=views_per_image)
    if len(source) < 1:
        raise ToCoError("the data set is empty: at least one image is needed to train")
    options = dict(view_options, crop_size=crop_size)
    training_views(np.zeros((8, 8, 3), np.uint8), rng=np.random.default_rng(0), **options)  # refuses bad options now
    dataset = _TrainingSamples(source, seed, options, ImageCache(source) if cache else None, views_per_image)
    loader = DataLoader(
        dataset,
        batch_sampler=_StepSampler(len(source), batch_size, seed, start_step, stop_step, part or slice(None)),
        collate_fn=_collate,
        pin_memory=pin_memory,
        **_worker_options(workers, start_method),
    )
    return _items(loader)


def evaluation_items(
    source: ImageSource,
    *,
    size: int | tuple[int, int] | None = None,
    workers: int = 0,
    start_method: str | None = None,
    native: bool = False,
    masks: bool = True,
) -> Iterator[EvalItem]:
    """Every image once, in the order of the list, at native size or stretched to `size` (square, or (H, W)).

    `native` keeps the image at native size, too. Without `masks` none is read, as where nothing is scored.

    Shrinking averages areas, enlarging is bilinear. Masks are never resized: scores are taken at native size.
    Raises BrokenFile where an image or mask cannot be read, or where a mask of a `Split` has not the size of its image.
    """
    _check_at_least(0, workers=workers)
    target = (size, size) if isinstance(size, int) else size
    if target is not None:
        _check_at_least(1, size=min(target))
    loader = DataLoader(
        _EvaluationSamples(source, target, native, masks),
        batch_size=None,
        collate_fn=_same,
        **_worker_options(workers, start_method),
    )
    return _items(loader)


def in_batches(items: Iterable, n: int) -> Iterator[list]:
    """Lists of `n` neighbours, the last one as long as it gets."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, n)):
        yield batch


def to_unit(images: Shaped[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """`uint8` images as float32 in [0, 1]; images that are float already pass unchanged."""
    return images if images.is_floating_point() else images.float() / 255


def sample_order(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """The order of `n` images in pass number `epoch`: a permutation that follows from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class ImageCache:
    """All decoded images of a source in one flat tensor, which worker processes share instead of copying it.

    Raises ToCoError, before any is decoded, where they do not fit into the memory that is free.
    """

    def __init__(self, source: ImageSource):
        sizes = map_files(functools.partial(_stored_size, source), range(len(source)), what="sizes of images")
        self.starts = list(itertools.accumulate((3 * height * width for height, width in sizes), initial=0))
        wanted, free = self.starts[-1], free_memory(torch.device("cpu"))
        if free is not None and wanted > free:
            fact = f"{len(source)} decoded images take {wanted / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
            raise ToCoError(f"cache = True is not allowed: {fact}; cache = False decodes them in every pass")
        self.pixels = torch.empty(wanted, dtype=torch.uint8)
        flat = self.pixels.numpy()

        def keep(index: int) -> tuple[int, ...]:  # at once: all images beside their copy would take twice the memory
            image = source.image(index)
            flat[self.starts[index] : self.starts[index + 1]] = image.ravel()
            return image.shape

        self.shapes = map_files(keep, range(len(source)), what="decoding images")

    def image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """A view of the kept pixels: not to be written to."""
        return self.pixels[self.starts[index] : self.starts[index + 1]].numpy().reshape(self.shapes[index])


def _stored_size(source: ImageSource, index: int) -> tuple[int, int]:
    """Sides of an image, in whichever order; of a `Split` from the header of its file."""
    return image_size(source.image_path(index)) if isinstance(source, Split) else source.image(index).shape[:2]


class _Failure(NamedTuple):
    """An error on its way from a worker process, as one line."""

    message: str


class _StepSampler:
    """For each step, the (position in the endless stream, index of the image) of its samples."""

    def __init__(self, n: int, batch_size: int, seed: int, start: int, stop: int | None, part: slice):
        self.n, self.batch_size, self.seed, self.start, self.stop = n, batch_size, seed, start, stop
        self.part = part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size)[self.part]:
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = sample_order(self.n, self.seed, epoch)
                batch.append((position, int(order[position % self.n])))
            yield batch


class _TrainingSamples(Dataset):
    def __init__(self, source: ImageSource, seed: int, options: dict, cache: ImageCache | None, views_per_image: int):
        self.source, self.seed, self.options, self.cache = source, seed, options, cache
        self.views_per_image = views_per_image
        self.labels = torch.as_tensor(np.asarray(source.image_labels), dtype=torch.float32)

    def __getitem__(self, key: tuple[int, int]):
        position, index = key
        draw = (1, position)
        if self.views_per_image:
            draw = (2, index, position // len(self.labels) % self.views_per_image)
        name = self.source.names[index]
        try:
            image = (self.cache or self.source).image(index)
            views = training_views(image, rng=np.random.default_rng((self.seed, *draw)), **self.options)
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to this file
            return _failure(name, error)
        return name, *(torch.from_numpy(array) for array in views), self.labels[index]


class _EvaluationSamples(Dataset):
    def __init__(self, source: ImageSource, size: tuple[int, int] | None, native: bool, masks: bool):
        self.source, self.size, self.native, self.masks = source, size, native, masks
        self.labels = torch.as_tensor(np.asarray(source.image_labels), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        name = self.source.names[index]
        try:
            image, mask = _pair(self.source, index) if self.masks else (self.source.image(index), None)
        except Exception as error:  # noqa: BLE001
            return _failure(name, error)
        return eval_item(name, image, mask, self.labels[index][None], size=self.size, native=self.native)


def _pair(source: ImageSource, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image and mask; of a `Split` checked to be of one size."""
    return source.pair(index) if isinstance(source, Split) else (source.image(index), source.mask(index))


def eval_item(
    name: str,
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "mh mw"] | None,
    image_labels: Float[Tensor, "1 K"],
    *,
    size: tuple[int, int] | None,
    native: bool,
) -> EvalItem:
    """One image to evaluate; arguments as in `evaluation_items`."""
    seen = image if size is None else resize(image, *size)
    return EvalItem(name, _channels_first(seen), mask, image_labels, _channels_first(image) if native else None)


def _channels_first(image: np.ndarray) -> Tensor:
    """uint8 H W 3 -> 1 3 H W."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]


def _failure(name: str, error: Exception) -> _Failure:
    """The error with the name of its image: raised in the main process, carried there in one line from a worker."""
    message = str(error) if isinstance(error, ToCoError) else f"image {name}: {type(error).__name__}: {error}"
    if get_worker_info() is None:
        raise BrokenFile(message) from error
    return _Failure(message)


def _collate(samples: list):
    failed = next((sample for sample in samples if isinstance(sample, _Failure)), None)
    if failed is not None:
        return failed
    names, images, global_view, local_image, valid_box, labels = zip(*samples, strict=True)
    stacked = (torch.stack(part) for part in (images, global_view, local_image, labels, valid_box))
    return Batch(names, *stacked)


def _same(item):
    return item


def _worker_options(workers: int, start_method: str | None) -> dict:
    if workers == 0:
        return {}
    return {
        "num_workers": workers,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": start_method,
        "prefetch_factor": 4,
    }


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # one process per core already; and OpenCV's threads do not survive a fork


def _items(loader: DataLoader) -> Iterator:
    """What the loader yields, with errors from its workers raised as ToCoError."""
    with loader_errors():
        for item in _started(loader):
            if isinstance(item, _Failure):
                raise BrokenFile(item.message)
            yield item


def _started(loader: DataLoader) -> Iterator:
    """`iter(loader)`, whose `next` alone tells of a worker that died, within torch's five seconds.

    Torch also sets a handler of SIGCHLD, which raises wherever this process is: in the middle of a step, or while a
    checkpoint is saved. The handler of before is put back.
    """
    if loader.num_workers == 0 or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    here = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    except OSError as error:
        raise ToCoError(f"workers = {loader.num_workers}: no more processes: {error.strerror or error}") from error
    finally:
        if here and before is not None:
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def loader_errors() -> Iterator[None]:
    """Raise what torch says of a dead loader process, in whatever place and way, as ToCoError.

    Other parts of the program may have set torch's handler of SIGCHLD (see `_started`), so that it may come from any
    line: whatever reads images in processes of its own runs in this.
    """
    try:
        yield
    except ToCoError:
        raise
    except Exception as error:
        cause = next((one for one in _causes(error) if _is_of_loader(one)), None)
        if cause is None:
            raise
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise ToCoError(
            f"a loader process ended ({reason}): too little memory, or /dev/shm too small; try workers=0"
        ) from error


def _is_of_loader(error: BaseException) -> bool:
    """What torch raises where a loader process has died, or its connection with it."""
    died = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    return died or isinstance(error, (ConnectionError, EOFError))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those on whose account or during whose handling it was raised: it may have hit a line that raises
    another error for any that it meets."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ToCoError(f"{name} = {value} must be at least {least}")
