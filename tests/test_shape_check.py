"""Shapes are checked while these tests run: in functions, methods and dataclasses, and not where none is told."""

import pytest
import torch
from jaxtyping import TypeCheckError
from test_kept_tokens import frozen_model

from toco_core.cam import normalise_cam
from toco_core.config import did_you_mean
from toco_core.lattice import Lattice


def test_a_wrong_shape_is_an_error_of_its_function():
    with pytest.raises(TypeCheckError, match="normalise_cam"):
        normalise_cam(torch.rand(5, 4))
    with pytest.raises(TypeCheckError, match="ToCo.normalise"):
        frozen_model().normalise(torch.rand(2, 4, 16, 24))
    assert normalise_cam(torch.rand(2, 5, 4)).shape == (2, 5, 4)


def test_axes_of_one_name_are_equal():
    def lattice(*weights):
        whole = {"dtype": torch.long}
        corners, blur, starts = torch.zeros(3, 2, **whole), torch.zeros(2, 5, 3, **whole), torch.zeros(5, **whole)
        return Lattice(corners, torch.zeros(weights), torch.zeros(6, **whole), torch.zeros(6), starts, blur)

    assert lattice(3, 2).weights.shape == (3, 2)
    with pytest.raises(TypeCheckError, match="Lattice"):
        lattice(2, 3)


def test_signatures_without_a_shape_are_left_as_they_are():
    assert not hasattr(did_you_mean, "__wrapped__") and hasattr(normalise_cam, "__wrapped__")
