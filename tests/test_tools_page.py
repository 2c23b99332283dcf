"""What docs/tools.md shows of other tools runs, where they are installed."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toco_core.data.scenes import draw_scene

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tools.md"


def block_of(words):
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if words in part)
    return block


def test_the_recipe_of_grad_cam_runs(tmp_path, monkeypatch):
    """Both maps are at the size that the model saw: they are of one network."""
    pytest.importorskip("pytorch_grad_cam")
    Image.fromarray(draw_scene(np.random.default_rng(3), 96, 128).image).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block_of("pytorch_grad_cam"), names)
    theirs, ours = torch.from_numpy(names["theirs"]), names["ours"]
    assert theirs.shape == ours.shape and 0 <= theirs.min() and theirs.max() <= 1
    assert theirs.std() > 0 and ours.std() > 0
