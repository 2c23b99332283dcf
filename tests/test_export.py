import json
import shutil
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_folder import write_images
from PIL import Image
from pycocotools import mask as pycoco
from small_config import labelling_config, stir
from torch.testing import assert_close
from voc_folder import SIZES, smooth_image, write_list, write_voc_folder

import toco_core.__main__ as toco
import toco_core.predict.export as exporting
from toco_core.analysis.label_quality import cams_of_split, crf_of
from toco_core.analysis.second_stage import crop_with_mask, train_segmentation
from toco_core.config import field_sections, override
from toco_core.conventions import voc_palette
from toco_core.data import VOC_CLASSES, COCOFolder, VOCFolder, open_source
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate, look
from toco_core.machine.writing import writing
from toco_core.model import ToCo
from toco_core.predict.export import METHODS, LabelMethod, export, label_maps, palette_png, place_image, voc_archive
from toco_core.runs.folder import weights_hash
from toco_core.runs.shipped import shipped_runs

K = 3
LABELS = {"img_0": [1, 0, 1], "img_1": [0, 1, 0], "img_2": [1, 1, 1], "img_3": [0, 0, 0], "img_4": [0, 1, 1]}


@pytest.fixture(scope="module")
def config():
    return labelling_config()


@pytest.fixture(scope="module")
def model(config, source):
    """Far from its start, and without the mean of the decoder's features: labels are not the same everywhere."""
    torch.manual_seed(1)
    model = ToCo(config.model, K)
    stir(model, 0.3)
    features = []
    hook = model.decoder.conv8.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        for i in range(5):
            image = torch.from_numpy(resize(source.image(i), 32, 32)).permute(2, 0, 1)[None]
            model(model.normalise(image.float() / 255))
        mean, weight = F.normalize(torch.stack(features).mean(0), dim=0), model.decoder.conv8.weight[:, :, 0, 0]
        model.decoder.conv8.weight[:, :, 0, 0] = 3 * (weight - (weight @ mean)[:, None] * mean)
    hook.remove()
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return VOCFolder(write_voc_folder(tmp_path_factory.mktemp("voc") / "voc", n=5), "train", labels=LABELS)


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_a_data_set_and_its_coco_file_says_the_same(model, source, config, tmp_path, method):
    found = export(model, source, tmp_path / "out", config, method=method, progress=False)
    assert (found.n_images, found.n_new) == (5, 5) and abs(sum(found.pixels.values()) + found.ignored - 1) < 1e-9
    back = open_source(tmp_path / "out", "train")
    assert isinstance(back, VOCFolder) and back.names == source.names and back.class_names == source.class_names
    report = back.check()
    assert report.n_masks == 5 and report.n_images == 5
    coco = COCOFolder(tmp_path / "out" / "annotations" / "instances_train.json", unlabelled=True)
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    for entry in content["annotations"]:
        rle = entry["segmentation"] | {"counts": entry["segmentation"]["counts"].encode()}
        assert entry["bbox"] == pycoco.toBbox(rle).tolist() and entry["area"] == pycoco.area(rle)
    shares = np.zeros(256)
    for i in range(5):
        mask = back.mask(i)
        np.testing.assert_array_equal(back.image(i), source.image(i))
        np.testing.assert_array_equal(coco.mask(i), mask)
        shares += np.bincount(mask.ravel(), minlength=256)
        if not method.startswith("seg"):
            present = {k + 1 for k in range(K) if LABELS[source.names[i]][k]}
            assert set(np.unique(mask)) <= {0, *present} | ({255} if method in ("par", "crf") else set())
    assert len(np.unique(np.concatenate([back.mask(i).ravel() for i in range(5)]))) > 1
    assert_close(found.ignored, shares[255] / shares.sum())
    assert (shares[255] > 0) == (method in ("par", "crf"))


def test_a_method_whose_head_was_not_trained_is_refused(model, source, config, tmp_path):
    """The label maps were noise."""
    without_decoder, without_classifier = override(config, seg=0.0), override(config, cls=0.0)
    for method in METHODS:
        lacking = without_decoder if method.startswith("seg") else without_classifier
        with pytest.raises(ToCoError, match=f"method = '{method}' needs the (decoder|classifier), whose loss"):
            export(model, source, tmp_path / "x", lacking, method=method, progress=False)
    with pytest.raises(ToCoError, match="has weight 0 in this model: allowed is none"):
        export(model, source, tmp_path / "x", override(without_decoder, cls=0.0), progress=False)
    assert not (tmp_path / "x").exists()
    made = export(model, source, tmp_path / "seg", without_classifier, progress=False).folder
    assert json.loads((made / "manifest.json").read_text())["settings"]["method"] == "seg"


def test_runs_with_a_classifier_are_labelled_by_par_where_no_method_is_given(config):
    for one in (config, *(run.config() for run in shipped_runs().values())):
        assert LabelMethod.of(None, one) == LabelMethod.of("par", one)
        assert LabelMethod.of("seg", one).name == "seg"


def test_a_class_called_ignored_keeps_its_share(model, source, config, tmp_path):
    """That of 255 stood in its place."""
    other = export(model, source, tmp_path / "other", config, images="none", progress=False)
    most = max(source.class_names[1:], key=other.pixels.get)
    own = source.subset(range(5))
    own.class_names = tuple("ignored" if name == most else name for name in source.class_names)
    found = export(model, own, tmp_path / "own", config, images="none", progress=False)
    assert found.pixels["ignored"] == other.pixels[most] > 0 and found.ignored == other.ignored > 0
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert (manifest["pixels"], manifest["ignored"]) == (found.pixels, found.ignored)


def test_labels_are_those_that_look_shows_and_evaluate_scores(model, source, config, tmp_path):
    """Exported label maps, scored as predictions, give evaluate's numbers."""
    looks = [look(model, source, i, config) for i in range(5)]
    par = export(model, source, tmp_path / "par", config, method="par", progress=False)
    seg = export(model, source, tmp_path / "seg", config, method="seg", progress=False)
    for i, seen in enumerate(looks):
        np.testing.assert_array_equal(VOCFolder(par.folder, "train").mask(i), seen.pseudo_label)
        np.testing.assert_array_equal(VOCFolder(seg.folder, "train").mask(i), seen.segmentation)
    export(model, source, tmp_path / "cam", config, method="cam", progress=False)
    export(model, source, tmp_path / "crf", config, method="seg_crf", crf={"iterations": 4}, progress=False)
    scored = evaluate(model, source, size=32, scales=(1.0, 0.5), crf={"iterations": 4}, progress=False)
    assert_close(slow_miou(source, tmp_path / "cam"), scored.cam.scores(0.4).miou)
    assert_close(slow_miou(source, tmp_path / "crf"), scored.seg.miou)


def slow_miou(source, folder):
    """Mean over the classes of the ground truth, pixels one by one."""
    made = VOCFolder(folder, "train")
    pairs = [(int(t), int(p)) for i in range(5) for t, p in zip(source.mask(i).flat, made.mask(i).flat, strict=True)]
    pairs = [(t, p) for t, p in pairs if t != 255]
    classes = sorted({t for t, _ in pairs})
    ious = [sum(t == c == p for t, p in pairs) / sum(t == c or p == c for t, p in pairs) for c in classes]
    return sum(ious) / len(ious)


def test_cam_and_crf_is_one_label(model, source, config, tmp_path):
    """What is judged as "dense CRF" is what is written as "crf"."""
    settings = {"iterations": 4, "appearance_sigma_rgb": 30.0}
    export(model, source, tmp_path / "out", config, method="crf", crf=settings, progress=False)
    written = VOCFolder(tmp_path / "out", "train")
    judged = [crf_of(item, config.labels, **settings) for item in cams_of_split(model, source, config)]
    for i in range(5):
        np.testing.assert_array_equal(written.mask(i), judged[i])
    assert {0, 255} < set(np.unique(np.concatenate([label.ravel() for label in judged])))


def test_an_interrupted_export_goes_on(model, source, config, tmp_path, monkeypatch):
    whole = export(model, source, tmp_path / "whole", config, progress=False)
    write = exporting.write_label
    made = []

    def failing(path, label):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, label)

    monkeypatch.setattr(exporting, "write_label", failing)
    with pytest.raises(KeyboardInterrupt):
        export(model, source, tmp_path / "cut", config, progress=False)
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert not manifest["finished"] and not (tmp_path / "cut" / "classes.txt").exists()
    monkeypatch.setattr(exporting, "write_label", write)
    rest = export(model, source, tmp_path / "cut", config, progress=False)
    assert rest.n_new == 3 and rest.pixels == whole.pixels
    for path in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path
    assert not list(tmp_path.rglob("*.part"))
    assert export(model, source, tmp_path / "cut", config, progress=False).n_new == 0


def test_the_manifest_says_what_made_the_labels(model, source, config, tmp_path):
    import hashlib

    export(model, source, tmp_path / "out", config, method="crf", split="mine", progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["finished"] and manifest["split"] == "mine"
    settings = manifest["settings"]
    assert (settings["method"], settings["beta_h"], settings["size"], settings["cam_scales"]) == (
        "crf",
        0.6,
        32,
        [1, 0.5],
    )
    assert settings["crf"]["iterations"] == 10 and settings["weights"] == weights_hash(model)
    for name, digest in manifest["sha256"].items():
        png = (tmp_path / "out" / "SegmentationClass" / f"{name}.png").read_bytes()
        assert digest == hashlib.sha256(png).hexdigest()
    assert VOCFolder(tmp_path / "out", "mine").names == source.names


def test_other_settings_or_other_content_are_not_mixed(model, source, config, tmp_path):
    export(model, source, tmp_path / "out", config, method="cam", progress=False)
    with pytest.raises(ToCoError, match="holds an export with another beta: choose a new folder"):
        export(model, source, tmp_path / "out", config, method="cam", beta=0.2, progress=False)
    with pytest.raises(ToCoError, match="holds an export with another .*method"):
        export(model, source, tmp_path / "out", config, method="seg", progress=False)
    other = ToCo(config.model, K)
    with pytest.raises(ToCoError, match="holds an export with another weights"):
        export(other, source, tmp_path / "out", config, method="cam", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ToCoError, match="full is not empty and holds no export"):
        export(model, source, tmp_path / "full", config, progress=False)
    (tmp_path / "full" / "manifest.json").write_text("[]")
    with pytest.raises(ToCoError, match="is not the manifest of an export"):
        export(model, source, tmp_path / "full", config, progress=False)


@pytest.mark.parametrize(
    ("method", "name", "known"),
    [
        ("par", "beta", "its thresholds are beta_l and beta_h"),
        ("vote", "beta_h", "its thresholds are beta"),
        ("seg", "beta_l", "it has no thresholds"),
        ("cam", "lr", "its thresholds are beta"),
    ],
)
def test_a_threshold_that_a_method_does_not_have_is_refused(model, source, config, tmp_path, method, name, known):
    """It was passed over: `toco export run labels --beta 0.3` wrote the labels of par."""
    with pytest.raises(ToCoError, match=f"{name} = 0.3 is not allowed with method = '{method}': {known}$"):
        export(model, source, tmp_path / "out", config, method=method, progress=False, **{name: 0.3})
    assert not (tmp_path / "out").exists()


OTHERS = {  # what is no switch
    "backbone": "plain_vit(image=32, patch=8, width=32, depth=3, heads=4, mlp=64)", "layer": 3, "pooling": "mean",
    "aux_pooling": "mean", "decoder_dilation": 2, "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7), "crop_size": 40,
    "beta_l": 0.2, "beta_h": 0.9, "beta": 0.6, "cam_scales": (2.0,), "seg_scales": (0.5,), "attention_steps": 3,
    "attention_blocks": (1,), "attention_kind": "pattern", "par_iterations": 1, "par_dilations": (4,),
    "par_scale": 1.0, "refiner": "none", "precision": "bf16", "seed": 3, "workers": 0, "pretrained": False,
    "class_tokens_after": 2, "class_attention": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_whatever_of_a_config_moves_a_label_is_in_its_settings(model, source, config, method):
    """Label maps of other scales, of another PAR, of another decoder were taken for today's."""
    config, part = override(config, attention_steps=1, attention_blocks=(2,)), source.subset([0, 2])
    config = override(config, seg_scales=(1.0, 0.5), class_tokens_after=1, class_tokens=1.0, class_attention=0.5)
    how = LabelMethod.of(method, config, {"iterations": 2})

    def made(config):
        torch.manual_seed(4)
        changed = ToCo(config.model, K, dropped_border=config.release.dropped_border)
        own = {name: value for name, value in changed.state_dict().items() if name.startswith("class_tokens.")}
        changed.load_state_dict(model.state_dict() | own)
        maps = [label.tobytes() for _, label in label_maps(changed.eval(), part, config, how)]
        return maps, json.loads(json.dumps(how.settings(changed, config)))

    (maps, settings), movers = made(config), set()
    for name, section in field_sections().items():
        before = getattr(getattr(config, section) if section else config, name)
        if section in ("model", "labels", "data", "release", "") and (name in OTHERS or isinstance(before, bool)):
            changed, others = made(override(config, **{name: OTHERS.get(name, not before)}))
            if changed != maps:
                movers.add(name)
                assert others != settings, name
    of_class_tokens = {"class_tokens_after", "class_attention"}
    network = {"backbone", "mean", "std", "crop_size", "dropped_border"}
    own = {
        "cam": {"beta", "cam_scales", "attention_steps", "attention_blocks", "attention_kind", *of_class_tokens},
        "par": {"beta_l", "beta_h", "cam_scales", "par_iterations", "par_dilations", "par_scale"},
        "crf": {"beta_l", "beta_h", "cam_scales"},
        "vote": {"beta", "cam_scales", "par_iterations", "par_dilations", "par_scale", "decoder_dilation"},
        "seg": {"seg_scales", "max_over_scales", "decoder_dilation"},
        "seg_crf": {"seg_scales", "max_over_scales", "decoder_dilation"},
    }
    assert own[method] <= movers and len(network & movers) > 2, movers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method = 'magic' is not allowed: one of cam, par, crf, vote, seg, seg_crf"),
        ({"images": "move"}, "images = 'move' is not allowed: one of copy, link, none"),
        ({"beta": 1.5}, "beta = 1.5 is not allowed"),
        ({"method": "crf", "crf": {"steps": 3}}, "crf has no setting 'steps'"),
        ({"method": "seg_crf", "crf": False}, "needs a CRF"),
        ({"split": "../../../../escaped"}, "split: '../../../../escaped' is not a name inside the lists of splits"),
        ({"split": "a\nb"}, "split: split 'a.*b' is not allowed: a plain name is wanted"),
        ({"parts": {"a/b": ["img_0"]}}, "split: split 'a/b' is not allowed: a plain name is wanted"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(model, source, config, tmp_path, options, message):
    with pytest.raises(ToCoError, match=message):
        export(model, source, tmp_path / "out", config, progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_names_in_folders_and_pictures_that_lie_on_their_side(model, config, tmp_path):
    root = write_images(tmp_path / "own", ["cat/1.png", "dog/1.png", "sheep/ä b.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth_image(20, 34, 3)).save(root / "cat" / "2.jpg", exif=exif, quality=95)
    source = open_source(root)
    for images, n in (("copy", 4), ("link", 4), ("none", 0)):
        export(model, source, tmp_path / images, config, images=images, progress=False)
        assert len(list((tmp_path / images).glob("JPEGImages/*/*"))) == n
    for made in ("copy", "link"):
        back = VOCFolder(tmp_path / made, "train")
        assert back.names == source.names and back.mask(1).shape == (34, 20)
        assert (tmp_path / made / "JPEGImages" / "cat" / "2.png").is_file()  # upright, without any flag
        for i in range(4):
            np.testing.assert_array_equal(back.image(i), source.image(i))
    assert (tmp_path / "copy/JPEGImages/dog/1.png").stat().st_ino != (root / "dog/1.png").stat().st_ino


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("nowhere.jpg"), "No such file or directory"),
        (lambda path: path.write_bytes(b"no picture"), "not a readable"),
        (lambda path: path.mkdir(), "it is a folder"),
    ],
)
def test_an_image_that_cannot_be_placed_is_named(tmp_path, make, words):
    make(tmp_path / "a.jpg")
    with pytest.raises(ToCoError, match=f"^{tmp_path / 'a.jpg'} .*{words}"), writing(tmp_path / "out"):
        place_image(tmp_path / "a.jpg", tmp_path / "out", "a", link=False)


def test_palette_png():
    label = np.array([[0, 1, 2], [20, 255, 7]], np.uint8)
    path = Image.open(__import__("io").BytesIO(palette_png(label)))
    assert path.mode == "P"
    np.testing.assert_array_equal(np.asarray(path), label)
    np.testing.assert_array_equal(np.asarray(path.convert("RGB")), voc_palette()[label])


def test_the_archive_for_the_evaluation_server(model, config, tmp_path):
    """Without masks and without image-level labels, as VOC's test images are."""
    root = write_voc_folder(tmp_path / "VOC2012", n=3, splits={"test": range(3)}, classes=None)
    for path in (root / "SegmentationClass").iterdir():
        path.unlink()
    source = VOCFolder(root, "test", require_masks=False)
    torch.manual_seed(0)
    voc_model = ToCo(config.model, 20).eval()
    (root / "SegmentationClass").rmdir()
    found = export(voc_model, source, tmp_path / "out", config, method="seg", progress=False)
    for name in ("a.tgz", "b.tgz"):
        assert voc_archive(found.folder, tmp_path / name, competition="comp5") == 3
    assert (tmp_path / "a.tgz").read_bytes() == (tmp_path / "b.tgz").read_bytes()
    with tarfile.open(tmp_path / "a.tgz") as archive:
        below = "results/VOC2012/Segmentation/comp5_test_cls"
        assert archive.getnames() == [f"{below}/img_{i}.png" for i in range(3)]
        label = np.asarray(Image.open(archive.extractfile(f"{below}/img_1.png")))
    np.testing.assert_array_equal(label, VOCFolder(found.folder, "test").mask(1))
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(VOC_CLASSES)
    with pytest.raises(ToCoError, match="competition = 'comp7' is not allowed"):
        voc_archive(found.folder, tmp_path / "c.tgz", competition="comp7")
    label = VOCFolder(found.folder, "test").mask(1)
    label[0, 0] = 255
    (found.folder / "SegmentationClass" / "img_1.png").write_bytes(palette_png(label))
    with pytest.raises(ToCoError, match="img_1.png holds 255"):
        voc_archive(found.folder, tmp_path / "c.tgz")
    (found.folder / "classes.txt").write_text("\n".join(f"c{i}" for i in range(20)))
    with pytest.raises(ToCoError, match="VOC's 20 are wanted"):
        voc_archive(found.folder, tmp_path / "c.tgz")


@pytest.mark.slow
def test_the_command(model, source, config, tmp_path, capsys):
    from toco_core.commands.export import export_command
    from toco_core.train.loop import train

    write_list(source.root, "val", ["img_4"])
    short = override(config, dataset=str(source.root), steps=1, batch_size=2, warmup_steps=0, out_dir=str(tmp_path))
    run = train(short, progress=False).run
    assert export_command([str(run.folder), str(tmp_path / "out"), "--split", "val", "--method", "cam"]) == 0
    assert "1 label maps, 1 of them new" in capsys.readouterr().out
    assert VOCFolder(tmp_path / "out", "val").names == ("img_4",)
    everything = [str(run.folder), str(tmp_path / "all"), "--split", "all", "--beta-l", "0.1", "--beta-h", "0.9"]
    write_list(source.root, "train", [f"img_{i}" for i in range(4)])  # img_4 is held out
    assert export_command(everything) == 0
    parts = {name: VOCFolder(tmp_path / "all", name) for name in ("train", "val", "all")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "val": 1, "all": 5}
    in_json = COCOFolder(tmp_path / "all" / "annotations" / "instances_val.json", unlabelled=True)
    assert in_json.names == ("img_4",)
    np.testing.assert_array_equal(in_json.mask(0), parts["all"].mask(4))
    settings = json.loads((tmp_path / "all" / "manifest.json").read_text())["settings"]
    assert (settings["beta_l"], settings["beta_h"]) == (0.1, 0.9)
    copied = tmp_path / "all" / "JPEGImages" / "img_0.jpg"
    assert copied.stat().st_ino != source.image_path(0).stat().st_ino  # to edit it leaves the data set alone
    with pytest.raises(ToCoError, match="beta_l"):
        export_command([*everything[:-1], "0.05"])  # beta_l above beta_h
    with pytest.raises(ToCoError, match="split 'nope'"):
        export_command([str(run.folder), str(tmp_path / "out"), "--split", "nope"])
    shutil.copy(source.image_path(4), source.root / "JPEGImages" / "new.jpg")  # a test part has images and nothing else
    write_list(source.root, "test", ["new"])
    assert export_command([str(run.folder), str(tmp_path / "test"), "--split", "test", "--method", "seg"]) == 0
    assert VOCFolder(tmp_path / "test", "test").mask(0).shape == source.image(4).shape[:2]
    with pytest.raises(ToCoError, match="new"):
        export_command([str(run.folder), str(tmp_path / "cam"), "--split", "test", "--method", "cam"])
    formats_through_the_shell(run, tmp_path, capsys)


def formats_through_the_shell(run, tmp_path, capsys):
    """What a user types, from the run to label maps that came back from a tool unchanged."""
    folder, command = str(tmp_path / "edit"), [sys.executable, "-m", "toco_core"]
    words = ["export", str(run.folder), folder, "--method", "cam", "--format"]
    done = subprocess.run([*command, *words, "label-studio"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{folder}/label_studio.json", done.stderr
    tasks = json.loads((tmp_path / "edit" / "label_studio.json").read_text())
    assert [task["data"]["name"] for task in tasks] == [f"img_{i}" for i in range(4)]
    assert "<BrushLabels" in (tmp_path / "edit" / "label_studio.xml").read_text()
    with pytest.raises(SystemExit, match="2"):
        toco.main([*words, "paint"])
    assert toco.main([*words, "cvat"]) == 0
    assert toco.main(["corrected", folder, f"{folder}/cvat.zip", str(tmp_path / "back")]) == 0
    said = capsys.readouterr()
    assert "invalid choice: 'paint'" in said.err and "4 label maps, 0 of them new" in said.out
    assert f"{folder}/cvat.zip\n" in said.out and "4 label maps, 4 of them corrected" in said.out
    before, after = (VOCFolder(place, "train") for place in (folder, tmp_path / "back"))
    assert any(before.mask(i).any() for i in range(4))
    for i in range(4):
        np.testing.assert_array_equal(before.mask(i), after.mask(i))


# ---- the second stage


@pytest.mark.parametrize("size", [(20, 30), (70, 41)])
def test_crops_keep_image_and_mask_together(size):
    """The image is painted from the mask, so every pixel tells what its label must be."""
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2, size[1] // 3 :] = 1
    mask[size[0] // 2 :, : size[1] // 4] = 2
    image = np.stack([mask * 100] * 3, axis=-1)
    flipped = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        view, label = crop_with_mask(image, mask, crop_size=36, scale_range=(0.5, 2.0), rng=rng)
        assert view.shape == (36, 36, 3) and label.shape == (36, 36) and set(np.unique(label)) <= {0, 1, 2, 255}
        inside = label != 255
        wrong = np.abs(view[..., 0].astype(int) - 100 * label) > 60
        assert (wrong & inside).mean() < 0.05 and not view[~inside].any()
        columns = np.flatnonzero((label == 2).any(0))
        flipped += bool(len(columns) and inside.any(0)[columns].all() and columns.mean() > 18)
    assert 0 < flipped < 20


def test_a_relative_scale_fits_a_large_image_into_a_crop():
    mask = np.ones((300, 200), np.uint8)
    options = {"crop_size": 50, "scale_range": (0.5, 0.5), "scale_relative": True, "rng": np.random.default_rng(0)}
    label = crop_with_mask(np.full((300, 200, 3), 100, np.uint8), mask, **options)[1]
    assert abs((label == 1).mean() - 0.25) < 0.02  # half the sides of a crop's area


def test_a_second_network_learns_the_label_maps_of_a_folder(config, tmp_path):
    """The images are painted from their masks: after some steps the network knows more than one class."""
    root = write_voc_folder(tmp_path / "voc", n=6)
    painted = VOCFolder(root, "train")
    for i in range(6):
        colours = np.array([[40, 40, 40], [230, 30, 30], [30, 230, 30], [30, 30, 230], [40, 40, 40]], np.uint8)
        image = colours[np.where(painted.mask(i) == 255, 4, painted.mask(i))]
        (root / "JPEGImages" / f"img_{i}.jpg").unlink()
        Image.fromarray(image).save(root / "JPEGImages" / f"img_{i}.png")
    taught = VOCFolder(root, "train")
    short = override(
        config, batch_size=6, lr=1e-3, warmup_steps=0, scale_range=(0.9, 1.1), decoder_width=16, cam_scales=(1.0,)
    )
    untaught = train_segmentation(override(short, lr=1e-9), taught, steps=1, progress=False)
    networks = [untaught, train_segmentation(short, taught, steps=40, progress=False)]
    seen = [evaluate(network, taught, size=32, progress=False).seg for network in networks]
    assert seen[1].miou > seen[0].miou + 0.25
    again = train_segmentation(short, taught, steps=1, progress=False)
    assert weights_hash(again) == weights_hash(train_segmentation(short, taught, steps=1, progress=False))


def test_supervised_training_needs_masks(config, tmp_path):
    bare = open_source(write_images(tmp_path / "own", ["cat/1.png", "dog/1.png"]))
    with pytest.raises(ToCoError, match="has masks of 0 images only"):
        train_segmentation(config, bare, steps=1, progress=False)


def test_supervised_training_stretches_no_mask(config, tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=1)
    path = root / "SegmentationClass" / "img_0.png"
    with Image.open(path) as mask:
        mask.transpose(Image.Transpose.ROTATE_90).save(path)
    with pytest.raises(ToCoError, match="img_0.png is 30 x 20 but its image img_0.jpg is 20 x 30"):
        train_segmentation(config, VOCFolder(root, "train"), steps=1, progress=False)


def test_sizes_of_the_tests_differ():
    assert len(set(SIZES)) == 4


def test_links_out_of_the_data_set_are_told(model, config, tmp_path):
    """A data set from a stranger may name a file of yours; who gives the export away would give it away."""
    root = write_voc_folder(tmp_path / "data", n=3)
    (tmp_path / "home").mkdir()
    for number, target in ((1, "../../home/mine.jpg"), (2, "img_0.jpg")):  # the other one stays inside
        path = root / "JPEGImages" / f"img_{number}.jpg"
        if number == 1:
            (tmp_path / "home" / "mine.jpg").write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(target)
    source = VOCFolder(root, "train", labels={f"img_{i}": LABELS[f"img_{i}"] for i in range(3)}, require_masks=False)
    assert source.outside() == [1]
    with pytest.warns(UserWarning, match=r"1 of 3 images are links .*img_1.jpg is .*home/mine.jpg\); images = 'none'"):
        export(model, source, tmp_path / "out", config, method="cam", progress=False)
    copied = tmp_path / "out" / "JPEGImages" / "img_1.jpg"
    assert not copied.is_symlink() and copied.read_bytes() == (tmp_path / "home" / "mine.jpg").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, source, tmp_path / "none", config, method="cam", images="none", progress=False)


def test_a_large_export_says_how_far_its_lists_are(model, source, config, tmp_path, monkeypatch, capsys):
    """Of 10,000 images they take half a minute after the last label map."""
    monkeypatch.setattr(exporting, "PROGRESS_FROM", 4)
    export(model, source, tmp_path / "out", config, method="cam", progress=True)
    told = capsys.readouterr().err
    assert "placing images:   0%" in told and "writing lists:   0%" in told and told.count("0/5") == 3
