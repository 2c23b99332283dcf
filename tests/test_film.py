"""The film of a training: it changes no bit, survives interruptions, and becomes a moving picture."""

import json
import os
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
import torch
from killed_training import config_of
from PIL import Image
from voc_folder import CLASSES, write_voc_folder

from toco_core.__main__ import main
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.predict.image import ImagePredictor
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.train.film import has_film, read_film
from toco_core.train.loop import train
from toco_core.viz.movie import captioned, write_movie


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_voc_folder(tmp_path_factory.mktemp("film") / "data", n=6)


def config_in(data, folder):
    return override(config_of(str(data), folder), steps=5, eval_interval=0)


@pytest.fixture(scope="module")
def filmed(data, tmp_path_factory):
    return train(config_in(data, tmp_path_factory.mktemp("filmed")), film=2, progress=False)


def files(run):
    return {path.name: path.read_bytes() for path in (run.folder / "film").iterdir()}


def test_no_bit_of_the_training_changes(filmed, data, tmp_path):
    plain = train(config_in(data, tmp_path), progress=False)
    assert not has_film(plain.run.folder) and has_film(filmed.run.folder)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, filmed.model.state_dict()[name]), name
    without_time = [{k: v for k, v in record.items() if k != "seconds"} for record in plain.run.records()]
    assert without_time == [{k: v for k, v in r.items() if k != "seconds"} for r in filmed.run.records()]


@pytest.mark.slow
def test_an_interrupted_run_has_the_same_film(filmed, data, tmp_path):
    config = config_in(data, tmp_path)

    def stop(record):
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, film=2, on_record=stop, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    part = files(Run.of(config))
    assert "00000002.png" in part and "00000005.png" not in part
    (Run.of(config).folder / "film" / "00000002.png").write_bytes(b"half")  # taken again or not, it is no frame
    run = train(config, film=2, progress=False).run
    found, expected = files(run), files(filmed.run)
    assert set(found) == set(expected) and len(found) == 6
    assert {name for name in found if found[name] != expected[name]} <= {"00000002.png"}
    again = train(config, film=2, resume=False, progress=False).run
    assert files(again) == expected


def test_a_run_begun_anew_keeps_no_frame_of_the_one_before(data, tmp_path):
    config = config_in(data, tmp_path)
    train(config, film=1, progress=False)
    run = train(config, film=5, resume=False, progress=False).run
    assert sorted(files(run)) == ["00000000.png", "00000005.png", "film.json", "images.png"]


def test_frames_show_the_model(filmed, data):
    film = read_film(filmed.run.folder)
    assert film.steps == (0, 2, 4, 5) and film.class_names == CLASSES and len(film.names) == len(film.images) == 4
    opened = open_run(filmed.run.folder)
    predictor = ImagePredictor(opened.model, opened.config)
    for i, name in enumerate(film.names):
        place = opened.data.val.names.index(name)
        image = opened.data.val.image(place)
        np.testing.assert_array_equal(film.images[i], image)
        predictor.set_image(image, opened.data.val.image_labels[place].tolist())
        value, label = predictor.strongest()
        np.testing.assert_array_equal(film.cam[-1][i], (255 * value).round().astype(np.uint8))
        np.testing.assert_array_equal(film.cam_class[-1][i], label)
        np.testing.assert_array_equal(film.segmentation[-1][i], predictor.segmentation())
    assert any((a != b).any() for a, b in zip(film.cam[0], film.cam[-1], strict=True))
    pictures = [film.picture(0, show=show) for show in ("CAM", "segmentation")]
    assert (
        pictures[0].shape
        == pictures[1].shape
        == (2 * max(map(len, film.images)), 2 * sum(i.shape[1] for i in film.images), 3)
    )
    with pytest.raises(ToCoError, match="show = 'x'"):
        film.picture(0, show="x")


def test_what_is_no_film_is_refused(filmed, data, tmp_path):
    with pytest.raises(ToCoError, match="has no film"):
        read_film(tmp_path)
    with pytest.raises(ToCoError, match="film = -1 is not allowed"):
        train(config_in(data, tmp_path), film=-1, progress=False)


@pytest.fixture
def copied(filmed, tmp_path):
    return shutil.copytree(filmed.run.folder, tmp_path / "run") / "film"


def refused(folder, words):
    began = time.process_time()
    with pytest.raises(ToCoError, match=rf"is damaged, or no film \(.*{words}.*\): train the run anew with film=...$"):
        read_film(folder.parent)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (None, "'names'"),
        ({"classes": 5}, "'int' object is not iterable"),
        ({"names": 5}, "'int' object is not iterable"),
        ({"names": [], "boxes": []}, "0 names and 0 places"),
        ({"names": ["a"], "boxes": [[0, 0, 0]]}, r"no part \[0, 0, 0\]"),
        ({"names": ["a"], "boxes": [[0, 900, 2]]}, r"no part \[0, 900, 2\]"),
        ({"names": ["a"], "boxes": [[-3, 2, 2]]}, r"no part \[-3, 2, 2\]"),
        ({"names": ["a"] * 100_000, "boxes": [[0, 2, 2]] * 100_000}, "100000 places"),
    ],
)
def test_what_is_no_list_of_a_film_is_refused(copied, known, words):
    path = copied / "film.json"
    path.write_text(json.dumps({} if known is None else json.loads(path.read_text()) | known))
    refused(copied, words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pictures_of_a_film_pass_the_gate(copied):
    """A pipe hung; a PNG of 76 KB and 625 million pixels was decoded, once for each image."""
    frame, images = copied / "00000002.png", copied / "images.png"
    kept = frame.read_bytes()
    frame.write_bytes(b"no picture")
    refused(copied, "00000002.png is not a readable")
    frame.unlink()
    os.mkfifo(frame)
    refused(copied, "00000002.png cannot be read: it is a pipe")
    frame.unlink()
    frame.write_bytes(kept)
    read_film(copied.parent)
    Image.new("1", (25_000, 20_000)).save(images)
    refused(copied, "images.png is 20000 x 25000: at most 128 x 512 are kept")


def test_film_from_a_shell(filmed, tmp_path, capsys):
    path = tmp_path / "training.gif"
    assert main(["film", str(filmed.run.folder), str(path), "--seconds", "0.1"]) == 0
    with Image.open(path) as found:
        assert found.n_frames == 4 and found.info["loop"] == 0


def frames_of(n, height=41, width=63):
    y, x = np.indices((height, width))
    return [
        np.stack([(x * 3 + 20 * i) % 256, y * 4 % 256, np.full_like(x, 40 * i)], -1).astype(np.uint8) for i in range(n)
    ]


def test_gif_has_every_frame_and_its_time(tmp_path):
    frames = frames_of(5)
    with Image.open(write_movie(frames, tmp_path / "below" / "a.gif", seconds=0.2)) as found:
        assert found.n_frames == 5 and found.size == (63, 41)
        for i, frame in enumerate(frames):
            found.seek(i)
            assert found.info["duration"] == (800 if i == 4 else 200)
            assert np.abs(np.asarray(found.convert("RGB")).astype(int) - frame).mean() < 12


def test_mp4_has_every_frame(tmp_path):
    frames = frames_of(5)
    try:
        path = write_movie(frames, tmp_path / "a.mp4", seconds=0.1)
    except ToCoError as error:
        pytest.skip(str(error))
    reader, found = cv2.VideoCapture(str(path)), []
    while (read := reader.read())[0]:
        found.append(read[1][..., ::-1])
    assert len(found) == 8 and found[0].shape == (42, 64, 3)
    assert all(np.abs(a[:41, :63].astype(int) - b).mean() < 25 for a, b in zip(found, frames, strict=False))


def test_movies_that_cannot_be_are_refused(tmp_path):
    for frames, path, options, message in (
        (frames_of(2), "a.avi", {}, "ends in .gif or .mp4"),
        ([], "a.gif", {}, "needs frames of one size, these have none"),
        ([*frames_of(1), *frames_of(1, 20, 30)], "a.gif", {}, "needs frames of one size"),
        (frames_of(2), "a.gif", {"seconds": 0}, "seconds = 0 is not allowed"),
    ):
        with pytest.raises(ToCoError, match=message):
            write_movie(frames, tmp_path / path, **options)
    assert captioned(frames_of(1)[0], "after 3 steps \u2603").shape[1] == 63
