"""Notebooks with other values than their defaults: what they say follows from what was measured in this run."""

from pathlib import Path

import pytest
import refresh
from voc_folder import write_voc_folder

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def told(name, **values):
    """All that a notebook prints, executed with these values."""
    papermill = pytest.importorskip("papermill")
    notebook = papermill.iorw.load_notebook_node(str(FOLDER / f"{name}.ipynb"))
    notebook = papermill.parameterize.parameterize_notebook(notebook, values)
    outputs = [out for cell in refresh.execute(notebook, FOLDER, timeout=600).cells for out in cell.get("outputs", [])]
    texts = [out.get("text", "") or out.get("data", {}).get("text/markdown", "") for out in outputs]
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values", "words", "never"),
    [
        ("start", {"n_shown": 1, "n_ranked": 3, "n_measured": 0}, "(3 images)", "0 images)"),
        ("evaluate", {"n_images": 1, "crf": False}, "four images at least, here are 1", "| cat 0 |"),
        ("ctc_crops", {"n_images": 1, "draws": 1, "try_n_local": 1}, "0 % of 1 crops are positive.", "nan"),
        ("ctc_crops", {"n_images": 2, "draws": 1}, "% of 8 crops are positive.", "nan"),
        (
            "laboratory",
            {"ptc_weights": 3, "steps": 4, "n_train": 4, "n_val": 2},
            "One weight, 3, is compared",
            " to 3 ",
        ),
        ("pseudo_labels", {"n_images": 2, "n_crf": 1, "images": 1, "betas": "0.4,0.2"}, "on 2 images of test", "nan"),
    ],
)
def test_few_images_are_no_verdict(name, values, words, never):
    text = told(name, **values)
    assert words in text and never not in text


@pytest.mark.slow
def test_a_bare_backbone_on_a_folder_shows_its_first_image(tmp_path):
    """As in the first cell of the notebook: without `image`, which names one of the embedded data set."""
    root = write_voc_folder(tmp_path / "animals", n=8, splits={"train": range(5), "val": (5, 6, 7)})
    values = {"dataset": str(root), "trained": False, "backbone": "scenes_vit_nano", "crop_size": 64, "n_probe": 5}
    text = told("oversmoothing", **values)
    assert "img_5: 8 x 8 patches" in text and "on 3 validation images" in text
