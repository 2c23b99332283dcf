"""The examples of CONTRIBUTING.md and of the README, run as they stand, with a smaller `tiny` and fewer steps."""

import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from PIL import Image
from voc_folder import rectangle_mask, smooth_image, write_voc_folder

import toco_core.config
from toco_core.config import override, tiny
from toco_core.labels import refined_labels
from toco_core.refiners import REFINERS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"^## (.+?)\n|^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples(page: str) -> dict[str, list[str]]:
    """Heading -> blocks of Python below it."""
    found, heading = {}, ""
    for title, code in PYTHON.findall((ROOT / page).read_text(encoding="utf-8")):
        heading = title or heading
        if code:
            found.setdefault(heading, []).append(code)
    return found


def block(page: str, heading: str) -> str:
    """The only block below a heading."""
    (code,) = examples(page)[heading]
    return code


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`tiny()` on six small images with three blocks, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    data = write_voc_folder(tmp_path / "voc", splits={"train": range(4), "val": range(4, 6)})
    losses = {"ptc": 0.5, "ctc": 0.2, "seg": 0.1, "energy": 0.05}
    config = override(
        tiny(), **losses, beta_l=0.05, beta_h=0.3, dataset=str(data),
        backbone="plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)",
        pretrained=False, layer=2, proj_hidden=8, proj_bottleneck=6, proj_dim=5, decoder_width=7, n_local=2,
        local_size=16, crop_size=32, batch_size=2, warmup_steps=0, ptc_start=0, ctc_start=0, seg_start=2,
        energy_start=2, warm_start_steps=0, frozen_blocks=0, attention_steps=0, cam_scales=(1.0,), device="cpu",
        precision="fp32", log_interval=1, eval_interval=0, cache=False,
    )  # fmt: skip
    monkeypatch.setattr(toco_core.config, "tiny", lambda: config)
    return config


def run(code: str) -> dict:
    """Execute with three steps in place of the number that is written; the names that it leaves."""
    code, n = re.subn(r"\bsteps=\d+", "steps=3", code)
    assert n < 2
    names = {"__name__": "example"}
    exec(compile(code, "<example>", "exec"), names)
    return names


def test_every_example_has_its_test():
    """A new block is looked at here, too."""
    assert {heading: len(blocks) for heading, blocks in examples("CONTRIBUTING.md").items()} == {
        "Add a term to the loss": 1,
        "Add a refiner": 1,
        "Add a layout of data": 1,
        "Add a backbone": 1,
        "Add a notebook": 1,
    }


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_a_term_of_ones_own_trains_and_has_its_curve(small, page):
    heading, name = {
        "CONTRIBUTING.md": ("Add a term to the loss", "entropy"),
        "README.md": ("Change things", "sparse"),
    }[page]
    names = run(block(page, heading))
    records = [record for record in names["trained"].run.records() if name in record]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(np.isfinite(record[name]) for record in records)
    weights = names["config"].loss if page == "README.md" else small.loss
    counted = sum(
        getattr(weights, term) * records[-1][term] for term in ("cls", "aux_cls", "ptc", "ctc", "seg", "energy")
    )
    own = (records[-1]["total"] - counted) / records[-1][name]
    assert own == pytest.approx(0.01, rel=1e-3)
    if page == "CONTRIBUTING.md":
        assert records[0]["entropy"] == 0 < records[1]["entropy"]  # it starts at step 1
        texts = [text.get_text() for ax in names["figure"].axes for text in (*ax.texts, *legend_of(ax))]
        assert any("entropy" in text for text in texts)


def legend_of(ax) -> list:
    return ax.get_legend().get_texts() if ax.get_legend() else []


def test_a_refiner_of_ones_own_labels_what_the_decoder_learns(small, monkeypatch):
    monkeypatch.setitem(REFINERS, "blur", None)  # gone again after this test
    names = run(block("CONTRIBUTING.md", "Add a refiner"))
    records = names["trained"].run.records()
    assert [record["seg"] > 0 for record in records if "seg" in record] == [False, True, True]
    cam = torch.zeros(1, 2, 20, 24)
    cam[0, 1, 8:11, 10:14] = 1
    images, tags = torch.rand(1, 3, 20, 24), torch.tensor([[0.0, 1.0]])
    (label,) = refined_labels(images, cam, tags, betas=[0.47], refiner="blur", scale=1.0)
    assert label.shape == (1, 20, 24) and set(label.unique().tolist()) == {0, 2}
    bright = [[y, x] for y in (8, 9, 10) for x in (11, 12)]  # 12 of 25 pixels are bright around these alone
    assert (label == 2).nonzero()[:, 1:].tolist() == bright


def test_a_layout_of_ones_own_is_checked_and_trained_on(small, tmp_path, capsys):
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        folder = tmp_path / "animals" / split
        folder.mkdir(parents=True)
        for i in numbers:
            Image.fromarray(smooth_image(20 + i, 30, i)).save(folder / f"{i}.jpg")
            Image.fromarray(rectangle_mask(20 + i, 30, 1 + i % 3)).save(folder / f"{i}.png")
    names = run(block("CONTRIBUTING.md", "Add a layout of data"))
    assert "4 images of 20 x 30 to 23 x 30, 4 masks" in capsys.readouterr().out
    assert names["data"].train.image_labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert names["trained"].validation.n_masks == 2


def test_a_backbone_is_spelled_out():
    run(block("CONTRIBUTING.md", "Add a backbone"))


def test_parameters_of_a_notebook_are_listed_with_their_comments(tmp_path):
    cell = nbformat.v4.new_code_cell(block("CONTRIBUTING.md", "Add a notebook"), metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    nbformat.write(notebook, tmp_path / "new.ipynb")
    listed = papermill.inspect_notebook(str(tmp_path / "new.ipynb"))
    assert {name: (entry["default"], entry["inferred_type_name"]) for name, entry in listed.items()} == {
        "layer": ("10", "int"),
        "n_shown": ("3", "int"),
    }
    assert "counted from 1" in listed["layer"]["help"]
