import json
import math
from pathlib import Path

import pytest

from toco_core.config import override, photographs, shortened, tiny, voc
from toco_core.config.parameters import Parameters, as_list, questions
from toco_core.errors import ToCoError


def notebook(own=(), before=None, **given):
    """A notebook whose parameters cell gives these names."""
    namespace = {"__name__": "__main__", "In": [], "torch": object(), **(before or {})}
    namespace["parameters"] = Parameters(namespace, own=own)
    namespace.update(given)
    return namespace["parameters"]


def test_parameters_change_the_recipe():
    found = notebook(layer=7, steps=20, warmup_steps=2, beta_l=0.2, cam_scales=[1.0, 0.5]).config()
    assert found == override(shortened(tiny(), 20), layer=7, warmup_steps=2, beta_l=0.2, cam_scales=(1.0, 0.5))


def test_no_parameter_at_all_is_the_recipe():
    assert notebook().config() == tiny()


def test_none_leaves_the_recipe_as_it_is():
    assert notebook(layer=None, steps=None, dataset=None, lr=1e-3).config() == override(tiny(), lr=1e-3)


def test_what_was_there_before_is_no_parameter():
    assert notebook(before={"helper": print, "answer": 42}, layer=9).values() == {"layer": 9}


def test_private_names_are_no_parameters():
    assert notebook(_=3, _i1="text", layer=9).values() == {"layer": 9}


def test_cells_that_run_again_in_one_kernel_are_read_again():
    namespace = {"numpy": object()}
    for layer in (9, 9, 4):
        namespace["parameters"] = Parameters(namespace)
        namespace["layer"] = layer
        namespace["config"] = namespace["parameters"].config()
        namespace["model"] = "trained"
        assert namespace["config"] == override(tiny(), layer=layer)
    namespace["parameters"] = Parameters(namespace)
    assert namespace["parameters"].config() == tiny()  # a parameter that was taken out is gone


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layr": 9}, "there is no parameter 'layr': did you mean layer"),
        ({"betal": 0.3}, "there is no parameter 'betal': did you mean beta_l"),
        ({"recipes": "voc"}, "there is no parameter 'recipes': did you mean recipe"),
        ({"n_picture": 3}, "there is no parameter 'n_picture': did you mean n_pictures"),
        ({"zzz": 9}, "there is no parameter 'zzz': known are .*layer"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(given, words):
    parameters = notebook(own=("n_pictures",), **given)
    with pytest.raises(ToCoError, match=words):
        parameters.values()
    with pytest.raises(ToCoError, match=words):
        parameters.config()


def test_a_section_is_no_parameter():
    with pytest.raises(ToCoError, match="there is no parameter 'schedule'"):
        notebook(schedule={"steps": 3}).config()


def test_a_notebooks_own_parameters_stay_out_of_the_config():
    parameters = notebook(own=("n_pictures", "title"), n_pictures=3, title=None, layer=8)
    assert parameters.values() == {"n_pictures": 3, "title": None, "layer": 8}
    assert parameters.config() == override(tiny(), layer=8)


def test_the_recipe_follows_from_the_data_set():
    assert notebook(recipe="auto", dataset="scenes").config() == tiny()
    assert notebook(recipe="auto", dataset="my/cats").config() == photographs("my/cats")
    assert notebook(dataset="my/cats", recipe=None).config() == photographs("my/cats")


def test_the_recipe_can_be_chosen():
    assert notebook(recipe="voc").config() == voc()
    assert notebook(recipe="tiny", dataset="my/cats").config() == override(tiny(), dataset="my/cats")


@pytest.mark.parametrize(("recipe", "shown"), [("big", "'big'"), ([1], r"\[1\]"), ({}, "{}"), (5, "5")])
def test_an_unknown_recipe_is_refused(recipe, shown):
    words = f"recipe = {shown} is not allowed: one of auto, voc, coco, tiny, photographs"
    with pytest.raises(ToCoError, match=words):
        notebook(recipe=recipe).config()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer": "ten"}, "layer = 'ten' is not allowed: a whole number"),
        ({"layer": 0}, "layer = 0 is not allowed: at least 1"),
        ({"beta_l": 0.8}, f"beta_l = 0.8 must be below beta_h = {tiny().labels.beta_h}"),
        ({"precision": "fp8"}, "precision = 'fp8' is not allowed: one of auto, fp32, medium, bf16"),
        ({"device": "tpu"}, "device = 'tpu' is not allowed"),
    ],
)
def test_a_wrong_value_is_refused(given, words):
    with pytest.raises(ToCoError, match=words):
        notebook(**given).config()


LABEL_FIELDS = {"label_beta_l": "beta_l", "label_beta_h": "beta_h"}


def test_fields_under_the_names_of_own_parameters():
    parameters = notebook(own=tuple(LABEL_FIELDS), label_beta_l=0.1, label_beta_h=None, layer=9)
    config = parameters.config()
    parameters.namespace["config"] = config  # a cell goes on
    assert parameters.changed(config, **LABEL_FIELDS) == override(config, beta_l=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0.6, 0.5), r"^label_beta_l = 0.6 must be below label_beta_h = 0.5$"),
        ((0.1, 1.5), r"^label_beta_h = 1.5 is not allowed"),
        (("x", 0.5), r"^label_beta_l = 'x' is not allowed"),
    ],
)
def test_a_refusal_names_the_parameter_that_was_typed(given, words):
    parameters = notebook(own=tuple(LABEL_FIELDS), **dict(zip(LABEL_FIELDS, given, strict=True)))
    with pytest.raises(ToCoError, match=words):
        parameters.changed(tiny(), **LABEL_FIELDS)


@pytest.mark.parametrize("given", [[7, 10, 12], (7, 10, 12), "7,10,12", "7, 10, 12", ["7", 10, 12.0]])
def test_a_list_can_be_given_in_one_word(given):
    assert as_list("layers", given, int) == [7, 10, 12]


def test_one_value_is_a_list_of_one():
    assert as_list("layers", 7, int) == as_list("layers", "7", int) == [7]
    assert as_list("variants", "+ PTC, full") == ["+ PTC", "full"]
    assert as_list("weights", [0, 0.5, 2.0], float) == as_list("weights", "0, 0.5,2", float) == [0, 0.5, 2]


@pytest.mark.parametrize("given", ["7,ten", "7,,9", [7, 7], [], "", None, [7.5], math.inf, [7, math.inf]])
def test_a_wrong_list_is_refused(given):
    with pytest.raises(ToCoError, match="'' is not allowed: a list of different str values"):
        as_list("variants", "")
    with pytest.raises(ToCoError, match="layers = .* is not allowed: a list of different int values is wanted"):
        as_list("layers", given, int)


def test_questions_are_read_from_the_first_cells(tmp_path):
    def write(name, *sources):
        cells = [{"cell_type": "markdown", "source": source} for source in sources]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")

    write("b", ["# Title\n", "\n", "**Question.** What is *it*?\n", "\n", "**Cost.** Nothing."])
    write("a", "# Other\n\n**Question.** Why?")
    write("c", "# No question", "**Question.** Not in the first cell?")
    write("d")
    assert list(questions(tmp_path).items()) == [("a", "Why?"), ("b", "What is *it*?")]


def test_every_notebook_asks_a_question():
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    assert sorted(questions(folder)) == sorted(path.stem for path in folder.glob("*.ipynb"))


def test_notebooks_that_train_long_say_how_to_see_it_under_papermill():
    folder, asked = Path(__file__).resolve().parents[1] / "notebooks", []
    for path in folder.glob("*.ipynb"):
        opening, *cells = ("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        if any("train(config" in cell for cell in cells):
            assert "`--log-output`" in opening, path.name
            asked.append(path.stem)
    assert {"train", "your_data"} <= set(asked)
