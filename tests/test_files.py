from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image
from voc_folder import rectangle_mask, save_palette_mask, smooth_image

from toco_core.data import files, training_views
from toco_core.data.files import index_files, map_files, read_image, read_mask
from toco_core.errors import ToCoError


@pytest.fixture
def photo():
    return smooth_image(30, 44, seed=0)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_lossless_formats_come_back_exactly(tmp_path, photo, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo).save(path)
    np.testing.assert_array_equal(read_image(path), photo)


def test_jpeg_and_unicode_names(tmp_path, photo):
    path = tmp_path / "Straße 猫.jpg"
    Image.fromarray(photo).save(path, quality=95)
    assert np.abs(read_image(path).astype(int) - photo).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, photo, mode):
    image = Image.fromarray(photo).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.asarray(image.convert("RGB"))
    ours = read_image(path)
    assert ours.dtype == np.uint8 and ours.shape == (30, 44, 3)
    assert np.abs(ours.astype(int) - expected).mean() < (8 if mode == "CMYK" else 1)


def test_sixteen_bits_keep_the_upper_byte(tmp_path, photo):
    grey = photo[..., 0].astype(np.uint16) * 256 + 77
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(photo[..., :1], 3, axis=2))


def test_sixteen_bit_colour_keeps_the_upper_byte(tmp_path, photo):
    cv2.imwrite(str(tmp_path / "a.png"), (photo[..., ::-1].astype(np.uint16) << 8) + 200)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (4000, 5000)])
def test_tiny_and_huge_images(tmp_path, size):
    image = cv2.resize(smooth_image(8, 8, 1), size[::-1], interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)
    if max(size) < 1000:
        views = training_views(image, crop_size=32, rng=np.random.default_rng(0))
        assert views.image.shape == (3, 32, 32)


def test_exif_rotation_is_applied(tmp_path, photo):
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "a.jpg")
    assert turned.shape == (44, 30, 3)
    assert np.abs(turned.astype(int) - np.rot90(photo, -1)).mean() < 3


@pytest.mark.parametrize("keep", [-2, 0.9, 0.5, 150, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_refused_by_name(tmp_path, photo, keep, progressive):
    data = jpeg_bytes(photo, progressive=progressive)
    path = tmp_path / "broken.jpg"
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ToCoError, match="broken.jpg"):
        read_image(path)


def test_truncated_jpeg_with_a_whole_thumbnail_is_refused(photo):
    """The thumbnail in the header ends with the marker that the image itself lacks."""
    data = jpeg_bytes(photo)
    thumbnail = jpeg_bytes(photo[:16, :16])
    length = (len(thumbnail) + 2).to_bytes(2, "big")
    with_thumbnail = data[:2] + b"\xff\xe1" + length + thumbnail + data[2:]
    assert files._jpeg_is_whole(with_thumbnail)
    assert not files._jpeg_is_whole(with_thumbnail[:-20])


def test_bytes_after_the_end_of_a_jpeg_do_not_matter(tmp_path, photo):
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(photo) + b"trailing" * 9)
    assert read_image(tmp_path / "a.jpg").shape == photo.shape


def test_a_png_chunk_that_declares_gigabytes_is_refused_before_it_is_decoded(tmp_path, photo):
    """OpenCV took what 976 bytes declared, 3.8 GB, and then told that they were damaged."""
    resource = pytest.importorskip("resource")
    Image.fromarray(photo).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    at = whole.index(b"IDAT") - 4
    (tmp_path / "large.png").write_bytes(whole[:at] + (0xE4000330).to_bytes(4, "big") + whole[at + 4 :])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ToCoError, match="large.png is truncated"):
        read_image(tmp_path / "large.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KB


def test_truncated_png_is_refused_by_name(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(data[: len(data) // 2])
    for read in (read_image, read_mask):
        with pytest.raises(ToCoError, match="broken.png is truncated"):
            read(tmp_path / "broken.png")


def test_damaged_pixels_are_refused_by_name(tmp_path):
    save_palette_mask(rectangle_mask(60, 70, 2), tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    start = data.index(b"IDAT") + 12
    data[start : start + 20] = b"\xff" * 20
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ToCoError, match="a.png is damaged"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"no picture at all" * 9, "is not a readable JPEG")])
def test_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ToCoError, match=f"a.jpg {message}"):
        read_image(tmp_path / "a.jpg")


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ToCoError, match="gone.jpg cannot be read: No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(ToCoError, match="cannot be read"):
        read_image(tmp_path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    monkeypatch.setenv("TOCO_LIMITS", f"image_pixels={30 * 44 - 1}")
    words = "a.png is 30 x 44 and has 1320 pixels: at most 1319 are read .*TOCO_LIMITS=image_pixels=1320"
    with pytest.raises(ToCoError, match=words):
        read_image(tmp_path / "a.png")


def test_palette_mask_gives_indices_not_colours(tmp_path):
    mask = rectangle_mask(17, 23, 3)
    save_palette_mask(mask, tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_grey_mask_gives_its_values(tmp_path, suffix):
    mask = rectangle_mask(17, 23, 3)
    Image.fromarray(mask).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a.{suffix}"), mask)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_are_not_stretched(tmp_path, bits):
    values = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) % 2**bits
    write_small_grey_png(values, bits, tmp_path / "grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "grey.png"), values)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette(list(range(2**bits * 3)))
    palette.save(tmp_path / "palette.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), values)


def test_colour_mask_and_too_large_values_are_refused(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "colour.png")
    with pytest.raises(ToCoError, match=r"colour.png is a colour image \(RGB\)"):
        read_mask(tmp_path / "colour.png")
    Image.fromarray(np.full((4, 5), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ToCoError, match="deep.png holds the value 300"):
        read_mask(tmp_path / "deep.png")


def test_sixteen_bit_mask_with_small_values_is_read(tmp_path):
    mask = rectangle_mask(17, 23, 3)
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)


def test_index_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.JPG", "b.png", "b.jpg", "c.v2.jpeg", "notes.txt", "sub/d.bmp"):
        (tmp_path / name).touch()
    found = index_files(tmp_path, files.IMAGE_SUFFIXES)
    assert {name: path.name for name, path in found.items()} == {
        "a": "a.JPG",
        "b": "b.jpg",
        "c.v2": "c.v2.jpeg",
        "sub/d": "d.bmp",
    }


def test_of_two_files_that_differ_in_capitals_the_same_one_counts(tmp_path, monkeypatch):
    """Which one was up to the order in which the system lists a folder."""
    for name in ("b.jpg", "b.JPG", "a.png"):
        (tmp_path / name).touch()
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("the file system takes both for one")
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        walk = [(str(tmp_path), [], order(["b.jpg", "b.JPG", "a.png"]))]
        monkeypatch.setattr(files.os, "walk", lambda *_, walk=walk, **__: walk)
        assert list(index_files(tmp_path, files.IMAGE_SUFFIXES).items()) == [
            ("b", tmp_path / "b.JPG"),
            ("a", tmp_path / "a.png"),
        ]


def test_hidden_files_may_be_left_out(tmp_path):
    for name in (
        "a.jpg",
        "@me.jpg",
        "._a.jpg",
        ".thumbnails/a.jpg",
        "sub/@eaDir/a.jpg",
        "__MACOSX/sub/a.jpg",
        "sub/b.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(index_files(tmp_path, files.IMAGE_SUFFIXES, hidden=False)) == ["@me", "a", "sub/b"]
    assert len(index_files(tmp_path, files.IMAGE_SUFFIXES)) == 7


def test_map_files_keeps_the_order_and_counts_the_failures():
    assert map_files(lambda i: i * i, range(50), what="squares") == [i * i for i in range(50)]

    def odd_ones_fail(i):
        if i % 2:
            raise ToCoError(f"file {i} is odd")
        return i

    with pytest.raises(ToCoError, match=r"^file 1 is odd \(4 more of 10 files have problems\)$"):
        map_files(odd_ones_fail, range(10), what="odd")


def jpeg_bytes(image, **options):
    out = BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def write_small_grey_png(values, bits, path):
    """A grey PNG with 1, 2 or 4 bits per pixel, which PIL cannot write for 2 and 4."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    H, W = values.shape
    per_byte = 8 // bits
    rows = b""
    for row in values:
        packed = [
            sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(row[x : x + per_byte]))
            for x in range(0, W, per_byte)
        ]
        rows += b"\0" + bytes(packed)
    header = struct.pack(">IIBBBBB", W, H, bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
