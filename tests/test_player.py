"""What can be played: every frame is what the explorer shows under that setting, and files hold all frames."""

import io

import numpy as np
import pytest
from killed_training import config_of
from PIL import Image
from test_widgets import make_subject
from voc_folder import write_voc_folder

from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.train.film import read_film
from toco_core.train.loop import train
from toco_core.widgets import Session, Subjects, draw, open_pictures, open_subject
from toco_core.widgets.movies import PAR_ITERATIONS, movies_of, over_blocks, over_par, over_training
from toco_core.widgets.player import Player


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_voc_folder(tmp_path_factory.mktemp("player") / "photos", splits={"train": range(6), "val": range(6)})


@pytest.fixture
def session(folder):
    subjects = Subjects()
    subjects.add(make_subject())
    return Session(open_pictures(folder), subjects)


@pytest.mark.parametrize("show", ["CAM", "seed label", "image"])
def test_over_the_blocks(session, show):
    session.set(show=show, strength=0.5)
    movie = over_blocks(session)
    assert movie.captions == ("block 1 of 3", "block 2 of 3", "block 3 of 3") and movie.begins_at == 2
    for i in range(3):
        session.set(show="CAM" if show == "image" else show, cam="block", block=i + 1)
        np.testing.assert_array_equal(movie.frame(i), session.view(0).picture)
    session.go(1)
    assert movie.frame(0) is movie.frame(0) and len({movie.frame(i).tobytes() for i in range(3)}) == 3


def test_a_snapshot_and_its_session_do_not_move_each_other(session):
    session.click(0.2, 0.3)
    session.place_crop(0.5, 0.5)
    session.set(show="seed label", beta_h=0.4)
    before = session.view(0)
    still = session.snapshot(0)
    assert still.place is None and still.centres == [] and still.analysis(0) is session.analysis(0)
    still.set(beta_h=0.9, show="CAM")
    still.go(3)
    assert session.picture.name == "img_0" and session.sides[0].settings.beta_h == 0.4 and session.centres
    np.testing.assert_array_equal(session.view(0).picture, before.picture)
    session.go(2)
    session.set(beta_h=0.5)
    assert still.picture.name == "img_3" and still.sides[0].settings.beta_h == 0.9


def test_over_par_stays_with_its_image(session):
    session.click(0.2, 0.3)
    movie = over_par(session)
    session.place = None
    first = session.picture.name
    session.go(2)
    frames = [movie.frame(i) for i in range(len(movie))]
    session.go(first)
    for i, n in enumerate(PAR_ITERATIONS):
        session.set(show="pseudo label", par_iterations=n)
        np.testing.assert_array_equal(frames[i], session.view(0).picture)
    assert len({frame.tobytes() for frame in frames}) > 3


def test_over_the_training(tmp_path, folder):
    config = override(config_of(str(folder), tmp_path / "runs"), steps=2, eval_interval=0)
    run = train(config, progress=False).run.folder
    subjects = Subjects()
    subjects.add(open_subject(run))
    session = Session(open_pictures(folder), subjects)
    assert list(movies_of(session)) == ["over the blocks", "over PAR's iterations"]
    train(config, film=1, resume=False, progress=False)
    assert list(movies_of(session))[2:] == ["over the training, CAM", "over the training, segmentation"]
    movie, film = over_training(run), read_film(run)
    assert movie.captions == ("step 0", "step 1", "step 2") and movie.begins_at == 2
    np.testing.assert_array_equal(movie.frame(1), film.picture(1))


def test_a_model_without_classifier_says_so(folder):
    subjects = Subjects()
    subjects.add(make_subject(has=frozenset()))
    session = Session(open_pictures(folder), subjects)
    with pytest.raises(ToCoError, match="no trained classifier"):
        over_blocks(session).frame(0)
    player = Player(session)
    assert "no trained classifier" in player.notes.value and player.image.value == b""


def shown(player):
    return np.asarray(Image.open(io.BytesIO(player.image.value)))


def test_player_shows_what_is_chosen(session):
    player = Player(session)
    player.settle()
    assert player.at.max == player.play.max == 2 and player.at.value == 2
    assert sorted(player.movie._kept) == [0, 1, 2] and "block 3 of 3" in player.caption.value
    before = player.image.value
    player.at.value = 0
    assert (
        player.image.value == draw.encoded(player.movie.frame(0)) != before and "block 1 of 3" in player.caption.value
    )
    player.what.value = "over PAR's iterations"
    player.settle()
    assert player.at.max == len(PAR_ITERATIONS) - 1 and player.at.value == 0
    assert shown(player).shape == player.movie.frame(0).shape
    session.go(1)
    player.renew.click()
    player.settle()
    assert player.movie.title.startswith(session.picture.name) and player.what.value == "over PAR's iterations"


@pytest.mark.parametrize("kind", [0, 1])
def test_player_saves_all_frames(session, tmp_path, kind):
    told = []
    player = Player(session, folder=tmp_path / "kept", on_saved=told.append)
    player.saves[kind].click()
    player.settle()
    if "no codec" in player.notes.value:
        pytest.skip("OpenCV writes no MP4 here")
    (path,) = told
    assert path.parent == tmp_path / "kept" and f"saved kept/{path.name}" in player.notes.value
    if kind == 0:
        with Image.open(path) as found:
            assert found.n_frames == 3
    else:
        assert path.stat().st_size > 1000


def test_files_are_downloads_where_the_notebook_is_served(session, tmp_path):
    sent = []
    player = Player(session, folder=tmp_path / "kept", may_save=False, offer=lambda *told: sent.append(told))
    assert not any(button.disabled for button in player.saves)
    player.saves[0].click()
    player.settle()
    ((name, data, kind),) = sent
    assert name == "img_0-CAM-blocks.gif" and kind == "image/gif"
    with Image.open(io.BytesIO(data)) as movie:
        assert movie.n_frames == 3
    assert f"downloaded {name}" in player.notes.value and not (tmp_path / "kept").exists()


def test_where_nothing_may_be_saved(session, tmp_path):
    player = Player(session, folder=tmp_path / "kept", may_save=False)
    assert all(button.disabled for button in player.saves)
    player.saves[0].click()
    player.settle()
    assert "nothing is saved" in player.notes.value and not (tmp_path / "kept").exists()
