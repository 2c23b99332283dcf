import errno
import json
import math
import os
import pickle
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import toco_core.runs.folder as runs
from toco_core.config import override, tiny
from toco_core.errors import ToCoError
from toco_core.machine.writing import write_whole
from toco_core.runs.folder import Run, manifest


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def state(step):
    return {"model": {"weight": torch.full((3, 2), float(step))}, "optimizer": {"state": {}}, "step": step}


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("the disk is full")


class Bomb:
    """What unpickling it would do: make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- the folder


def test_equal_configs_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TOCO_RUNS", raising=False)
    config = override(tiny(), out_dir=str(tmp_path / "here"), layer=7, seed=5)
    run = Run.of(config)
    assert run.folder.parent == tmp_path / "here"
    assert run.folder.name == f"scenes-layer7-seed5-{config.short_hash()}"
    assert Run.of(override(config, layer=7)).folder == run.folder
    assert Run.of(override(config, lr=2e-4)).folder != run.folder
    assert Run.of(override(config, dataset="/data/zoo/")).folder.name.startswith("zoo-layer7-")
    assert not run.folder.exists() and not run.finished


def test_the_default_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_RUNS", str(tmp_path))
    assert Run.of(tiny()).folder.parent == tmp_path
    assert Run.of(override(tiny(), out_dir="elsewhere")).folder.parent == Path("elsewhere")


def test_begin_writes_config_and_manifest(run):
    config = override(tiny(), steps=50, cam_scales=(1.0, 0.5), device="cpu")
    run.begin(config, data={"train": 4, "classes": ["background", "cat"]})
    assert run.config() == config
    written = json.loads((run.folder / "manifest.json").read_text())
    assert written["data"] == {"train": 4, "classes": ["background", "cat"]}
    assert written["versions"] == manifest()["versions"]
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "manifest.json"]


def test_begin_forgets_an_earlier_run(run):
    run.begin(tiny())
    run.log({"step": 0, "total": 1.0})
    run.save(state(1))
    run.finish({"cam_miou": 3.0})
    run.keep_scores({"part": "test"})
    assert run.finished and run.scores() == {"part": "test"}
    assert run.manifest()["versions"] == manifest()["versions"]
    run.begin(tiny())
    assert not run.finished and run.load() is None and run.records() == []
    run.finish({})
    assert run.scores() is None


def test_an_out_dir_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToCoError, match=r"out_dir: cannot write to .*file/runs: Not a directory"):
        Run(tmp_path / "file" / "runs").begin(tiny())


@pytest.mark.skipif(os.name == "nt", reason="links need rights here")
def test_an_out_dir_that_is_a_link_to_itself_is_named(tmp_path):
    """It was a RuntimeError of the lock."""
    (tmp_path / "loop").symlink_to("loop")
    for folder in (tmp_path / "loop", tmp_path / "loop" / "run"):
        with pytest.raises(ToCoError, match="out_dir: cannot write to .*loop"), Run(folder).alone():
            Run(folder).begin(tiny())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_out_dir_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ToCoError, match="out_dir: cannot write to .*Permission denied"):
            Run(tmp_path / "runs").begin(tiny())
    finally:
        tmp_path.chmod(0o700)


def test_what_is_not_there_yet_is_named(run):
    with pytest.raises(ToCoError, match=r"has no metrics\.json"):
        run.metrics()
    with pytest.raises(ToCoError, match=r"has no config\.json"):
        run.config()
    assert run.load() is None and run.records() == []


def test_finish(run):
    run.finish({"cam_miou": 31.5, "aux_cam_miou": math.nan, "per_class": [1.0, math.inf]})
    assert run.finished
    assert run.metrics() == {"cam_miou": 31.5, "aux_cam_miou": None, "per_class": [1.0, None]}


# ---- manifest


def test_the_manifest_has_versions_and_machine():
    found = manifest()
    assert {"torch", "timm", "numpy"} <= set(found["versions"])
    assert any(name.startswith("opencv-python") for name in found["versions"])
    assert found["python"].count(".") == 2 and found["system"] and found["processor"]
    assert found["threads"] == torch.get_num_threads()
    json.dumps(found, allow_nan=False)


def a_checkout(root):
    """A repository with one commit of a file `runs.py`."""

    def git(*words):
        settings = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(root), *settings, *words], check=True, capture_output=True, text=True)

    git("init", "-q")
    (root / "runs.py").write_text("")
    git("add", "runs.py")
    git("commit", "-q", "-m", "first")
    return git("rev-parse", "HEAD").stdout.strip()


def test_the_manifest_has_the_git_state(tmp_path, monkeypatch):
    try:
        commit = a_checkout(tmp_path)
    except OSError:
        pytest.skip("git is not installed")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert manifest()["git"] == {"commit": commit, "changed": False}
    (tmp_path / "runs.py").write_text("# changed\n")
    assert manifest()["git"] == {"commit": commit, "changed": True}

    installed = tmp_path / "venv" / "toco_core"
    installed.mkdir(parents=True)
    (installed / "runs.py").write_text("")
    monkeypatch.setattr(runs, "__file__", str(installed / "runs.py"))
    assert manifest()["git"] is None  # the checkout around it is another project's


def test_without_git_the_manifest_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert manifest()["git"] is None


# ---- records


def test_records_come_back_in_order(run):
    wanted = [{"step": 0, "total": 1.5, "ptc": 0.0}, {"step": 1, "cam_miou": 20.125}]
    for record in wanted:
        run.log(record)
    assert run.records() == wanted


def test_numbers_that_json_does_not_know_are_null(run):
    run.log({"step": 0, "total": math.nan, "ptc": -math.inf, "cls": 1.0, "more": {"x": math.nan}})
    text = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 0, "total": None, "ptc": None, "cls": 1.0, "more": {"x": None},
    }  # fmt: skip
    assert run.records()[0]["total"] is None


def test_a_line_cut_by_a_crash_is_left_out(run):
    run.log({"step": 0, "total": 1.0})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "total": 0.9')
    assert run.records() == [{"step": 0, "total": 1.0}]
    run.keep_records_before(100)
    run.log({"step": 10, "total": 0.8})
    assert run.records() == [{"step": 0, "total": 1.0}, {"step": 10, "total": 0.8}]


def test_records_from_a_step_on_are_forgotten(run):
    for step in (0, 5, 10, 15):
        run.log({"step": step})
    run.keep_records_before(10)
    assert run.records() == [{"step": 0}, {"step": 5}]


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def fails(*names):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# ---- checkpoints


def test_a_checkpoint_comes_back(run):
    run.save(state(1))
    run.save(state(2))
    loaded = run.load()
    assert loaded["step"] == 2
    assert_close(loaded["model"]["weight"], torch.full((3, 2), 2.0))
    assert [path.name for path in run.folder.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("when", ["while writing", "before the rename"])
def test_an_interrupted_save_leaves_the_old_checkpoint(run, monkeypatch, when):
    run.save(state(1))
    with monkeypatch.context() as patch:
        if when == "before the rename":
            patch.setattr(runs.os, "replace", lambda *names: (_ for _ in ()).throw(RuntimeError("power cut")))
            broken = state(2)
        else:
            broken = state(2) | {"more": Unsaveable()}
        with pytest.raises(RuntimeError):
            run.save(broken)
    assert run.load()["step"] == 1
    run.save(state(3))
    assert run.load()["step"] == 3


def test_a_checkpoint_that_holds_code_is_refused_unexecuted(run, tmp_path):
    proof = tmp_path / "executed"
    torch.save(state(1) | {"more": Bomb(proof)}, run.folder / "checkpoint.pt")
    with pytest.raises(ToCoError, match=r"checkpoint\.pt cannot be read as a checkpoint of this package"):
        run.load()
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()  # the bomb is a live one


def test_a_truncated_checkpoint_is_refused(run):
    run.save(state(1))
    path = run.folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ToCoError, match="cannot be read as a checkpoint"):
        run.load()


@pytest.mark.parametrize("content", [[1, 2], {"model": {}, "optimizer": {}}, state("7"), state(-1)])
def test_a_file_that_is_no_checkpoint_is_refused(run, content):
    if isinstance(content, dict) and content.get("step") == "7":
        content["step"] = "seven"
    torch.save(content, run.folder / "checkpoint.pt")
    with pytest.raises(ToCoError, match=r"checkpoint\.pt is no checkpoint of this package: it(s step is| has no)"):
        run.load()


def test_the_best_and_the_kept_checkpoints_stay(run):
    run.save(state(1), keep=True)
    run.save(state(2), best=True)
    run.save(state(3), keep=True)
    run.save(state(4))
    assert [run.load(which)["step"] for which in ("last", "best", "1", "3")] == [4, 2, 1, 3]
    assert run.load("2") is None and run.kept_steps() == [1, 3] and run.saved == 4
    assert_close(run.load("best")["model"]["weight"], torch.full((3, 2), 2.0))
    with pytest.raises(ToCoError, match="checkpoint 'latest': last, best or the number of a kept step is allowed"):
        run.load("latest")
    assert not list(run.folder.glob("*.part"))
    run.begin(tiny())
    assert not list(run.folder.glob("*.pt"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are set in a child process")
def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(run):
    """The system refuses to write more than 40 kB, as a full disk does."""
    import resource
    import signal

    run.save(state(1))
    large = state(2) | {"more": torch.zeros(100_000)}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            run.save(large)
        except BaseException as error:  # noqa: BLE001
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1000).decode() == f"ToCoError: out_dir: cannot write to {run.folder}: File too large"
    assert run.load()["step"] == 1 and [path.name for path in run.folder.iterdir()] == ["checkpoint.pt"]


def test_whatever_cannot_be_written_is_told(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.save(state(1))
    monkeypatch.setattr(runs.os, "fsync", full)
    words = "out_dir: cannot write to .*No space left on device"
    for write in (lambda: run.save(state(2)), lambda: run.finish({}), lambda: run.keep_records_before(1)):
        with pytest.raises(ToCoError, match=words):
            write()
    assert run.load()["step"] == 1 and not run.finished


def test_a_damaged_log_is_told(run):
    (run.folder / "metrics.jsonl").write_text('{"step": 0}\nno json\n{"step": 1}\n')
    with pytest.raises(ToCoError, match=r"metrics\.jsonl cannot be read as the log of a run"):
        run.records()


def test_a_run_is_trained_by_one_at_a_time(tmp_path, capsys):
    order, run = [], Run(tmp_path / "runs" / "one")

    def second():
        with Run(run.folder).alone():
            order.append("second")

    waiting = threading.Thread(target=second)
    with run.alone():
        waiting.start()
        time.sleep(0.3)
        with (
            pytest.raises(ToCoError, match="another process trains one: start again"),
            Run(run.folder).alone(wait=False),
        ):
            pass
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]
    assert "another process trains one: waiting" in capsys.readouterr().out
    with run.alone(wait=False):  # free again
        pass
