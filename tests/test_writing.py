"""Files from this package: whole or not at all, nobody else's, readable by others, and one line where that fails."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_training import config_of
from PIL import Image
from small_config import stirred_named
from voc_folder import CLASSES, smooth_image, write_voc_folder

from toco_core.commands.export import export_command
from toco_core.commands.notebooks import copy_notebooks
from toco_core.config import override, tiny
from toco_core.data import VOC_CLASSES, open_source, scenes
from toco_core.data.layouts.tags import write_tag_list
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate
from toco_core.evaluation.scores import score_run
from toco_core.machine import locks as locks_module
from toco_core.machine.locks import alone
from toco_core.machine.writing import (
    place_file,
    remove_parts,
    whole_file,
    whole_folder,
    write_file,
    write_whole,
    writing,
)
from toco_core.predict.class_maps import cams
from toco_core.predict.export import export, voc_archive
from toco_core.predict.image import ImagePredictor
from toco_core.predict.page import write_page
from toco_core.runs.folder import Run
from toco_core.runs.hub import save_pretrained, write_pretrained
from toco_core.runs.opened import open_run
from toco_core.runs.release import save_release
from toco_core.train.loop import train
from toco_core.viz.movie import write_movie

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="rights, limits and links of POSIX")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


@pytest.fixture
def root(tmp_path):
    return write_voc_folder(tmp_path / "data", n=4)


@pytest.fixture
def trained(root, tmp_path):
    config = override(config_of(str(root), tmp_path / "runs"), steps=1, warmup_steps=0, eval_interval=0)
    return train(config, progress=False), config


def limited(size, call):
    """What `call` comes to in a process whose files may not grow beyond `size` bytes: as on a full disk."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            theirs.send(("ok", str(call())))
        except BaseException as error:  # noqa: BLE001
            theirs.send((type(error).__name__, str(error)))

    process = context.Process(target=child)
    process.start()
    found = ours.recv()
    process.join()
    return found


# ---- one file


@POSIX
def test_a_part_follows_no_link(tmp_path):
    """A run folder from a stranger, whose links have the names that parts had: nothing of mine is overwritten."""
    mine, folder = tmp_path / "mine", tmp_path / "theirs"
    mine.write_text("precious")
    folder.mkdir()
    for name in ("scores.json", "manifest.json", "config.json", "metrics.json", "metrics.jsonl", "checkpoint"):
        (folder / f"{name}.part").symlink_to(mine)
        if name != "checkpoint":
            (folder / name).symlink_to(mine)
    run = Run(folder)
    run.begin(tiny())
    run.log({"step": 0})
    run.keep_records_before(5)
    run.save({"model": {}, "optimizer": {}, "step": 1})
    run.finish({"steps": 1})
    run.keep_scores({})
    assert mine.read_text() == "precious" and not any(path.is_symlink() for path in folder.iterdir())
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(ToCoError, match="out_dir: cannot write to"):
        run.log({"step": 1})
    assert mine.read_text() == "precious"


@POSIX
def test_nothing_behind_a_link_to_a_folder_is_written_or_removed(trained, root, tmp_path):
    found, config = trained
    source, mine, other = open_source(root), tmp_path / "pictures", override(config, seed=7)
    (mine / "deep").mkdir(parents=True)
    (mine / "img_0.png").write_text("precious")
    calls = {
        "begun/film": lambda: Run(tmp_path / "begun").begin(config),
        f"{Run.of(other).folder}/film": lambda: train(other, progress=False, film=1),
        f"{found.run.folder}/film/deep": lambda: train(config, progress=False, resume=False),
        "out/JPEGImages": lambda: export(found.model, source, tmp_path / "out", config, method="cam", progress=False),
        "kept/counts": lambda: evaluate(found.model, source, size=32, keep=tmp_path / "kept", progress=False),
    }
    for place, call in calls.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(mine)
        with pytest.raises(ToCoError, match=rf"^{tmp_path / place} is a link to a folder: .* remove the link$"):
            call()
        assert files(mine) == ["deep", "img_0.png"] and (mine / "img_0.png").read_text() == "precious", place
        (tmp_path / place).unlink()
        call()
        assert files(mine) == ["deep", "img_0.png"], place


def test_what_fails_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "before")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "before" and files(tmp_path) == ["a.json"]
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder") as part:
        write_whole(part / "x", "half")
        raise KeyError
    assert files(tmp_path) == ["a.json"]


@POSIX
def test_new_files_and_folders_have_the_usual_rights(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", "x")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_the_longest_names_have_room_for_a_part(tmp_path):
    for name in ("x" * 251 + ".png", "ü" * 125 + ".png"):
        write_whole(tmp_path / name, "whole")
        place_file(tmp_path / name, tmp_path / f"2{name[1:]}")
        assert (tmp_path / f"2{name[1:]}").read_text() == "whole"


def test_the_folder_is_flushed_after_its_file(tmp_path, monkeypatch):
    calls, plain = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(stat.S_ISDIR(os.fstat(handle).st_mode)) or plain(handle)
    )
    write_whole(tmp_path / "file", "x")
    assert calls == [False, True]


def test_a_link_is_placed_as_what_it_leads_to(tmp_path):
    """A data set that is a farm of relative links."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.jpg").write_bytes(b"picture")
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "a.jpg").symlink_to(Path("../far/a.jpg"))
    for link in (True, False):
        (tmp_path / f"{link}").mkdir()
        for _ in range(2):
            place_file(tmp_path / "farm" / "a.jpg", tmp_path / f"{link}" / "a.jpg", link=link)
        assert files(tmp_path / f"{link}") == ["a.jpg"]
        placed = tmp_path / f"{link}" / "a.jpg"
        assert placed.read_bytes() == b"picture" and not placed.is_symlink()
        assert placed.samefile(tmp_path / "far" / "a.jpg") == link


def test_exports_of_links_hold_files(root, tmp_path, trained):
    farm = tmp_path / "farm" / "data"
    for path in root.rglob("*"):
        if path.is_file():
            (farm / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (farm / path.relative_to(root)).symlink_to(os.path.relpath(path, (farm / path.relative_to(root)).parent))
    found, config = trained
    export(found.model, open_source(farm), tmp_path / "out", config, method="cam", progress=False)
    for path in (tmp_path / "out" / "JPEGImages").iterdir():
        assert not path.is_symlink() and path.read_bytes() == (root / "JPEGImages" / path.name).read_bytes()


@POSIX
def test_a_file_of_the_user_s_is_written_whole_and_through_no_link(tmp_path):
    """Whatever has a path from the user: what is behind a link of that name stays, a pipe is replaced."""
    model = stirred_named(CLASSES)
    predictor = ImagePredictor(model.model, model.config)
    predictor.set_image(smooth_image(20, 30, 1))
    maps = cams(smooth_image(20, 30, 1), model)
    calls = {
        "a.html": lambda path: write_page(predictor, path, title="a", class_names=model.class_names),
        "a.gif": lambda path: write_movie([smooth_image(20, 30, 1)] * 2, path),
        "a.png": maps.save,
        "a.jpg": maps.save,
        "a.pth": lambda path: save_release(model.model, path),
        "train.ipynb": lambda path: copy_notebooks(path.parent, ("train",), overwrite=True),
    }
    (tmp_path / "mine").write_text("precious")
    for name, write in calls.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        for make in (lambda path: path.symlink_to(tmp_path / "mine"), lambda path: path.symlink_to("gone"), os.mkfifo):
            make(path)
            write(path)
            assert path.is_file() and not path.is_symlink() and (tmp_path / "mine").read_text() == "precious", name
            path.unlink()
        path.write_text("before")
        kind, message = limited(10, lambda: write(path))
        assert (kind, message) == ("ToCoError", f"cannot write to {path}: File too large"), name
        assert path.read_text() == "before", name
        path.unlink()
        path.mkdir()
        with pytest.raises(ToCoError, match=f"^cannot write to {path}: Is a directory$"):
            write(path)
        assert files(path.parent) == [name], name
        path.rmdir()


@pytest.mark.parametrize("name", ["", ".", "..", "folder"])
def test_what_is_no_name_of_a_file_is_told(tmp_path, monkeypatch, name):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folder")
    place = tmp_path / name if name == "folder" else Path(name)
    with pytest.raises(ToCoError, match="^cannot write to .*: Is a directory$"):
        write_file(place, "x")
    assert files(tmp_path) == ["folder", "folder/below"]
    with pytest.raises(ToCoError, match="^cannot write to .*: "), writing(place), whole_folder(place) as part:
        (part / "x").touch()
    assert files(tmp_path) == ["folder", "folder/below"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_no_file_can_be_called_is_told(tmp_path, name):
    with pytest.raises(ToCoError, match="^cannot write to .*: .*(null (byte|character)|surrogates)"):
        write_file(tmp_path / name, "x")


# ---- two at once


def at_once(n, call):
    """What `n` processes that begin at the same time come to."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(n), context.SimpleQueue()

    def child():
        barrier.wait()
        try:
            call()
            results.put("ok")
        except BaseException as error:  # noqa: BLE001
            results.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=child) for _ in range(n)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


@POSIX
def test_three_at_once_do_not_disturb_each_other(trained, tmp_path):
    found, config = trained
    source = open_source(config.data.dataset)
    calls = {
        "export": lambda: export(found.model, source, tmp_path / "out", config, method="cam", progress=False),
        "keep": lambda: evaluate(found.model, source, size=32, keep=tmp_path / "kept", progress=False),
        "share": lambda: save_pretrained(found.run, tmp_path / "shared"),
        "write": lambda: [write_whole(tmp_path / "one.json", f"{i}" * 1000) for i in range(40)],
    }
    for name, call in calls.items():
        assert at_once(3, call) == ["ok"] * 3, name
        assert not [path for path in files(tmp_path) if path.endswith(".part")], name
    plain = evaluate(found.model, source, size=32, progress=False)
    again = evaluate(found.model, source, size=32, keep=tmp_path / "kept", progress=False)
    np.testing.assert_array_equal(plain.cam.counts, again.cam.counts)


@POSIX
def test_a_lock_keeps_others_out_and_is_gone(tmp_path, monkeypatch, capfd):
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(locks_module, "_lock_path", lambda folder: locks / f"{folder.name}.lock")
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add():
        for _ in range(30):
            with alone(tmp_path / "run", "counts in"):
                number = int(counter.read_text())
                counter.write_text(f"{number + 1}")

    assert at_once(4, add) == ["ok"] * 4
    assert counter.read_text() == "120" and files(locks) == []
    assert "another process counts in run: waiting until it is done" in capfd.readouterr().out
    with alone(tmp_path / "run", "counts in"), pytest.raises(ToCoError, match="another process counts in run: start"):
        with alone(tmp_path / "run", "counts in", wait=False):
            pass
    monkeypatch.setattr(locks_module, "_lock_path", lambda folder: tmp_path / "nowhere" / "a.lock")
    with pytest.raises(ToCoError, match=r"the lock .*nowhere.* cannot be made: No such file.*set TMPDIR"):
        with alone(tmp_path / "run", "counts in"):
            pass


def test_who_holds_a_lock_does_not_wait_for_itself(tmp_path):
    with alone(tmp_path / "run", "trains"), alone(tmp_path / "run", "trains"):
        pass


@POSIX
def test_a_lock_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr(locks_module, "_lock_path", lambda folder: tmp_path / "a.lock")
    (tmp_path / "a.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ToCoError, match="the lock .* cannot be made: .*; remove it, or set TMPDIR"):
        with alone(tmp_path / "run", "trains"):
            pass
    assert (tmp_path / "precious").read_text() == "precious"


# ---- full disks and rights


@pytest.mark.slow
@POSIX
def test_a_full_disk_is_told_in_one_line(trained, root, tmp_path):
    found, config = trained
    source, folder = open_source(root), found.run.folder
    (tmp_path / "list").mkdir()
    calls = {
        "export": lambda: export(
            found.model, source, tmp_path / "e", config, method="cam", images="copy", progress=False
        ),
        "keep": lambda: evaluate(found.model, source, size=32, keep=tmp_path / "k", progress=False),
        "scores": lambda: score_run(open_run(folder), progress=False),
        "share": lambda: save_pretrained(folder, tmp_path / "shared"),
        "tags": lambda: write_tag_list(tmp_path / "list" / "t", {"train": source}),
        "log": lambda: Run(folder).log({"step": 1, "words": "x" * 100}),
        "checkpoint": lambda: Run(folder).save({"model": {"a": torch.zeros(99)}, "optimizer": {}, "step": 1}),
    }
    for name, call in calls.items():
        kind, message = limited(40, call)
        assert kind == "ToCoError" and "\n" not in message, (name, kind, message)
        assert "cannot write to" in message and "File too large" in message, (name, message)
        assert not [path for path in files(tmp_path) if path.endswith(".part")], name
    assert files(tmp_path / "list") == []

    def command():
        with contextlib.redirect_stdout(io.StringIO()):
            return export_command([str(folder), str(tmp_path / "cli"), "--method", "cam"])

    kind, message = limited(40, command)
    assert kind == "ToCoError" and "\n" not in message and "File too large" in message


@POSIX
def test_a_shared_folder_is_of_one_model_though_the_disk_is_full(tmp_path):
    """The card did not fit: new weights stayed beside the card of the old ones."""
    write_pretrained(tmp_path / "shared", {"a": torch.ones(3)}, tiny(), ["x"], "card")
    before = {path: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    other = {"a": torch.zeros(3)}, override(tiny(), seed=5), ["x"], "another card" * 2000
    assert limited(9000, lambda: write_pretrained(tmp_path / "shared", *other))[0] == "ToCoError"
    assert {path: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == before


@POSIX
def test_drawing_the_scenes_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path / "cache"))
    small = scenes.ScenesConfig(n_train=2, n_val=1, n_test=1)
    kind, message = limited(300, lambda: scenes.scenes_folder(small, progress=False))
    assert kind == "ToCoError" and "cannot be written to" in message and "set TOCO_CACHE" in message
    assert files(tmp_path / "cache") == []


def test_an_archive_that_fails_leaves_nothing(tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=2, classes=VOC_CLASSES)
    (tmp_path / "out").mkdir()
    with pytest.raises(ToCoError, match="holds 255"):
        voc_archive(root, tmp_path / "out" / "a.tgz", split="train")
    with pytest.raises(ToCoError, match="cannot write to .*nowhere/a.tgz: No such file"):
        voc_archive(root, tmp_path / "nowhere" / "a.tgz", split="train")
    with pytest.raises(ToCoError, match=r"cannot write to \.: Is a directory"):
        voc_archive(root, "", split="train")
    assert files(tmp_path / "out") == []
    for path in (root / "SegmentationClass").iterdir():
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(path)
    assert voc_archive(root, tmp_path / "out" / "a.tgz", split="train") == 2
    assert len(tarfile.open(tmp_path / "out" / "a.tgz").getnames()) == 2 and files(tmp_path / "out") == ["a.tgz"]


@POSIX
def test_killed_drawings_leave_nothing_for_good(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path))
    small = scenes.ScenesConfig(n_train=2, n_val=1, n_test=1)

    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(scenes, "write_scenes", dies)
            child = context.Process(target=lambda: scenes.scenes_folder(small, progress=False))
            child.start()
            child.join()
        assert len(list(tmp_path.iterdir())) == 1
    root = scenes.scenes_folder(small, progress=False)
    assert list(tmp_path.iterdir()) == [root]
    assert stat.S_IMODE(root.stat().st_mode) == 0o777 & ~_umask()


def _umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_parts_of_another_user_stay(tmp_path, monkeypatch):
    (tmp_path / "a.part").write_text("")
    monkeypatch.setattr(os, "getuid", lambda: 54321, raising=False)
    remove_parts(tmp_path)
    assert files(tmp_path) == ["a.part"]
    monkeypatch.undo()
    remove_parts(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EACCES, "Permission denied"), (errno.ENAMETOOLONG, "File name too long")]
)
def test_a_folder_that_cannot_be_looked_into_is_named(root, monkeypatch, code, words):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code), str(root / "JPEGImages"))

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(ToCoError, match=rf"^.*JPEGImages cannot be read: {words}$"):
        open_source(root)


def test_a_data_set_with_an_endless_name_is_refused():
    with pytest.raises(ToCoError) as told:
        open_source("d" * 5000)
    assert "File name too long" in str(told.value) and len(str(told.value)) < 400


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="another user is needed: runs as root only")
def test_another_user_of_the_machine(root, tmp_path, monkeypatch):
    """Reads the cached scenes of the first one, and is told about folders that are closed and a lock that is not its
    own."""
    shared = Path("/tmp") / f"toco-shared-{os.getpid()}"
    try:
        shared.mkdir()
        monkeypatch.setenv("TOCO_CACHE", str(shared))
        small = scenes.ScenesConfig(n_train=2, n_val=1, n_test=1)
        scenes.scenes_folder(small, progress=False)
        closed = [shared / "whole", shared / "class"]
        for folder in closed:
            for kind in ("cat", "dog"):
                (folder / kind).mkdir(parents=True)
                Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / kind / "a.png")
        closed.append(closed[0] / "cat")
        os.chmod(closed[0], 0)
        os.chmod(closed[1] / "dog", 0)
        monkeypatch.setattr(locks_module, "_lock_path", lambda folder: shared / "a.lock")
        (shared / "a.lock").touch(mode=0o600)

        def stranger():
            os.setgid(54321)
            os.setuid(54321)
            open_source(scenes.scenes_folder(small, progress=False)).image(0)
            for folder in closed:
                with pytest.raises(ToCoError, match="Permission denied"):
                    open_source(folder)
            with pytest.raises(ToCoError, match="the lock .*a.lock cannot be made: Permission denied; remove it, or"):
                with alone(shared / "run", "trains"):
                    pass

        open_source(root).image(0)  # whatever is imported late is imported now: the other user may not read it
        assert at_once(1, stranger) == ["ok"]
    finally:
        shutil.rmtree(shared)
