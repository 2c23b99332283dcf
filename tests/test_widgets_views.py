"""The explorer's views side by side, its curtain and its chips of classes."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from test_widgets import folder, make_subject, session, subject  # noqa: F401  fixtures

from toco_core.conventions import voc_palette
from toco_core.errors import ToCoError
from toco_core.widgets import Explorer, Session, draw
from toco_core.widgets.session import Tile
from toco_core.widgets.settings import LABELS, SHOWN, Settings, changed, fields_seen

CHANGES = {
    "cam": "auxiliary", "block": 1, "cam_scales": (0.5,), "flip": False, "strength": 0.2, "contours": False,
    "class_colours": False, "beta": 0.9, "beta_l": 0.05, "beta_h": 0.95, "par_iterations": 1, "par_dilations": (1,),
    "par_scale": 1.0, "crf": True,
}  # fmt: skip


def pictures_of(explorer):
    return [
        np.asarray(Image.open(io.BytesIO(explorer.tiles.canvases[i].picture)))
        for i in range(len(explorer.tiles.row.children))
    ]


# ---- what changes a picture


@pytest.mark.parametrize("colour", [draw.LIGHT, draw.LOWER])
def test_kept_lines_are_those_drawn_on_the_picture(colour):
    label = np.kron(np.random.default_rng(1).choice([0, 1, 3, 255], (7, 5)), np.ones((9, 13))).astype(np.uint8)
    picture = np.random.default_rng(2).integers(0, 256, (63, 65, 3), np.uint8)
    before, wanted = picture.copy(), picture.copy()
    for k in (1, 3, 255):
        lines, _ = cv2.findContours((label == k).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(wanted, lines, -1, draw.DARK, 3)
        cv2.drawContours(wanted, lines, -1, colour, 1)
    for _ in range(2):
        np.testing.assert_array_equal(draw.with_regions(picture, label, colour=colour), wanted)
        np.testing.assert_array_equal(picture, before)
        assert draw.labels_in(label) == [0, 1, 3, 255]


@pytest.mark.parametrize("show", SHOWN)
def test_fields_that_change_a_picture_are_known(session, show):  # noqa: F811
    """The others change nothing, bit for bit; each of these can."""
    session.set(classes="all", cam="block" if "label" in show else "final", block=2, outline=False)
    settings = changed(session.sides[0].settings, show=show)
    seen = fields_seen(settings)
    session.set(show=show)
    before = session.view(0).picture
    for name, value in CHANGES.items():
        session.sides = [session.sides[0].__class__("model", changed(settings, **{name: value}))]
        same = np.array_equal(session.view(0).picture, before)
        assert same or name in seen, f"{show}: {name} changes the picture"
        if name in ("strength", "contours", "beta_h", "beta", "class_colours") and name in seen:
            assert not same, f"{show}: {name} changes nothing"


def test_thresholds_of_a_cam_are_seen_in_its_contours_only():
    settings = Settings(show="CAM")
    assert "beta_h" in fields_seen(settings) and "beta_h" not in fields_seen(changed(settings, contours=False))
    assert "block" not in fields_seen(settings) and "block" in fields_seen(changed(settings, cam="block"))


# ---- side by side


def test_a_row_shows_the_views_in_order(session):  # noqa: F811
    explorer = Explorer(session)
    shown = [tile.show for tile in session.tiles()]
    assert shown == ["image", "CAM", "pseudo label", "ground truth"]
    for tile, picture in zip(session.tiles(), pictures_of(explorer), strict=True):
        wanted = session.view(0, tile.show).picture
        assert picture.shape == wanted.shape and np.abs(picture.astype(int) - wanted).mean() < 4
    titles = [explorer.tiles.canvases[i].title for i in range(4)]
    miou = 100 * session.numbers(0, "pseudo label").scores.miou
    assert titles == ["image", "CAM", f"pseudo label · {miou:.0f} % mIoU", "ground truth"]
    assert [explorer.tiles.canvases[i].chosen for i in range(4)] == [False, True, False, False]
    assert len({canvas.group for canvas in explorer.tiles.canvases}) == 1 and explorer.tiles.canvases[0].group
    explorer.tiles.views.toggled = ["seed label", 1]
    explorer.tiles.views.toggled = ["ground truth", 2]
    assert [tile.show for tile in session.tiles()] == ["image", "CAM", "seed label", "pseudo label"]
    assert [item["name"] for item in explorer.tiles.views.items if item["on"]] == [t.show for t in session.tiles()]
    explorer.controls.of["show"].value = "segmentation"  # what is scored is always seen
    assert session.tiles()[-1].show == "segmentation"


def test_only_what_changes_is_drawn_again(session):  # noqa: F811
    explorer = Explorer(session)
    sent = {i: [] for i in range(4)}
    for i in range(4):
        explorer.tiles.canvases[i].observe(lambda change, i=i: sent[i].append(change["new"]), "picture")
    explorer.controls.of["beta_h"].value = 0.52
    assert [len(sent[i]) for i in range(4)] == [0, 1, 1, 0]  # contours of the CAM, and the label
    explorer.controls.of["strength"].value = 0.2
    assert [len(sent[i]) for i in range(4)] == [0, 1, 1, 0]  # mixed in the browser
    explorer.controls.of["outline"].value = True
    assert [len(sent[i]) for i in range(4)] == [1, 2, 2, 1]
    explorer.controls.of["head"].value = 1
    assert [len(sent[i]) for i in range(4)] == [1, 2, 2, 1]


@pytest.mark.parametrize("class_colours", [True, False])
def test_an_overlay_that_grows_stronger_is_drawn_once(session, class_colours):  # noqa: F811
    """Its two ends, mixed as a browser does, are the picture at every strength, lines and frames with it."""
    session.set(classes="predicted", class_colours=class_colours, contours=True, outline=True)
    session.place = (0.3, 0.6)
    explorer = Explorer(session)
    canvases, sent = explorer.tiles.canvases, []
    for i in range(4):
        canvases[i].observe(lambda change: sent.append(change["name"]), ["picture", "ends"])
    for strength in (0.1, 0.45, 0.9):
        explorer.controls.of["strength"].value = strength
        for i, tile in enumerate(session.tiles()):
            if tile.show == "image":
                assert canvases[i].ends == []
                continue
            low, high = (np.asarray(Image.open(io.BytesIO(end))).astype(np.float64) for end in canvases[i].ends)
            mixed, drawn = (1 - canvases[i].strength) * low + canvases[i].strength * high, session.view(0, tile.show)
            assert canvases[i].strength == strength and np.abs(mixed - drawn.picture).mean() < 3  # it is a JPEG
    assert sent == ["ends"] * 3
    explorer.controls.of["beta_h"].value = 0.52
    assert canvases[1].ends == canvases[2].ends == [] and canvases[3].ends
    assert canvases[1].picture == draw.encoded(session.view(0, "CAM").picture)


def test_the_overlay_of_a_curtain_is_drawn_anew(session):  # noqa: F811
    session.arrange_views("curtain")
    explorer = Explorer(session)
    canvas = explorer.tiles.canvases[0]
    before = canvas.under
    explorer.controls.of["strength"].value = 0.1
    assert canvas.under != before and canvas.ends == []
    assert canvas.under == draw.encoded(session.view(*session.curtain_tiles()[1]).picture)


def test_two_models_side_by_side(session):  # noqa: F811
    explorer = Explorer(session)
    explorer.compare.value = True
    explorer.side.value = 1
    explorer.model.value = "other"
    names = [session.tile_name(tile) for tile in session.tiles()]
    assert names == ["image", "A: CAM", "B: CAM", "A: pseudo label", "B: pseudo label", "ground truth"]
    pictures = pictures_of(explorer)
    assert (pictures[1] != pictures[2]).any() and "A: model" in explorer.tiles.legends[1].value
    explorer.tiles.canvases[2].pointer = [0.5, 0.5]
    assert session.read_out(1, 0.5, 0.5) != session.read_out(0, 0.5, 0.5)
    assert session.read_out(1, 0.5, 0.5).split(" · ")[1] in explorer.tiles.reading.value


def test_no_tile_for_a_truth_that_is_not_there(session):  # noqa: F811
    session.picture = session.picture._replace(mask=None)
    assert [tile.show for tile in session.tiles()] == ["image", "CAM", "pseudo label"]


def test_a_tile_is_enlarged_and_all_come_back(session):  # noqa: F811
    explorer = Explorer(session)
    explorer.tiles.canvases[2].enlarge = 1
    assert (
        session.arrange == explorer.tiles.arrange.value == "one"
        and explorer.controls.of["show"].value == "pseudo label"
    )
    assert len(explorer.tiles.row.children) == 1 and explorer.tiles.canvases[0].title.startswith("pseudo label")
    explorer.tiles.canvases[0].enlarge = 1
    assert session.arrange == "side by side" and len(explorer.tiles.row.children) == 4
    explorer.tiles.arrange.value = "one"
    assert explorer.tiles.views.disabled and len(explorer.tiles.row.children) == 1


def test_a_pin_marks_the_place_in_all_views(session):  # noqa: F811
    explorer = Explorer(session)
    explorer.tiles.canvases[3].click = [0.25, 0.75, 1]
    assert [explorer.tiles.canvases[i].pin for i in range(4)] == [[0.25, 0.75]] * 4


# ---- curtain


def test_a_curtain_divides_any_two_views(session):  # noqa: F811
    explorer = Explorer(session)
    explorer.tiles.arrange.value = "curtain"
    canvas = explorer.tiles.canvases[0]
    assert len(explorer.tiles.row.children) == 1 and [d.value for d in explorer.tiles.curtain] == ["image", "CAM"]
    explorer.tiles.curtain[0].value = "ground truth"
    explorer.tiles.curtain[1].value = "seed label"
    for data, show in ((canvas.picture, "ground truth"), (canvas.under, "seed label")):
        assert data == draw.encoded(session.view(0, show).picture)
    assert canvas.title.startswith("ground truth | seed label")
    before = canvas.under
    explorer.controls.of["beta_h"].value = 0.33  # what is under it follows, too
    assert canvas.under != before and not explorer.controls.of["beta_h"].disabled
    explorer.compare.value = True
    explorer.side.value = 1
    explorer.model.value = "other"
    explorer.tiles.curtain[0].value, explorer.tiles.curtain[1].value = "A: CAM", "B: CAM"
    assert session.curtain_tiles() == (Tile(0, "CAM"), Tile(1, "CAM"))
    explorer.tiles.arrange.value = "side by side"
    assert canvas.under == b""


def test_a_curtain_outlives_comparing(session):  # noqa: F811
    """Its tiles have a side's letter only while there are two."""
    explorer = Explorer(session)
    explorer.tiles.arrange.value = "curtain"
    explorer.tiles.curtain[1].value = "seed label"
    explorer.compare.value = True
    assert session.curtain == ("image", "A: seed label") and session.curtain_tiles() == (
        (0, "image"),
        (0, "seed label"),
    )
    explorer.tiles.arrange.value = "side by side"
    assert session.arrange == "side by side" and explorer.notes.value == ""
    explorer.tiles.arrange.value = "curtain"
    explorer.compare.value = False
    assert session.curtain == ("image", "seed label")
    explorer.compare.value = True
    explorer.tiles.curtain[0].value = "B: CAM"
    explorer.compare.value = False  # a tile that is not there any more
    assert session.curtain == ("", "") and session.curtain_tiles() == ((0, "image"), (0, "CAM"))
    explorer.tiles.arrange.value = "one"
    assert session.arrange == "one" and explorer.notes.value == ""
    again = Session(session.pictures, session.subjects)
    again.restore(session.parameters())
    assert again.arrange == "one"


def test_arrangement_is_a_parameter(session):  # noqa: F811
    session.arrange_views("curtain", views="CAM, image", curtain="ground truth,CAM")
    found = session.parameters()
    assert found["views"] == "image,CAM" and found["curtain"] == "ground truth,CAM" and found["arrange"] == "curtain"
    again = Session(session.pictures, session.subjects)
    assert not {"views", "arrange", "curtain"} & set(again.parameters())
    again.restore(found)
    assert (again.views, again.arrange, again.curtain) == (session.views, session.arrange, session.curtain)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arrange": "stacked"}, "arrange = 'stacked' is not allowed: one of side by side"),
        ({"views": "CAM,masks"}, "views = 'CAM,masks' is not allowed: some of image"),
        ({"views": ()}, "views"),
        ({"views": 5}, "views = 5 is not allowed"),
        ({"views": ["CAM", {}]}, "views"),
        ({"curtain": 7.5}, "curtain = 7.5 is not allowed"),
        ({"curtain": "CAM"}, "curtain = 'CAM' is not allowed: two of image"),
        ({"curtain": "CAM,B: CAM"}, "curtain"),
    ],
)
def test_wrong_arrangements_are_refused(session, values, words):  # noqa: F811
    before = session.arrange, session.views, session.curtain
    with pytest.raises(ToCoError, match=words):
        session.arrange_views(**values)
    assert (session.arrange, session.views, session.curtain) == before


def test_the_last_view_stays(session):  # noqa: F811
    explorer = Explorer(session)
    for i, view in enumerate(session.views):
        explorer.tiles.views.toggled = [view, i]
    assert "one view at least stays" in explorer.notes.value and session.views == ("ground truth",)


# ---- chips


def test_chips_have_colour_and_score_and_are_toggled(session):  # noqa: F811
    explorer = Explorer(session)
    items = {item["name"]: item for item in explorer.controls.classes.items}
    assert list(items) == ["cat", "dog", "sheep"]
    scores = session.analysis(0).class_scores
    for k, (name, item) in enumerate(items.items(), 1):
        assert item["number"] == f"{scores[k - 1]:.2f}" and item["on"] == (name == "cat")
        assert item["colour"] == "rgb({},{},{})".format(*voc_palette()[k])
    explorer.controls.classes.toggled = ["sheep", 1]
    assert session.classes(0)[0] == (1, 3) and explorer.controls.class_names.value == ("cat", "sheep")
    assert [item["on"] for item in explorer.controls.classes.items] == [True, False, True]
    explorer.controls.classes.toggled = ["cat", 2]
    explorer.controls.classes.toggled = ["sheep", 3]  # the last one goes out, too
    assert session.classes(0) == ((), ()) and explorer.controls.class_choice.value == "none"
    assert not any(item["on"] for item in explorer.controls.classes.items)
    explorer.controls.classes.toggled = ["dog", 4]
    assert session.classes(0)[0] == (2,) and session.sides[0].settings.classes == "dog"


def test_chips_follow_image_and_model(session):  # noqa: F811
    session.subjects.add(make_subject("few", class_names=("background", "dog"), seed=3))
    explorer = Explorer(session)
    explorer.finder.film.wanted = [1, 1]
    assert [item["on"] for item in explorer.controls.classes.items] == [False, True, False]
    explorer.model.value = "few"
    assert [bool(item["number"]) for item in explorer.controls.classes.items] == [False, True, False]
    assert "does not know it" in explorer.controls.classes.items[0]["tip"]


def test_classes_in_their_own_colours(session):  # noqa: F811
    """Seen from the equation: colours mixed by the values, covering by the largest."""
    session.set(show="CAM", classes="cat,sheep", contours=False, strength=0.8)
    picture = session.view(0).picture
    analysis, size = session.analysis(0), picture.shape[:2]
    maps = analysis.cams(session.sides[0].settings, (1, 3))[0].numpy()
    one, three = (draw.resized(cam, size, smooth=True) for cam in maps)
    ground = draw.ground(draw.enlarged(session.picture.image, size)).astype(float)
    for y, x in ((17, 90), (200, 31), (240, 250), (101, 7)):
        a, b = float(one[y, x]), float(three[y, x])
        colour = (a * voc_palette()[1] + b * voc_palette()[3]) / max(a + b, 1e-6)
        share = 0.8 * max(a, b)
        np.testing.assert_allclose(picture[y, x], (1 - share) * ground[y, x] + share * colour, atol=1.6)
    session.set(class_colours=False)
    assert (session.view(0).picture != picture).any()


def test_labels_that_are_kept_are_those_that_are_asked_for(session):  # noqa: F811
    """Label maps are kept for a while: another threshold, class or image must not get an old one."""
    found = {}
    for beta_h in (0.5, 0.6, 0.5):
        for classes in ("cat", "all"):
            for image in (0, 1):
                session.go(image)
                session.set(beta_l=0.2, beta_h=beta_h, classes=classes)
                fresh = Session(session.pictures, session.subjects)
                fresh.go(image)
                fresh.sides = list(session.sides)
                for show in LABELS[:3]:
                    np.testing.assert_array_equal(session.label(0, show), fresh.label(0, show))
                    found[image, beta_h, classes, show] = session.label(0, show)
    assert (found[0, 0.5, "all", "seed label"] != found[0, 0.6, "all", "seed label"]).any()
