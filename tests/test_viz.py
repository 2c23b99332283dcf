import io
import sys
import types
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from toco_core import viz
from toco_core.conventions import classes_in, voc_palette
from toco_core.errors import ToCoError
from toco_core.viz import curves as curves_module
from toco_core.viz import theme

plt.switch_backend("Agg")

RECORDS = [
    {"step": 0, "total": 2.0, "cls": 0.7, "aux_cls": 0.7, "ptc": 0.6, "ctc": 0.5, "seg": 0.0, "energy": 0.0},
    {"step": 10, "total": 1.5, "cls": 0.6, "aux_cls": 0.5, "ptc": 0.4, "ctc": 0.4, "seg": 0.9, "energy": 0.0},
    {"step": 10, "cam_miou": 20.0, "aux_cam_miou": 25.5, "seg_miou": 3.0, "map": 60.0, "aux_map": 50.0},
    {"step": 20, "total": 1.4, "cls": 0.5, "aux_cls": 0.4, "ptc": 0.3, "ctc": 0.4, "seg": None, "energy": 0.0},
    {"step": 20, "cam_miou": 30.0, "aux_cam_miou": 35.5, "seg_miou": 13.0, "map": 70.0, "aux_map": 60.0},
]


@pytest.fixture(autouse=True)
def clean_figures():
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    plt.rcParams.update(before)


@pytest.fixture
def ax():
    return plt.figure().add_subplot()


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def image(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- pictures


def test_labels_have_vocs_colours_and_ignored_is_grey():
    label = np.array([[0, 1, 2], [20, 255, 255]], np.uint8)
    colours = viz.label_colours(label)
    assert colours.shape == (2, 3, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[label != 255], voc_palette()[[0, 1, 2, 20]])
    assert {tuple(colour) for colour in colours[label == 255].tolist()} <= set(viz.IGNORE_GREYS)
    hatched = viz.label_colours(np.full((12, 18), 255, np.uint8))
    assert {tuple(colour) for colour in hatched.reshape(-1, 3).tolist()} == set(viz.IGNORE_GREYS)
    np.testing.assert_array_equal(viz.label_colours(label.astype(np.int64)), colours)


def test_an_overlay_is_a_blend_in_the_unit_range():
    cam = np.linspace(0, 1, 54).reshape(6, 9)
    found = viz.overlay(image(), cam)
    assert found.shape == (6, 9, 3) and 0 <= found.min() and found.max() <= 1
    for y, x in np.ndindex(6, 9):
        pixel = image()[y, x] / 255
        faded = 0.35 * pixel + 0.65 * pixel.mean()
        colour = np.array(plt.get_cmap("inferno")(np.float32(cam[y, x]))[:3])
        np.testing.assert_allclose(found[y, x], 0.35 * faded + 0.65 * colour, atol=1e-5)


def test_the_scale_of_an_overlay_is_fixed():
    """A weak CAM looks weak: equal values look equal, whatever the others are."""
    weak, strong = np.full((6, 9), 0.2), np.full((6, 9), 0.2)
    strong[0, 0] = 1
    np.testing.assert_array_equal(viz.overlay(image(), weak)[1:], viz.overlay(image(), strong)[1:])
    np.testing.assert_array_equal(viz.overlay(image(), weak * 10), viz.overlay(image(), np.ones((6, 9))))  # cut off
    black = np.zeros((6, 9, 3), np.uint8)
    brightness = [viz.overlay(black, np.full((6, 9), value)).mean() for value in (0, 0.25, 0.5, 1)]
    assert brightness == sorted(brightness) and brightness[0] < 0.02


def test_an_overlays_strength():
    cam = np.full((6, 9), 0.5)
    np.testing.assert_allclose(
        viz.overlay(image(), cam, strength=1.0), np.broadcast_to(plt.get_cmap("inferno")(0.5)[:3], (6, 9, 3)), atol=1e-6
    )
    assert (viz.overlay(image(), cam, strength=0.0) == viz.overlay(image(), 1 - cam, strength=0.0)).all()


def test_show(ax):
    assert viz.show(ax, image(), "a title") is ax
    assert ax.get_title() == "a title" and not ax.axison
    np.testing.assert_array_equal(ax.images[0].get_array(), image())
    assert ax.images[0].get_interpolation() == "nearest"


def test_picture_rows():
    rows = [[image(seed=3 * r + c) for c in range(3)] for r in range(2)]
    figure = viz.picture_rows(rows, ["image", "CAM", "truth"], names=["first"])
    assert isinstance(figure, plt.Figure)
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["image", "CAM", "truth"]
    assert [ax.get_title() for ax in axes[1]] == ["", "", ""]
    for r in range(2):
        for c in range(3):
            np.testing.assert_array_equal(axes[r, c].images[0].get_array(), rows[r][c])
    assert [text.get_text() for text in axes[0, 0].texts] == ["first"] and not axes[1, 0].texts
    for none in ([], [[]], [[], []]):  # as with n_shown = 0
        with pytest.raises(ToCoError, match="^0 pictures are to be shown: at least 1 is wanted$"):
            viz.picture_rows(none, ["image"])


def test_class_legend():
    figure = plt.figure()
    assert viz.class_legend(figure, ["background", "cat", "dog", "ram"], [0, 2]) is figure
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["background", "dog", "ignored"]
    colours = [np.round(np.array(patch.get_facecolor()[:3]) * 255).tolist() for patch in legend.get_patches()]
    assert colours == [[0, 0, 0], [0, 128, 0], list(viz.IGNORE_GREYS[0])]


# ---- curves


def test_loss_curves(ax):
    assert viz.loss_curves(ax, RECORDS) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["total", "cls", "aux_cls", "ptc", "ctc", "seg"]  # energy has not begun
    assert points(lines["total"]) == [(0, 2.0), (10, 1.5), (20, 1.4)]
    assert points(lines["seg"]) == [(10, 0.9)]  # neither before its start nor where it is not a number
    assert {label: line.get_color() for label, line in lines.items()} == {n: viz.TERM_COLOURS[n] for n in lines}
    assert ax.get_legend() is not None


def test_score_curves(ax):
    assert viz.score_curves(ax, RECORDS) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["final CAM", "auxiliary CAM", "segmentation"]
    assert points(lines["auxiliary CAM"]) == [(11, 25.5), (21, 35.5)]
    assert ax.get_ylim()[0] == 0


def test_contact_sheet():
    images = [np.full((6 + i, 9, 3), 40 * i, np.uint8) for i in range(5)]
    figure = viz.contact_sheet(images, [f"picture {i}" for i in range(5)], columns=3)
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 1, 1, 0]
    assert [ax.texts[0].get_text() for ax in figure.axes if ax.texts] == [f"picture {i}" for i in range(5)]
    np.testing.assert_array_equal(figure.axes[3].images[0].get_array(), images[3])


def test_label_histogram(ax):
    viz.label_histogram(ax, {"train": [4, 0], "val": [1, 2]}, ["background", "cat", "dog"])
    assert [bar.get_width() for bar in ax.patches] == [4, 0, 1, 2]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "val"]


def test_without_masks_the_image_level_score_is_drawn(ax):
    records = [{"step": r["step"], "map": r["map"], "aux_map": r["aux_map"]} for r in RECORDS if "map" in r]
    (line,) = viz.score_curves(ax, records).lines
    assert points(line) == [(11, 60.0), (21, 70.0)] and "average precision" in ax.get_ylabel()


def test_curves_of_nothing(ax):
    for draw in (viz.loss_curves, viz.score_curves):
        assert draw(ax, []) is ax and not ax.lines and ax.get_legend() is None
    assert isinstance(viz.training_figure([]), plt.Figure)


def test_training_figure():
    figure = viz.training_figure(RECORDS)
    assert [len(ax.lines) for ax in figure.axes] == [6, 3]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()  # one validation stands where it was


def test_token_similarity(ax):
    assert viz.token_similarity(ax, {"before": [0.1, 0.5, 0.9], "after": [0.1, 0.2, 0.3]}, layer=2) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert points(lines["before"]) == [(1, 0.1), (2, 0.5), (3, 0.9)]
    assert [text.get_text().strip() for text in ax.texts] == ["auxiliary block 2"]
    assert ax.get_ylim()[1] == 1
    fresh = plt.figure().add_subplot()
    assert len(viz.token_similarity(fresh, {"one": [0.5]}).lines) == 1 and not fresh.texts


def test_a_method_has_one_colour_in_every_figure_and_shares_it_with_nothing_else():
    ptc, plain = viz.METHOD_COLOURS["PTC"], viz.METHOD_COLOURS["classification only"]
    found = viz.name_colours(["mine", "full", "classification only", "+ PTC", "yours"])
    assert found["full"] == found["+ PTC"] == viz.name_colours(["with PTC"])["with PTC"] == ptc
    assert found["classification only"] == viz.name_colours(["classification"])["classification"] == plain
    assert len(set(found.values())) == 4  # others take what is left
    assert set(viz.METHODS.values()) <= set(viz.METHOD_COLOURS)
    assert not set(viz.METHOD_COLOURS.values()) & set(viz.KIND_COLOURS.values())
    many = [f"run {i}" for i in range(20)]
    assert list(viz.name_colours(many)) == many and set(viz.name_colours(many).values()) == set(viz.RUN_COLOURS)

    curves = {"pretrained": [0.1, 0.2], "full": [0.2, 0.1]}
    drawn = (
        viz.token_similarity(plt.figure().add_subplot(), curves),
        viz.by_block(plt.figure().add_subplot(), curves, title="", ylabel=""),
    )
    for ax in drawn:
        assert [line.get_color() for line in ax.lines] == [viz.METHOD_COLOURS["backbone"], ptc]
    thresholds = viz.threshold_curves(
        plt.figure().add_subplot(), {"auxiliary CAM": ([0, 1], [0.1, 0.2]), "full": ([0, 1], [0.1, 0.3])}, chosen={}
    )
    assert [line.get_color() for line in thresholds.lines] == [viz.KIND_COLOURS["aux_cam"], ptc]


def test_method_bars(ax):
    miou = {"classification only": {"cam": 50.0, "seg": 20.0}, "PTC": {"cam": 70.0, "aux_cam": 60.0, "seg": 65.4}}
    assert viz.method_bars(ax, miou) is ax
    assert [t.get_text() for t in ax.get_xticklabels()] == ["final CAM", "segmentation", "auxiliary CAM"]
    found = [(round(bar.get_x() + bar.get_width() / 2, 3), bar.get_height()) for bar in ax.patches]
    assert found == [(-0.2, 50.0), (0.8, 20.0), (0.2, 70.0), (2.2, 60.0), (1.2, 65.4)]
    assert [plt.matplotlib.colors.to_hex(bar.get_facecolor()) for bar in ax.patches] == (
        [viz.METHOD_COLOURS["classification only"]] * 2 + [viz.METHOD_COLOURS["PTC"]] * 3
    )
    assert [text.get_text() for text in ax.texts] == ["50", "20", "70", "60", "65"]


def test_the_theme_is_light():
    viz.use_theme()
    assert plt.figure().get_facecolor() == (1, 1, 1, 1)
    assert plt.rcParams["axes.facecolor"] == plt.rcParams["savefig.facecolor"] == "white"


# ---- live


def test_a_headless_run_notes_and_draws_at_the_end(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    curves = viz.LiveCurves()
    assert not curves.live
    monkeypatch.setattr(curves_module, "training_figure", None)
    for record in RECORDS:
        curves.update(record)
    assert curves.records == RECORDS and curves.image is None


@pytest.mark.slow
def test_the_curves_are_a_png_and_leave_no_figure_open():
    curves = viz.LiveCurves(live=False)
    curves.records += RECORDS
    picture = curves.png()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in picture[-12:]
    assert plt.get_fignums() == []
    assert len(picture) > len(viz.LiveCurves(live=False).png())


def test_a_live_run_draws_now_and_then(monkeypatch):
    """Once every two seconds, and at every validation; always into one and the same picture."""
    shown, clock = [], [100.0]
    widgets = types.ModuleType("ipywidgets")
    widgets.Image = lambda value, format: SimpleNamespace(value=value, format=format)
    display = types.ModuleType("IPython.display")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(curves_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    curves, drawn = viz.LiveCurves(every=2.0), []
    assert curves.live
    monkeypatch.setattr(curves, "png", lambda: drawn.append(len(curves.records)) or b"picture %d" % len(drawn))
    for seconds, record in (
        (100, RECORDS[0]),
        (101, RECORDS[1]),
        (101.5, RECORDS[2]),
        (102, RECORDS[3]),
        (104, RECORDS[3]),
    ):
        clock[0] = seconds
        curves.update(record)
    assert drawn == [1, 3, 5]
    assert shown == [curves.image] and curves.image.format == "png" and curves.image.value == b"picture 3"


# ---- runs side by side


def test_points_with_error_bars(ax):
    assert viz.error_points(ax, {7: [1.0, 4.0], 9: [5.0]}, colour="#123456", label="x", shift=0.1) is ax
    line, caps, (bars,) = ax.containers[0]
    assert points(line) == [(7.1, 2.5), (9.1, 5.0)]
    deviation = np.std([1.0, 4.0], ddof=1)
    np.testing.assert_allclose(bars.get_segments()[0], [[7.1, 2.5 - deviation], [7.1, 2.5 + deviation]])
    singles = [single for single in ax.lines if single.get_marker() == "_" and single not in caps]
    assert [(7.1, 1.0), (7.1, 4.0)] in [points(single) for single in singles]


def test_one_seed_has_no_error_bar(ax):
    viz.error_points(ax, {7: [1.0], 9: [5.0]}, colour="#123456", label="x")
    assert not ax.containers[0].has_yerr and len(ax.lines) == 1


def test_a_backend_that_is_loaded_by_the_first_figure_stays_interactive(ax):
    def first_figure():
        plt.ion()  # as the notebooks' backend does
        return ax

    with mpl.rc_context({"interactive": False, "text.parse_math": True}):
        theme.with_plain_text(first_figure)()
        assert plt.isinteractive() and mpl.rcParams["text.parse_math"]


def test_layer_figure():
    kinds = {"cam": {2: [10.0, 14.0], 3: [1.0]}, "seg": {2: [20.0, 30.0], 3: [3.0]}}
    alike = {"its own block": {2: [0.2, 0.4], 3: [0.9]}, "last block": {2: [0.3, 0.5], 3: [0.8]}}
    figure = viz.layer_figure(kinds, alike, chosen=3, frozen=2)
    left, right = figure.axes
    lines = {container.get_label(): points(container[0]) for container in left.containers}
    assert lines == {"final CAM": [(1.96, 12), (2.96, 1)], "segmentation": [(2.04, 25), (3.04, 3)]}
    own, last = right.containers
    np.testing.assert_allclose(points(own[0]), [(2, 0.3), (3, 0.9)])
    np.testing.assert_allclose(points(last[0]), [(2, 0.4), (3, 0.8)])
    spans = {patch.get_label(): (patch.get_x(), patch.get_x() + patch.get_width()) for patch in left.patches}
    assert spans == {"frozen blocks": pytest.approx((1.6, 2.4)), "chosen on val": pytest.approx((2.8, 3.2))}
    assert "2 seeds" in left.get_title()
    alone = viz.layer_figure({"cam": {3: [1.0]}}, {}, frozen=2)
    assert "1 seed)" in alone.axes[0].get_title() and not alone.axes[0].patches


def test_compared_curves():
    runs = {"a": (RECORDS, 21), "b": (RECORDS[:2], 21)}
    loss, cam, aux_cam, seg = viz.compared_curves(runs).axes
    assert [line.get_label() for line in loss.lines] == ["a", "b"] and [len(ax.lines) for ax in (cam, seg)] == [1, 1]
    assert points(loss.lines[1]) == [(0, 2.0), (10, 1.5)]
    assert points(aux_cam.lines[0]) == [(11, 25.5), (21, 35.5)] and cam.get_xlabel() == "step"
    assert loss.lines[0].get_color() != loss.lines[1].get_color() and loss.get_xlim() == seg.get_xlim()
    assert isinstance(viz.compared_curves({"empty": ([], 10)}), plt.Figure)


def test_curves_of_runs_without_masks_are_those_of_the_image_labels():
    without = [{name: value for name, value in r.items() if not name.endswith("miou")} for r in RECORDS]
    loss, labels = viz.compared_curves({"a": (without, 21), "b": (without[:3], 21)}).axes
    assert points(labels.lines[0]) == [(11, 60.0), (21, 70.0)] and len(loss.lines) == len(labels.lines) == 2
    assert labels.get_ylabel() == "mean average precision (%)"
    mixed = viz.compared_curves({"a": (without, 21), "b": (RECORDS, 21)}).axes
    assert [len(ax.lines) for ax in mixed] == [2, 1, 1, 1] and mixed[1].get_ylabel() == "mIoU (%)"


def test_the_published_curve_is_drawn_over_the_share_of_the_schedule():
    published = [
        {"step": 50, "cam_miou": 40.0, "aux_cam_miou": 50.0, "seg_miou": 1.0},
        {"step": 100, "cam_miou": 60.0, "aux_cam_miou": 55.0, "seg_miou": 30.0},
    ]
    figure = viz.compared_curves({"a": (RECORDS, 20)}, published=published)
    loss, cam, _, _ = figure.axes
    assert points(cam.lines[0]) == [(55.0, 20.0), (105.0, 30.0)] and points(cam.lines[1]) == [(50, 40.0), (100, 60.0)]
    assert cam.lines[1].get_label() == "published" and len(loss.lines) == 1
    assert "share" in cam.get_xlabel()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "published"}


def test_class_bars(ax):
    assert viz.class_bars(ax, ["cat", "dog"], {"x": [1.0, -2.0], "y": [np.nan, 3.0]}, title="t") is ax
    x, y = ax.containers
    np.testing.assert_array_equal([bar.get_width() for bar in x], [1.0, -2.0])
    np.testing.assert_array_equal([bar.get_width() for bar in y], [np.nan, 3.0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"] and ax.yaxis_inverted()
    assert x[0].get_y() < y[0].get_y() and x[0].get_facecolor() != y[0].get_facecolor()


def test_variant_points(ax):
    assert viz.variant_points(ax, {"full": [30.0, 32.0], "less": [20.0]}, reference="full") is ax
    means = [container[0].get_xdata()[0] for container in ax.containers]
    assert means == [31.0, 20.0] and [container.has_xerr for container in ax.containers] == [True, False]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "less"] and ax.yaxis_inverted()
    assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"] == [[31.0, 31.0]]
    fresh = plt.figure().add_subplot()
    viz.variant_points(fresh, {"less": [20.0]}, reference="full")
    assert not [line for line in fresh.lines if line.get_linestyle() == "--"]


# ---- tokens and attention


def test_numbers_by_block(ax):
    found = viz.by_block(ax, {"one": [0.1, 0.5, 0.4], "two": [0.3, 0.2, 0.6]}, title="t", ylabel="y", layer=2)
    assert [points(line) for line in found.lines[:2]] == [
        [(1, 0.1), (2, 0.5), (3, 0.4)],
        [(1, 0.3), (2, 0.2), (3, 0.6)],
    ]
    assert found.lines[2].get_xdata()[0] == 2 and [t.get_text() for t in found.get_legend().get_texts()] == [
        "one",
        "two",
    ]


def test_similarities_diverge_around_zero_whatever_they_are(ax):
    for draw in (viz.similarity_matrix, viz.similarity_map):
        shown = draw(ax, np.full((3, 3), 0.9), "title").images[-1]
        assert shown.get_clim() == (-1, 1) and shown.cmap.name == "RdBu_r"


def test_the_chosen_patch_is_framed(ax):
    frame = viz.similarity_map(ax, np.zeros((3, 5)), patch=7).patches[-1]
    assert (frame.get_x(), frame.get_y()) == (1.5, 0.5)  # row 1, column 2


def test_attention_is_shown_in_units_of_an_even_spread(ax):
    shown = viz.attention_map(ax, np.full((3, 5), 1 / 15), most=3.0).images[-1]
    np.testing.assert_allclose(shown.get_array(), 1.0)
    assert shown.get_clim() == (0, 3)


@pytest.mark.slow
def test_the_explorer_tells_patches_and_percents():
    rng = np.random.default_rng(0)
    matrices = {str(b): rng.uniform(-1, 1, (6, 6)) for b in range(1, 5)}
    figure = viz.similarity_explorer(matrices, (2, 3))
    assert [trace.visible for trace in figure.data] == [False, False, False, True]
    np.testing.assert_array_equal(figure.data[1].z, np.round(100 * matrices["2"]))
    assert figure.data[0].x[4] == "row 2, column 2" and figure.data[0].z.dtype == np.int8
    few = viz.similarity_explorer(matrices, (2, 3), max_bytes=80)
    assert [step.label for step in few.layout.sliders[0].steps] == ["1", "4"]
    (last,) = viz.similarity_explorer(matrices, (2, 3), max_bytes=1).data
    np.testing.assert_array_equal(last.z, np.round(100 * matrices["4"]))
    assert last.visible


# ---- labels and crops against the masks


def test_threshold_heatmap(ax):
    values = np.array([[0.1, 0.254, 0.3], [np.nan, 0.4, 0.5], [np.nan, np.nan, 0.6]])
    found = viz.threshold_heatmap(ax, values, (0.1, 0.3, 0.7), "mIoU", marked={"o": (0.1, 0.5)})
    assert found is ax and ax.get_xlabel() == "beta_h" and ax.get_ylabel() == "beta_l"
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "10", (1, 0): "25", (2, 0): "30", (1, 1): "40", (2, 1): "50", (2, 2): "60"}  # x is beta_h
    assert points(ax.lines[0]) == [(pytest.approx(1.5), 0)]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.1", "0.3", "0.7"]
    fresh = plt.figure().add_subplot()
    viz.threshold_heatmap(fresh, values - 0.5, (0.1, 0.3, 0.7), "gain", difference=True)
    assert fresh.images[0].get_clim() == (pytest.approx(-40), pytest.approx(40))
    assert "+10" in [text.get_text() for text in fresh.texts]
    viz.threshold_heatmap(plt.figure().add_subplot(), np.full((2, 2), np.nan), (0.1, 0.2), "nothing", difference=True)


def test_composition_bars(ax):
    shares = np.array([[0.3, 0.1, 0.0], [0.1, 0.1, 0.0], [0.1, 0.2, 0.1]])
    assert viz.composition_bars(ax, {"seed": shares, "PAR": np.zeros((3, 3))}) is ax
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths[:9], [75, 25, 0, 50, 50, 0, 25, 50, 25])
    assert widths[9:] == [0] * 9
    assert [tick.get_text() for tick in ax.get_yticklabels()][:3] == [
        "seed: background",
        "seed: uncertain",
        "seed: a class",
    ]
    assert "40 % of all pixels" in [text.get_text() for text in ax.texts]


def test_region_colours():
    region = np.array([[0, 1, 2]])
    colours = viz.region_colours(region)[0]
    assert colours[0].tolist() == [0, 0, 0] and colours[2].tolist() == [255, 255, 255]
    assert tuple(colours[1].tolist()) in viz.IGNORE_GREYS


def test_crop_boxes(ax):
    assert viz.crop_boxes(ax, image(20, 30), [(2, 11), (5, 0)], 8, [True, False], "crops") is ax
    drawn = [p for p in ax.patches if p.get_linewidth() < 3]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in drawn] == [
        (10.5, 1.5, 8, 8),
        (-0.5, 4.5, 8, 8),
    ]
    assert [plt.matplotlib.colors.to_hex(p.get_edgecolor()) for p in drawn] == list(viz.FLAG_COLOURS.values())
    assert [text.get_text() for text in ax.texts] == ["1", "2"]


def test_logit_matrix(ax):
    logits = np.array([[1.0, 0.5], [0.5, 1.0], [0.1, -2.0], [0.3, 0.4]])
    assert viz.logit_matrix(ax, logits, [True, False], "logits") is ax
    assert ax.images[0].get_clim() == (-2, 2)
    ticks = {tick.get_text(): tick.get_color() for tick in ax.get_yticklabels()}
    assert list(ticks) == ["global 1", "global 2", "crop 1", "crop 2"]
    assert ticks["crop 1"] == viz.FLAG_COLOURS[True] and ticks["crop 2"] == viz.FLAG_COLOURS[False]
    assert "-2.00" in [text.get_text() for text in ax.texts]
    viz.logit_matrix(plt.figure().add_subplot(), np.zeros((2, 2)), [], "no crops")


def test_crop_curves(ax):
    scores = [SimpleNamespace(positive=0.2, positive_right=0.5), SimpleNamespace(positive=0.1, positive_right=0.75)]
    assert viz.crop_curves(ax, [8, 16], scores, ["positive", "positive_right"], xlabel="pixels", marked=16) is ax
    assert points(ax.lines[0]) == [(8, 20), (16, 10)] and points(ax.lines[1]) == [(8, 50), (16, 75)]
    assert list(ax.lines[2].get_xdata()) == [16, 16]


NAMES_OF_STRANGERS = ("$x^{$", "cash$1 and $2", "\\frac{1}{0}", "100%s", "{0}", "a\nb", "caf\udce9")


@pytest.mark.parametrize("name", NAMES_OF_STRANGERS)
def test_a_name_is_no_formula(name):
    """Without the theme, too, and in axes that were there before; nor does a name that no font can show stop a figure,
    whose ticks are labelled anew by each drawing."""
    image, names = np.zeros((20, 24, 3), np.uint8), ("background", name, "dog")
    drawn = [
        viz.show(plt.subplots()[1], image, name),
        viz.picture_rows([[image, image]], ["a", name], names=[name]),
        viz.class_legend(plt.figure(), names, [1, 2]),
        viz.contact_sheet([image, image], [name, name]),
        viz.label_histogram(plt.subplots()[1], {name: [3, 4]}, names),
        viz.class_bars(plt.subplots()[1], names, {name: [1.0, 2, 3]}, title=name),
        viz.confusion_matrix(plt.subplots()[1], np.ones((3, 3), int), names, title=name),
        viz.logit_matrix(plt.subplots()[1], np.ones((4, 2)), [True] * 2, name),
        viz.token_similarity(plt.subplots()[1], {name: [0.1, 0.2, 0.3]}),
    ]
    for one in drawn:
        (one if isinstance(one, Figure) else one.figure).savefig(io.BytesIO(), format="png", dpi=20)
        shown = name.encode(errors="replace").decode()  # what is no text has question marks
        assert any(shown in text.get_text() for text in one.findobj(Text))
    plt.close("all")


def test_classes_in_label_maps():
    one, other = np.array([[0, 7, 255], [7, 2, 2]], np.uint8), np.array([[0, 19]], np.uint8)
    assert classes_in(one, other) == [2, 7, 19] and all(type(k) is int for k in classes_in(one))
    assert classes_in() == [] == classes_in(np.array([[0, 255]]))
