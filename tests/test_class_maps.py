import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from small_config import stir, stirred_named
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close
from voc_folder import CLASSES, smooth_image

import toco_core
from toco_core.cam import multi_scale_cam
from toco_core.data import read_image, to_unit
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.predict.class_maps import cams, open_classifier, relevance
from toco_core.predict.label import label_photographs


@pytest.fixture(scope="module")
def opened():
    return stirred_named(CLASSES)


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    return open_classifier("vit_tiny_patch16_224", pretrained=False, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "sheep.png"
    Image.fromarray(smooth_image(26, 41, 5)).save(path)
    return path


def test_the_package_is_light_until_cams_is_asked_for():
    code = "import sys, toco_core; assert not {'torch', 'cv2', 'timm'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert toco_core.cams is cams
    with pytest.raises(AttributeError, match="no attribute 'camms'"):
        _ = toco_core.camms


def test_maps_of_a_run_are_its_cams_and_the_label_is_the_one_that_is_written(opened, photo, tmp_path):
    image = np.asarray(Image.open(photo))
    found = cams(photo, opened, classes=["sheep", "cat"])
    images = opened.model.normalise(to_unit(torch.from_numpy(resize(image, 32, 32)).permute(2, 0, 1)[None]))
    cam = multi_scale_cam(opened.model, images, scales=(1.0, 0.5)).cam
    cam = F.interpolate(cam, size=(26, 41), mode="bilinear", align_corners=False)[0].numpy()
    assert list(found.maps) == ["sheep", "cat"] and found.names == ("background", "sheep", "cat")
    np.testing.assert_allclose(found.maps["sheep"], cam[2], atol=1e-5)
    np.testing.assert_allclose(found.maps["cat"], cam[0], atol=1e-5)
    probability = opened.model(images).class_logits[0].sigmoid().tolist()
    assert_close([found.scores[name] for name in CLASSES[1:]], probability, atol=1e-5, rtol=0)
    assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
    tags = tmp_path / "photos" / "tags.csv"
    tags.parent.mkdir()
    (tags.parent / "sheep.png").write_bytes(photo.read_bytes())
    tags.write_text("file,tags\nsheep.png,cat;sheep\n")
    written = label_photographs(opened, tags, tmp_path / "out", overlays=False, progress=False).folder
    label = np.asarray(Image.open(written / "SegmentationClass" / "sheep.png"))
    slots = np.zeros(256, np.uint8)
    slots[[1, 3, 255]] = 2, 1, 255
    np.testing.assert_array_equal(found.label, slots[label])
    assert len(np.unique(label)) > 2
    assert "sheep 0." in repr(found) and "26 x 41 by mine" in repr(found)


def test_a_class_that_is_named_twice_counts_once(opened, head, photo):
    """Else the label's numbers are not those of `names`. A synonym is the same class, too."""
    once, twice = (cams(photo, opened, classes=names) for names in (["cat", "dog"], ["cat", "cat", "dog"]))
    assert twice.names == once.names == ("background", "cat", "dog") and 2 in once.label
    np.testing.assert_array_equal(twice.label, once.label)
    synonyms = cams(photo, head, classes=["tup", "ram", "goldfish"])
    assert len(synonyms.names) == 3 and set(np.unique(synonyms.label)) <= {0, 1, 2, 255}


def test_the_threshold_chooses_the_classes_and_none_leaves_the_label_empty(opened, photo):
    scores = cams(photo, opened).scores
    ordered = list(scores)
    between = (scores[ordered[1]] + scores[ordered[2]]) / 2
    assert list(cams(photo, opened, threshold=between).maps) == ordered[:2]
    none = cams(np.asarray(Image.open(photo)), opened, threshold=1.0)
    assert list(none.maps) == ordered[:1] and not none.label.any()


def test_the_picture(opened, photo, tmp_path):
    found = cams(Image.open(photo).convert("RGBA"), opened, classes="dog")
    picture = found.picture(height=60)
    assert picture.dtype == np.uint8 and picture.shape == (60 + 22, 3 * 95 + 2 * 6, 3)
    np.testing.assert_array_equal(picture[22:, :95], resize(found.image, 60, 95))
    assert found._repr_png_().startswith(b"\x89PNG")
    assert Image.open(found.save(tmp_path / "a.png")).size[1] == 322
    with pytest.raises(ToCoError, match="a.txt' cannot be written"):
        found.save(tmp_path / "a.txt")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "I;16"])
@pytest.mark.parametrize("turn", [1, 3, 6])
def test_a_picture_of_pil_is_seen_as_its_file(opened, tmp_path, mode, turn):
    """16-bit grey was white, and what its camera wants turned lay on its side."""
    pixels = smooth_image(13, 21, 8)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 77)
    else:
        picture = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as again:
        assert again.mode == mode
        found = cams(again, opened).image
    np.testing.assert_array_equal(found, read_image(tmp_path / "a.png"))
    assert found.shape == ((21, 13, 3) if turn == 6 else (13, 21, 3)) and len(np.unique(found)) > 1


def test_pictures_of_pil_that_have_no_pixels_in_rgb_are_told(opened, photo, tmp_path):
    for mode in ("I", "F"):
        with pytest.raises(ToCoError, match=f"photograph has mode '{mode}' of PIL, .*: RGB, L or I;16 is wanted"):
            cams(Image.new(mode, (9, 7)), opened)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:200])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ToCoError, match="photograph cannot be decoded: "):
        cams(cut, opened)


def test_an_imagenet_head_gives_named_maps(head, photo, tmp_path):
    found = cams(photo, head, classes=["tup", "goldfish"])
    assert [name.split(",")[0] for name in found.maps] == ["ram", "goldfish"]
    assert len(found.scores) == 1000 and abs(sum(found.scores.values()) - 1) < 1e-4
    for values in found.maps.values():
        assert values.shape == (26, 41) and values.min() >= 0 and 0.5 < values.max() <= 1
    file = tmp_path / "weights.safetensors"
    save_file(head.model.state_dict(), file)
    again = cams(photo, "vit_tiny_patch16_224", weights=file, classes=list(found.maps), device="cpu")
    for name, values in found.maps.items():
        np.testing.assert_array_equal(again.maps[name], values)
    assert len(cams(photo, head, threshold=0.0).maps) == 3
    body = {name: value for name, value in head.model.state_dict().items() if not name.startswith("head.")}
    save_file(body, tmp_path / "body.safetensors")
    with pytest.raises(ToCoError, match="head"):
        open_classifier("vit_tiny_patch16_224", weights=tmp_path / "body.safetensors")


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_relevance_by_differences(pool):
    """Gradients by moving each number of each attention, maps by loops."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, global_pool=pool
    ).double().eval()  # fmt: skip
    stir(vit, 0.5)
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    for block in vit.blocks:
        block.attn.fused_attn = False
    attentions = []
    hooks = [b.attn.attn_drop.register_forward_hook(lambda m, i, o: attentions.append(o.clone())) for b in vit.blocks]
    with torch.no_grad():
        vit(images)
    for hook in hooks:
        hook.remove()
    total, T, e = torch.eye(7, dtype=torch.float64), 7, 1e-5

    def score(l, where, step):
        def moved(m, i, o):
            o = o.clone()
            o[where] += step
            return o

        hook = vit.blocks[l].attn.attn_drop.register_forward_hook(moved)
        with torch.no_grad():
            value = vit(images)[0, 2]
        hook.remove()
        return value

    for l, attention in enumerate(attentions):
        mean = torch.zeros(T, T, dtype=torch.float64)
        for h, i, j in np.ndindex(2, T, T):
            slope = (score(l, (0, h, i, j), e) - score(l, (0, h, i, j), -e)) / (2 * e)
            mean[i, j] += max(0.0, float(attention[0, h, i, j] * slope)) / 2
        total = total + mean @ total
    row = total[0, 1:] if pool == "token" else total[1:, 1:].mean(0)
    found = relevance(vit, images, [1, 2])
    assert found.shape == (2, 2, 3)
    assert_close(found[1], (row / row.max()).view(2, 3), atol=1e-6, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3 and not any(p.grad is not None for p in vit.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/run"}, "run = 'no/run' is not there: allowed are a run's folder, a shipped run"),
        ({"model": "vit_tinny_patch16_224"}, "'vit_tinny_patch16_224' is not known: did you mean vit_tiny_patch16_224"),
        ({"model": "scenes_vit_nano"}, "'scenes_vit_nano' has no head that knows classes"),
        ({"classes": ["shep"]}, "there is no class 'shep': did you mean sheep"),
        ({"threshold": 3}, "threshold = 3 is not allowed: 0 to 1"),
        ({"photograph": "gone.jpg"}, "gone.jpg"),
        ({"photograph": np.zeros((4, 4))}, r"photograph is float64 \(4, 4\): uint8 of H x W x 3 is wanted"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(opened, photo, options, message):
    with pytest.raises(ToCoError, match=message) as told:
        cams(**({"photograph": photo, "model": opened} | options))
    assert "\n" not in str(told.value)
