import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from voc_folder import SIZES, rectangle_mask, write_voc_folder

from toco_core.data import VOCFolder, evaluation_items, loader, to_unit, training_batches, training_views
from toco_core.data.loader import ImageCache, sample_order
from toco_core.errors import ToCoError

OPTIONS = {"crop_size": (24, 32), "batch_size": 4, "seed": 7}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return VOCFolder(write_voc_folder(tmp_path_factory.mktemp("loader") / "data", n=10), "train")


class SourceWithoutPixels:
    names = ("img_0", "img_1")
    image_labels = np.zeros((2, 3), dtype=np.uint8)

    def __len__(self):
        return 2

    def image(self, index):
        raise KeyError("pixels")

    def mask(self, index):
        return None


def take(batches, n):
    return list(itertools.islice(batches, n))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.names == other.names
        torch.testing.assert_close(one[1:], other[1:], rtol=0, atol=0)


def test_a_batch_has_the_promised_shapes(source):
    (batch,) = take(training_batches(source, **OPTIONS), 1)
    for views in (batch.images, batch.global_view, batch.local_image):
        assert views.shape == (4, 3, 24, 32) and views.dtype == torch.uint8
    assert batch.image_labels.shape == (4, 3) and batch.image_labels.dtype == torch.float32
    assert batch.valid_box.shape == (4, 4) and batch.valid_box.dtype == torch.int64
    for name, row in zip(batch.names, batch.image_labels, strict=True):
        torch.testing.assert_close(row, torch.eye(3)[int(name.removeprefix("img_")) % 3])
    for view, (top, bottom, left, right) in zip(batch.images, batch.valid_box.tolist(), strict=True):
        outside = view.clone()
        outside[:, top:bottom, left:right] = 0
        assert (outside == 0).all()


def test_a_batch_holds_the_views_of_its_images(source):
    step = 3
    (batch,) = training_batches(source, start_step=step, stop_step=step + 1, **OPTIONS)
    for slot, name in enumerate(batch.names):
        rng = np.random.default_rng((OPTIONS["seed"], 1, step * OPTIONS["batch_size"] + slot))
        views = training_views(source.image(source.names.index(name)), crop_size=OPTIONS["crop_size"], rng=rng)
        for field in views._fields:
            ours = batch.images if field == "image" else getattr(batch, field)
            np.testing.assert_array_equal(ours[slot].numpy(), getattr(views, field))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, start_method", [(1, None), (4, None), (2, "spawn")])
def test_workers_change_no_bit(source, workers, start_method):
    expected = list(training_batches(source, stop_step=6, **OPTIONS))
    options = {"workers": workers, "start_method": start_method}
    assert_same(list(training_batches(source, stop_step=6, **OPTIONS, **options)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_change_no_bit(source, workers):
    expected = list(training_batches(source, stop_step=3, **OPTIONS))
    assert_same(list(training_batches(source, stop_step=3, cache=True, workers=workers, **OPTIONS)), expected)


def test_cached_images_are_not_read_again(tmp_path):
    folder = VOCFolder(write_voc_folder(tmp_path / "data"), "train")
    batches = training_batches(folder, cache=True, **OPTIONS)
    for path in (tmp_path / "data" / "JPEGImages").iterdir():
        path.unlink()
    assert len(take(batches, 4)) == 4


def test_cached_images_take_their_memory_once(tmp_path):
    """Beside the copy that workers share there are the images that are being decoded, and not all."""
    root = write_voc_folder(tmp_path / "data", n=1, splits={"train": [0]})
    Image.fromarray(np.zeros((200, 300, 3), np.uint8)).save(root / "JPEGImages" / "img_0.jpg")
    source = VOCFolder(root, "train").subset([0] * 100)
    tracemalloc.start()
    cache = ImageCache(source)
    peak = tracemalloc.get_traced_memory()[1]  # of numpy; torch's is not traced
    tracemalloc.stop()
    assert cache.pixels.numel() == 100 * 200 * 300 * 3 and cache.image(99).shape == (200, 300, 3)
    assert peak < cache.pixels.numel() / 2


def test_images_that_do_not_fit_are_not_cached(source, monkeypatch):
    monkeypatch.setattr(loader, "free_memory", lambda device: 1000)
    monkeypatch.setattr(source, "image", lambda index: pytest.fail("decoded"))
    words = (
        r"^cache = True is not allowed: \d+ decoded images take 0.0 GiB, 0.0 GiB are free; cache = False decodes them"
    )
    with pytest.raises(ToCoError, match=words):
        next(iter(training_batches(source, cache=True, **OPTIONS)))


def test_cached_images_are_turned_as_their_camera_says(tmp_path):
    root = write_voc_folder(tmp_path / "data", n=1, splits={"train": [0]})
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(root / "JPEGImages" / "img_0.jpg", exif=exif)
    source = VOCFolder(root, "train")
    assert source.image(0).shape == (30, 20, 3)
    np.testing.assert_array_equal(ImageCache(source).image(0), source.image(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(source, workers):
    whole = list(training_batches(source, stop_step=7, **OPTIONS))
    assert_same(list(training_batches(source, start_step=4, stop_step=7, workers=workers, **OPTIONS)), whole[4:])


def test_seeds_differ_and_so_do_passes(source):
    one = take(training_batches(source, **OPTIONS), 3)
    other = take(training_batches(source, **{**OPTIONS, "seed": 8}), 3)
    assert [b.names for b in one] != [b.names for b in other]
    seen = {}
    for batch in take(training_batches(source, **OPTIONS), 10):  # 4 passes: an image never comes back the same
        for name, image in zip(batch.names, batch.images, strict=True):
            assert all((image != before).any() for before in seen.setdefault(name, []))
            seen[name].append(image)
    assert {len(images) for images in seen.values()} == {4}


def test_each_pass_shows_every_image_once(source):
    names = [name for batch in take(training_batches(source, **OPTIONS), 15) for name in batch.names]
    for start in range(0, 60, 10):
        assert sorted(names[start : start + 10]) == sorted(source.names)
    assert names[:10] != names[10:20]


def test_a_batch_larger_than_the_split_is_full(source):
    part = source.subset([3, 1])
    (batch,) = take(training_batches(part, **{**OPTIONS, "batch_size": 7}), 1)
    assert len(batch.names) == 7 and sorted(batch.names[:2]) == ["img_1", "img_3"]
    assert 3 <= batch.names.count("img_1") <= 4


def test_the_order_is_the_same_on_every_machine():
    assert sample_order(7, seed=3, epoch=0).tolist() == [5, 6, 2, 1, 4, 3, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, workers):
    root = write_voc_folder(tmp_path / "data")
    folder = VOCFolder(root, "train")
    path = root / "JPEGImages" / "img_3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ToCoError, match=r"img_3.jpg is truncated") as caught:
        take(training_batches(folder, workers=workers, **OPTIONS), 10)
    assert "\n" not in str(caught.value)
    with pytest.raises(ToCoError, match=r"img_3.jpg is truncated"):
        list(evaluation_items(folder, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mask_of_another_size_is_named_and_not_stretched(tmp_path, workers):
    """A photograph that its camera wants turned, with a mask drawn on its pixels as they are stored."""
    root = write_voc_folder(tmp_path / "data", n=3)
    path = root / "JPEGImages" / "img_1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    with pytest.raises(ToCoError, match="img_1.png is 33 x 21 but its image img_1.jpg is 21 x 33: a mask has the size"):
        list(evaluation_items(VOCFolder(root, "train"), size=16, workers=workers))
    assert [item.mask for item in evaluation_items(VOCFolder(root, "train"), masks=False)] == [None] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_any_other_error_names_its_image(workers):
    with pytest.raises(ToCoError, match=r"^image img_\d: KeyError: 'pixels'$"):
        take(training_batches(SourceWithoutPixels(), workers=workers, **OPTIONS), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"workers": -1}, "workers = -1 must be at least 0"),
        ({"start_step": -3}, "start_step = -3"),
        ({"seed": -1}, "seed = -1"),
        ({"crop_size": 0}, "crop_size"),
        ({"scale_range": (2.0, 1.0)}, "scale_range"),
    ],
)
def test_bad_numbers_are_refused_at_once(source, options, message):
    with pytest.raises(ToCoError, match=message):
        training_batches(source, **{**OPTIONS, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_at_native_size(source, workers):
    items = list(evaluation_items(source, workers=workers))
    assert [item.name for item in items] == list(source.names)
    for i, item in enumerate(items):
        height, width = SIZES[i % 4]
        np.testing.assert_array_equal(item.image[0].permute(1, 2, 0).numpy(), source.image(i))
        np.testing.assert_array_equal(item.mask, rectangle_mask(height, width, 1 + i % 3))
        torch.testing.assert_close(item.image_labels, torch.eye(3)[None, i % 3])


@pytest.mark.parametrize("size, expected", [(19, (19, 19)), ((18, 27), (18, 27))])
def test_evaluation_at_one_size_leaves_masks_alone(source, size, expected):
    for i, item in enumerate(evaluation_items(source, size=size)):
        assert item.image.shape == (1, 3, *expected) and item.mask.shape == SIZES[i % 4]
    with pytest.raises(ToCoError, match="size = 0"):
        evaluation_items(source, size=0)


def test_images_without_mask_are_evaluated_too(tmp_path):
    root = write_voc_folder(tmp_path / "data", n=3)
    (root / "SegmentationClass" / "img_1.png").unlink()
    labels = {f"img_{i}": [0, 1, 0] for i in range(3)}
    folder = VOCFolder(root, "train", require_masks=False, labels=labels)
    assert [item.mask is None for item in evaluation_items(folder)] == [False, True, False]


def test_to_unit_by_hand():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert to_unit(images).dtype == torch.float32
    torch.testing.assert_close(to_unit(images), torch.tensor([v / 255 for v in images.flatten()]).reshape(2, 3, 4, 5))
    double = to_unit(images).double()
    assert to_unit(double) is double
