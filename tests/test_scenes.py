import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toco_core.data.scenes as scenes
from toco_core.conventions import voc_palette
from toco_core.data import VOCFolder, open_train_val
from toco_core.data.scenes import CLASS_NAMES, ScenesConfig, cache_folder, draw_scene, scenes_folder
from toco_core.data.world import painting
from toco_core.data.world.shapes import Part, ellipse
from toco_core.data.world.species import COATS, SPECIES
from toco_core.errors import ToCoError

SMALL = ScenesConfig(seed=3, n_train=6, n_val=3, n_test=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOCO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return scenes_folder(SMALL, progress=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path))
    return tmp_path


def contents(root):
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fill_with_marks(root, config, *, progress=True):
    """Stands for the drawing where only its frame is tested."""
    (root / "started").write_text("")
    (root / "scenes.json").write_text("{}")


# ---- one scene


def test_a_scene_follows_from_the_state_of_its_generator():
    first, again, other = (draw_scene(np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert first.animals == again.animals and first.habitat == again.habitat
    assert (first.image != other.image).any() and (first.mask != other.mask).any()


@pytest.mark.parametrize("size", [(48, 80), (80, 48)])
def test_a_scene_has_the_wanted_size_and_values(size):
    scene = draw_scene(np.random.default_rng(0), *size)
    assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
    assert scene.mask.shape == size and scene.mask.dtype == np.uint8
    assert set(np.unique(scene.mask)) <= {*range(len(CLASS_NAMES)), 255}


@pytest.mark.parametrize("number", range(len(SPECIES)))
def test_one_species_can_be_asked_for(number):
    scene = draw_scene(np.random.default_rng(number), 64, 72, among=[number], n_animals=2)
    assert set(np.unique(scene.mask)) == {0, 1 + number, 255}
    assert [animal.species for animal in scene.animals] == [number] * 2


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_number_of_animals_can_be_asked_for(n):
    scene = draw_scene(np.random.default_rng(5), 64, 96, n_animals=n)
    assert len(scene.animals) == n
    assert ((scene.mask > 0).any()) == (n > 0)


def test_by_default_one_to_four_animals_of_at_most_three_species():
    drawn = [draw_scene(np.random.default_rng(seed), 32, 48) for seed in range(60)]
    assert {len(scene.animals) for scene in drawn} == {1, 2, 3, 4}
    n_species = np.array([len({animal.species for animal in scene.animals}) for scene in drawn])
    assert set(n_species) == {1, 2, 3}
    assert 1 / 3 <= (n_species > 1).mean() <= 1 / 2


def test_looks_and_habitats_are_usual_and_not_certain():
    """Colours, coats and habitats are hints: right far more often than by chance, and wrong often enough."""
    drawn = [draw_scene(np.random.default_rng(seed), 24, 24) for seed in range(250)]
    animals = [(animal, scene.habitat) for scene in drawn for animal in scene.animals]
    own_colours = np.mean([animal.colours == animal.species for animal, _ in animals])
    own_coat = np.mean([COATS[animal.coat] == SPECIES[animal.species].coat for animal, _ in animals])
    at_home = np.mean([habitat == SPECIES[animal.species].habitat for animal, habitat in animals])
    assert 0.65 < own_colours < 0.85 and 0.7 < own_coat < 0.9 and 0.4 < at_home < 0.75


def test_different_labels_never_touch():
    for seed in range(12):
        mask = draw_scene(np.random.default_rng(seed)).mask.astype(int)
        for here, there in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[1:, 1:], mask[:-1, :-1])):
            assert ((here == there) | (here == 255) | (there == 255)).all()


@pytest.mark.parametrize("centre", [(-40, -30), (200, 20), (90, 400), (-5, 200), (60, 50)])
def test_the_head_is_inside_the_picture(monkeypatch, centre):
    """Wherever the body is asked for: of the animal only a spot at the place of its head is drawn."""
    plain = painting.animal

    def spot_only(species, rng):
        _, (x, y) = plain(species, rng)
        return [Part(ellipse(x, y, 0.1, 0.1), (1, 2, 3))], (x, y)

    monkeypatch.setattr(painting, "animal", spot_only)
    H, W, unit = 120, 160, 30.0
    grey = (np.full(3, 90.0, np.float32), np.full(3, 60.0, np.float32))
    for number, species in enumerate(SPECIES):
        image, mask, rng = np.zeros((H, W, 3), np.float32), np.zeros((H, W), np.uint8), np.random.default_rng(number)
        painting.paint_animal(image, mask, 1 + number, species, "plain", grey, centre, unit, rng)
        y, x = np.nonzero(mask)
        assert set(mask[y, x]) == {1 + number} and len(y) > 20
        assert 0.5 * unit < x.mean() < W - 0.5 * unit and 0.5 * unit < y.mean() < H - 0.5 * unit


@pytest.mark.parametrize("kind", COATS)
def test_a_coat_has_both_colours(kind):
    field = painting.coat_field(kind, np.random.default_rng(3), 60, 84, 30.0)
    assert field.shape == (60, 84) and field.min() >= 0 and field.max() <= 1
    assert field.max() - field.min() > 0.25


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"among": []}, r"among is \[\]; allowed: at least one of 0\.\.23"),
        ({"among": [3, 24]}, r"among is \[3, 24\]; allowed: at least one of 0\.\.23"),
        ({"height": 12}, "12 x 160 pixels is too small; allowed: 16 x 16"),
        ({"width": 15}, "128 x 15 pixels is too small"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, words):
    with pytest.raises(ToCoError, match=words):
        draw_scene(np.random.default_rng(0), **wrong)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"n_train": 0}, {"n_val": 0}, {"n_test": -2}])
def test_a_bad_config_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ToCoError, match=f"{name} is {wrong[name]}; allowed: a whole number, at least"):
        ScenesConfig(**wrong)


def test_the_palette_is_vocs():
    known = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
        15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert {label: tuple(palette[label].tolist()) for label in known} == known


# ---- the folder


def test_the_same_seed_gives_the_same_bytes(folder, cache):
    again = scenes_folder(SMALL, progress=False)
    assert again != folder and again.name == folder.name
    assert contents(again) == contents(folder)


def test_another_seed_gives_other_images(folder, cache):
    other = scenes_folder(ScenesConfig(seed=4, n_train=2, n_val=1, n_test=1), progress=False)
    ours, theirs = contents(folder), contents(other)
    images = [name for name in theirs if name.endswith((".jpg", ".png"))]
    assert len(images) == 2 * 4 and all(ours[name] != theirs[name] for name in images)


def test_parts_share_no_image(folder):
    assert len(set(contents(folder / "JPEGImages").values())) == 6 + 3 + 2


def test_more_images_leave_the_first_as_they_are():
    """A scene follows from seed, part and place, not from how many there are."""
    one, other = ScenesConfig(seed=3, n_train=1, n_val=1, n_test=1), SMALL
    np.testing.assert_array_equal(scenes.scene_of(one, "val", 2).image, scenes.scene_of(other, "val", 2).image)


def test_the_reader_of_voc_folders_reads_every_part(folder):
    for split, n in (("train", 6), ("val", 3), ("test", 2)):
        part = VOCFolder(folder, split)
        report = part.check(progress=False)
        assert report.n_images == report.n_masks == n == len(part)
        assert report.class_names == part.class_names == CLASS_NAMES
        assert report.class_source == "classes.txt" and report.label_source == "masks"
        assert report.n_without_class == 0
        assert 0.005 < report.void_share < 0.2
        assert part.image_labels.shape == (n, 8) and part.image_labels.any(axis=1).all()
        for i in range(n):
            assert part.image(i).shape[:2] == part.mask(i).shape
            assert part.image(i).shape[:2] in [(128, 160), (160, 128)]
    assert not open_train_val(folder).held_out


def test_both_orientations_and_all_species_occur():
    drawn = [scenes.scene_of(ScenesConfig(), "train", i) for i in range(24)]
    assert {scene.mask.shape for scene in drawn} == {(128, 160), (160, 128)}
    assert set(np.concatenate([np.unique(scene.mask) for scene in drawn])) == {*range(9), 255}


def test_masks_are_palette_images_in_vocs_colours(folder):
    with Image.open(folder / "SegmentationClass" / "val_00001.png") as mask:
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette())


def test_a_finished_folder_is_not_drawn_again(folder, monkeypatch):
    monkeypatch.setenv("TOCO_CACHE", str(folder.parent))
    monkeypatch.setattr(scenes, "write_scenes", None)
    assert scenes_folder(SMALL, progress=False) == folder


# ---- where and when it is written


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("TOCO_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "toco"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "toco"


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ToCoError, match=r"cannot be written to .*below: .*set TOCO_CACHE"):
        scenes_folder(SMALL, progress=False)


def test_an_error_while_drawing_leaves_nothing(cache, monkeypatch):
    def fails(config, split, index):
        if (split, index) == ("val", 1):
            raise RuntimeError("the lamp went out")
        return draw_scene(np.random.default_rng(0), 16, 16)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "scene_of", fails)
        with pytest.raises(RuntimeError, match="the lamp went out"):
            scenes_folder(SMALL, progress=False)
    assert list(cache.iterdir()) == []


def test_a_killed_drawing_is_not_taken_for_whole(cache):
    code = (
        "from toco_core.data.scenes import ScenesConfig, scenes_folder\n"
        "scenes_folder(ScenesConfig(seed=3, n_train=100_000), progress=False)"
    )
    drawing = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(cache.rglob("*.png")) and time.monotonic() < deadline and drawing.poll() is None:
        time.sleep(0.05)
    drawing.kill()
    drawing.wait()
    assert list(cache.rglob("*.png"))  # it was on its way
    assert not list(cache.rglob("scenes.json"))
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_a_folder_without_its_manifest_is_drawn_anew(cache, monkeypatch):
    monkeypatch.setattr(scenes, "write_scenes", fill_with_marks)
    root = scenes_folder(SMALL, progress=False)
    (root / "scenes.json").unlink()
    (root / "left").write_text("")
    assert scenes_folder(SMALL, progress=False) == root
    assert sorted(path.name for path in root.iterdir()) == ["scenes.json", "started"]


def test_the_slower_of_two_drawings_leaves_the_faster_ones_folder(cache, monkeypatch):
    """While this one draws, another process finishes: readers may be at its files already."""

    def slow(root, config, *, progress):
        monkeypatch.setattr(scenes, "write_scenes", fill_with_marks)
        faster = scenes_folder(config, progress=False)
        (faster / "reader").write_text("")
        fill_with_marks(root, config)

    monkeypatch.setattr(scenes, "write_scenes", slow)
    root = scenes_folder(SMALL, progress=False)
    assert (root / "reader").is_file()
    assert list(cache.iterdir()) == [root]


def test_two_processes_at_once(cache):
    code = (
        "from toco_core.data.scenes import ScenesConfig, scenes_folder\n"
        "print(scenes_folder(ScenesConfig(seed=9, n_train=2, n_val=1, n_test=1), progress=False))"
    )
    command = [sys.executable, "-c", code]
    drawings = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (drawing.communicate(timeout=120)[0].strip() for drawing in drawings)
    assert one == other and list(cache.iterdir()) == [Path(one)]
    assert VOCFolder(one, "train").check(progress=False).n_images == 2
