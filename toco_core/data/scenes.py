"""The embedded data set: a paper zoo, drawn by this module, deterministic from a seed.

Eight species live in five habitats (`world.species`). **Only the head tells the species for certain**: build, colours
and coat are usual, one animal in four wears another's colours or coat, and stones and bushes wear them, too. Habitats
are a hint that misleads: elephants, giraffes and lions are mostly met in the savanna, and often together, as horse and
person are in PASCAL VOC. A classifier may therefore look at an antler, a coat or the grass while the mask is the whole
animal: the situation in which class activation maps fall short and for which token contrast was made. Animals hide each
other, grass hides animals, and masks have a rim of 255 (void) as VOC's do.

    root = scenes_folder()                  # written once, in VOC layout, to a cache folder
    scene = draw_scene(np.random.default_rng(1))
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from toco_core.conventions import voc_palette
from toco_core.errors import ToCoError
from toco_core.machine.locks import alone
from toco_core.machine.writing import remove_parts, whole_folder

from .world.painting import backdrop, coat_colours, noise, paint_animal, paint_foreground, species_for
from .world.species import COATS, HABITATS, N_CLASSES, NAMES, SPECIES

VERSION = 3
"""Raised whenever the drawing changes, so that a cached folder of an older drawing is not taken for this one."""

CLASS_NAMES = ("background", *NAMES[:N_CLASSES])
VOID = 255
SUPERSAMPLE = 2
HEIGHT, WIDTH = 128, 160


class Animal(NamedTuple):
    """What one animal of a scene is and wears: an index into SPECIES, one into COATS, and whose colours it has."""

    species: int
    coat: int
    colours: int


class Scene(NamedTuple):
    """A picture: `image` uint8 H W 3 (RGB), `mask` uint8 H W with 0..8 and 255 = void, its animals and its habitat."""

    image: np.ndarray
    mask: np.ndarray
    animals: tuple[Animal, ...]
    habitat: str


def draw_scene(
    rng: np.random.Generator,
    height: int = HEIGHT,
    width: int = WIDTH,
    *,
    n_species: int | None = None,
    n_animals: int | None = None,
    among: Sequence[int] = tuple(range(N_CLASSES)),
    body: tuple[float, float] = (0.14, 0.24),
    usual: float = 0.75,
    loyalty: float = 6.0,
) -> Scene:
    """Draw one scene.

    Args:
        rng: all randomness; the same state gives the same scene.
        height, width: of the picture in pixels.
        n_species: how many species are mixed; by default one, in two scenes of five two or three.
        n_animals: how many animals; by default as many as species or one more. 0: an empty habitat.
        among: indices into `SPECIES` to draw from; the mask has 1 + index.
        body: half the body length as a fraction of the longer side, lowest and highest.
        usual: the chance that an animal wears its species' colours rather than any, and the same for its coat.
        loyalty: so many times as likely as others are the species that are at home in the scene's habitat.
    """
    if height < 16 or width < 16:
        raise ToCoError(f"a scene of {height} x {width} pixels is too small; allowed: 16 x 16 and more")
    if not among or not all(0 <= i < len(SPECIES) for i in among):
        raise ToCoError(f"among is {list(among)}; allowed: at least one of 0..{len(SPECIES) - 1}")
    habitat = HABITATS[rng.integers(len(HABITATS))]
    back, horizon = backdrop(height, width, habitat, rng)
    H, W = height * SUPERSAMPLE, width * SUPERSAMPLE
    image, mask = cv2.resize(back, (W, H), interpolation=cv2.INTER_CUBIC), np.zeros((H, W), np.uint8)
    if n_species is None:
        n_species = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    chosen = species_for(habitat, rng, min(n_species, len(among)), among, loyalty)
    n = len(chosen) + int(rng.random() < 0.4) if n_animals is None else n_animals
    places: list[tuple[float, float]] = []
    for _ in range(n):
        tries = [(rng.uniform(0.18, 0.82) * W, rng.uniform(0.42, 0.78) * H) for _ in range(8)]
        room = [min((np.hypot(x - a, y - b) for a, b in places), default=0.0) for x, y in tries]
        places.append(tries[int(np.argmax(room[:5]))])
    animals = []
    for i, place in enumerate(sorted(places, key=lambda at: at[1])):  # from back to front
        species = chosen[i % len(chosen)]
        wears = species if rng.random() < usual else int(rng.integers(len(SPECIES)))
        coat = SPECIES[species].coat if rng.random() < usual else COATS[rng.integers(len(COATS))]
        unit = rng.uniform(*body) * max(H, W) * (0.82 if n > 2 else 1.0)
        colours = coat_colours(SPECIES[wears], rng)
        paint_animal(image, mask, 1 + species, SPECIES[species], coat, colours, place, unit, rng)
        animals.append(Animal(species, COATS.index(coat), wears))
    paint_foreground(image, mask, habitat, rng)
    return Scene(*_finished(image, mask, rng), tuple(animals), habitat)


def _finished(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """From the supersampled canvas to the picture, with light, a little sensor noise and the void rim."""
    H, W = mask.shape[0] // SUPERSAMPLE, mask.shape[1] // SUPERSAMPLE
    small = cv2.resize(image, (W, H), interpolation=cv2.INTER_AREA)
    labels = mask[SUPERSAMPLE // 2 :: SUPERSAMPLE, SUPERSAMPLE // 2 :: SUPERSAMPLE].copy()
    glow = (0.88 + 0.24 * noise(rng, H, W, 2)) * rng.uniform(0.88, 1.08)
    small = small * glow[..., None] + rng.normal(0, 3, (H, W, 1)).astype(np.float32)
    kernel = np.ones((3, 3), np.uint8)
    labels[cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)] = VOID
    return np.clip(np.round(small), 0, 255).astype(np.uint8), labels


# ---- the data set on disk


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """What is written to disk. Two equal configs give byte-identical folders on one machine."""

    seed: int = 0
    """Seed of the whole data set."""
    n_train: int = 640
    """Images of the train part."""
    n_val: int = 160
    """Images of the val part, for choices such as the threshold."""
    n_test: int = 240
    """Images of the test part, for the reported numbers only."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (0 if name == "seed" else 1):
                raise ToCoError(f"{name} is {value!r}; allowed: a whole number, at least {0 if name == 'seed' else 1}")


def scene_of(config: ScenesConfig, split: str, index: int) -> Scene:
    """Scene `index` of a part: two thirds are 128 x 160, the others 160 x 128."""
    rng = np.random.default_rng([VERSION, config.seed, ("train", "val", "test").index(split), index])
    return draw_scene(rng, *((HEIGHT, WIDTH) if rng.random() < 2 / 3 else (WIDTH, HEIGHT)))


def cache_folder() -> Path:
    """Where generated data is kept: `$TOCO_CACHE`, else `$XDG_CACHE_HOME/toco`, else `~/.cache/toco`."""
    if os.environ.get("TOCO_CACHE"):
        return Path(os.environ["TOCO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toco"


def scenes_folder(config: ScenesConfig | None = None, *, progress: bool = True) -> Path:
    """The folder of the embedded data set; it is drawn first where it is not there yet.

    The folder is drawn beside its final place and renamed when complete, so an interrupted drawing is never mistaken
    for a finished one, and two processes that draw at the same time do not disturb each other. Raises ToCoError where
    the cache folder cannot be written.
    """
    config = config or ScenesConfig()
    name = _folder_name(config)
    root = cache_folder() / name
    if os.path.isfile(root / "scenes.json"):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with alone(root, "draws", tell=progress):
            if not os.path.isfile(root / "scenes.json"):  # the process that was waited for may have drawn it
                remove_parts(root.parent, f".{name}-*")
                if root.exists():  # left without its manifest: not ours to trust
                    shutil.rmtree(root)
                with whole_folder(root) as work:
                    write_scenes(work, config, progress=progress)
    except OSError as error:
        if not os.path.isfile(root / "scenes.json"):  # otherwise another user was faster, whose folder is the same
            raise ToCoError(
                f"the embedded data set cannot be written to {root.parent}: {error.strerror or error}; "
                "set TOCO_CACHE to a folder that can be"
            ) from error
    return root


def drawing_of(root: Path | str | None) -> str | None:
    """The version and numbers of the drawing where `root` is a finished folder of `scenes_folder`; None elsewhere."""
    if root is None or Path(root).parent.resolve() != cache_folder().resolve():
        return None
    try:
        values = json.loads((Path(root) / "scenes.json").read_text())
        version, name = values.pop("version"), _folder_name(ScenesConfig(**values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ToCoError):
        return None
    return name if version == VERSION and Path(root).name == name else None


def _folder_name(config: ScenesConfig) -> str:
    return f"scenes-v{VERSION}-seed{config.seed}-{config.n_train}-{config.n_val}-{config.n_test}"


def write_scenes(root: Path, config: ScenesConfig, *, progress: bool = True) -> None:
    """Write all parts in VOC layout; `scenes.json` comes last and says what was written."""
    from PIL import Image
    from tqdm import tqdm

    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    palette = voc_palette().tobytes()

    def write(job: tuple[str, int]) -> None:
        split, index = job
        scene = scene_of(config, split, index)
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{split}_{index:05d}.jpg", quality=95)
        mask = Image.fromarray(scene.mask, mode="P")
        mask.putpalette(palette)
        mask.save(root / "SegmentationClass" / f"{split}_{index:05d}.png")

    parts = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
    jobs = [(split, i) for split, n in parts.items() for i in range(n)]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for _ in tqdm(
            pool.map(write, jobs), total=len(jobs), desc="drawing the scenes", disable=not progress, file=sys.stdout
        ):
            pass
    for split, n in parts.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            "".join(f"{split}_{i:05d}\n" for i in range(n))
        )
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (root / "scenes.json").write_text(json.dumps({"version": VERSION, **asdict(config)}, indent=2) + "\n")
