"""Numbers and pictures reach a tracker whole, once, and move no bit of the training."""

import sys

import numpy as np
import pytest
import torch
from small_config import small_recipe
from voc_folder import write_voc_folder

from toco_core.config import override
from toco_core.data import open_data
from toco_core.errors import ToCoError
from toco_core.runs.folder import Run
from toco_core.train import loop, trackers
from toco_core.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    splits = {"train": range(4), "val": range(4, 6)}
    return str(write_voc_folder(tmp_path_factory.mktemp("data") / "voc", splits=splits))


@pytest.fixture
def config(data_folder, tmp_path):
    shape = {"crop_size": 32, "local_size": 16, "n_local": 2, "cam_scales": (1.0,), "batch_size": 2}
    rates = {"steps": 6, "warmup_steps": 2, "eval_interval": 2, "log_interval": 1, "seg_start": 2, "energy_start": 3}
    return override(
        small_recipe(),
        dataset=data_folder,
        out_dir=str(tmp_path / "runs"),
        precision="fp32",
        device="cpu",
        **shape,
        **rates,
    )


def stop_at(step):
    def on_record(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_record


def interrupted_and_resumed(config):
    """Stopped on step 4, after the checkpoint of step 3: step 4 is logged twice."""
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False, on_record=stop_at(4))
    return train(config, progress=False).run


def events(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard_has_the_run_s_log_the_rates_and_pictures_each_step_once(config):
    run = interrupted_and_resumed(override(config, log_to="tensorboard"))
    found = events(run)
    tags = found.Tags()
    wanted = {}
    for record in run.records():
        for tag, value in trackers.tagged(record).items():
            wanted.setdefault(tag, []).append((record["step"], np.float32(value)))
    rates = {tag for tag in tags["scalars"] if tag.startswith("rate/")}
    assert rates == {"rate/encoder", "rate/heads"} and set(tags["scalars"]) - rates == set(wanted)
    assert {"loss/total", "loss/seg", "val/cam_miou", "val/map"} <= set(wanted)
    for tag, values in wanted.items():
        assert [(event.step, np.float32(event.value)) for event in found.Scalars(tag)] == values, tag
    encoder = [event.value for event in found.Scalars("rate/encoder")]
    assert [event.step for event in found.Scalars("rate/encoder")] == list(range(6))
    assert encoder[0] < encoder[1] and encoder[3] > encoder[4] > encoder[5]  # warm-up, then decay
    assert sorted(tags["images"]) == ["picture/img_4", "picture/img_5"]
    pictures = found.Images("picture/img_5")
    assert [picture.step for picture in pictures] == [1, 3, 5]
    assert (pictures[0].height, pictures[0].width) == (21, 4 * 30) or (pictures[0].height, pictures[0].width) == (
        33,
        84,
    )


def test_a_tracker_moves_no_bit_and_does_not_name_the_run(config, tmp_path):
    pytest.importorskip("tensorboard")
    plain = train(config, progress=False)
    tracked = override(config, log_to="tensorboard", out_dir=str(tmp_path / "other"))
    assert Run.of(tracked).folder.name == plain.run.folder.name
    same = train(tracked, progress=False)
    assert same.run.records() == plain.run.records()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, same.model.state_dict()[name]), name


def test_a_run_trained_without_is_sent_when_it_is_asked_for(config):
    pytest.importorskip("tensorboard")
    run = train(config, progress=False).run
    assert not (run.folder / "tensorboard").exists()
    for _ in range(2):
        train(override(config, log_to="tensorboard"), progress=False)
    assert len(list((run.folder / "tensorboard").iterdir())) == 1
    totals = [record["total"] for record in run.records() if "total" in record]
    assert [e.value for e in events(run).Scalars("loss/total")] == pytest.approx(totals, rel=1e-6)


def test_pictures_show_image_cam_pseudo_label_and_segmentation(config):
    trained = train(override(config, steps=1, warmup_steps=0), progress=False)
    source = open_data(config.data).val
    found = trackers.validation_pictures(trained.model.train(), source, config)
    assert trained.model.training
    for i, name in enumerate(source.names):
        image, picture = source.image(i), found[f"picture/{name}"]
        height, width = image.shape[:2]
        assert picture.shape == (height, 4 * width, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture[:, :width], image)


def test_trackio_has_the_run_s_log_each_step_once(config, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    del trackio
    run = interrupted_and_resumed(override(config, log_to="trackio"))
    train(override(config, log_to="trackio"), progress=False)  # finished: nothing is sent again
    logs = SQLiteStorage.get_logs(trackers.PROJECT, run.folder.name)
    losses = [(log["step"], log["loss/total"]) for log in logs if "loss/total" in log]
    assert losses == [(r["step"], r["total"]) for r in run.records() if "total" in r]
    assert [log["step"] for log in logs if "val/cam_miou" in log] == [1, 3, 5]
    assert [log["step"] for log in logs if "picture/img_4" in log] == [1, 3, 5]


def test_trackio_gets_a_validation_that_was_stopped(config, monkeypatch):
    """Its step was whole but for it: the losses were sent, and are not sent again."""
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config = override(config, log_to="trackio")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_as", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    run = train(config, progress=False).run
    logs = SQLiteStorage.get_logs(trackers.PROJECT, run.folder.name)
    losses = [log["step"] for log in logs if "loss/total" in log]
    assert losses == [r["step"] for r in run.records() if "total" in r]
    assert [log["step"] for log in logs if "val/cam_miou" in log] == [1, 3, 5]
    assert [log["step"] for log in logs if "picture/img_4" in log] == [1, 3, 5]


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_missing_package_is_named_before_anything_is_written(config, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ToCoError, match=f"log_to = '{name}' needs the package {name}: pip install {name}"):
        train(override(config, log_to=name), progress=False)
    assert not Run.of(config).folder.exists()


def test_another_tracker_is_refused(config):
    with pytest.raises(ToCoError, match="log_to = 'wandb' is not allowed.*tensorboard"):
        override(config, log_to="wandb")
