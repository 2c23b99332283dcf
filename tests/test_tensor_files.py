"""Checkpoints, weights and run folders from strangers: what they declare is compared before anything is built."""

import dataclasses
import json
import pickle
import time
import zipfile

import pytest
import torch
from growth import memory_growth
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.backbone import build_encoder, load_weights
from toco_core.config import ModelConfig, override, tiny
from toco_core.errors import ToCoError
from toco_core.machine.files import load_tensors, read_tensors
from toco_core.model import ToCo, skeleton
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.runs.release import from_release, to_release
from toco_core.train.optimizer import load_optimizer_state

SMALL = ModelConfig(
    backbone="plain_vit(image=32, patch=8, width=32, depth=2, heads=2, mlp=64)",
    pretrained=False, layer=1, proj_hidden=8, proj_bottleneck=6, proj_dim=5, decoder_width=7,
)  # fmt: skip


def test_all_that_the_package_writes_comes_back(tmp_path):
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": layer.state_dict(), "optimizer": optimizer.state_dict(), "parameter": layer.weight, "step": 3,
        "config": {"a": [1, 2.5, None, True, "x"]}, "view": torch.arange(20.0).view(4, 5).t()[1:, ::2],
        "kinds": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.half, torch.int64, torch.bool)],
        "empty": torch.zeros(0, 3), "size": torch.Size([2, 3]), "large": 10**30, "set": {1, 2},
    }  # fmt: skip
    for new in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        found = load_tensors(tmp_path / "a.pt")
        assert_close(found["view"], state["view"], rtol=0, atol=0)
        assert_close(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
        assert found["kinds"][0].dtype == torch.bfloat16 and found["size"] == (2, 3) and found["set"] == {1, 2}
        assert found["config"] == state["config"] and found["large"] == 10**30


def archive(described: bytes, path, *more):
    """An archive as torch writes it, with another description of its tensors."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as old:
        parts = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in [*parts, *((parts[0][0].partition("/")[0] + "/" + name, c) for name, c in more)]:
            new.writestr(name, described if name.endswith("data.pkl") else content)
    return path


def storage(n, kind="FloatStorage", key="0"):
    """Opcodes that put a storage of n numbers on the stack."""
    number = b"\x8a\x08" + n.to_bytes(8, "little")
    key = b"X" + len(key).to_bytes(4, "little") + key.encode()
    return b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n" + key + b"X\x03\x00\x00\x00cpu" + number + b"tQ"


HOSTILE = {
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (4 << 30).to_bytes(5, "little") + b"\x85R.",
    "system": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "storage called": b"\x80\x02ctorch\nFloatStorage\n\x8a\x05" + (1 << 33).to_bytes(5, "little") + b"\x85R.",
    "untyped storage": b"\x80\x02ctorch\nUntypedStorage\n\x8a\x05" + (1 << 33).to_bytes(5, "little") + b"\x85R.",
    "lying storage": b"\x80\x02" + storage(2**31) + b".",
    "lying tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(3) + b"K\x00\x8a\x05"
    + (1 << 33).to_bytes(5, "little") + b"\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR.",
    "changed function": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
    "two sizes": b"\x80\x02" + storage(3) + storage(2) + b"\x86.",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_hostile_descriptions_are_refused_before_torch_reads_them(tmp_path, monkeypatch, name, form):
    path = tmp_path / "w.pth"
    if form == "archive":
        archive(HOSTILE[name], path)
    else:
        start = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(start + HOSTILE[name] + pickle.dumps(["0"], 2) + (3).to_bytes(8, "little") + bytes(12))
    if not (name == "two sizes" and form == "legacy"):
        monkeypatch.setattr(torch, "load", None)
    growth, began = memory_growth(), time.process_time()
    with pytest.raises(ToCoError, match="w.pth' cannot be read"):
        read_tensors(path, "weights")
    assert growth() < 100 and time.process_time() - began < 5


def test_a_second_description_is_refused(tmp_path):
    """torch takes names whatever their case, and the first of two."""
    path = archive(pickle.dumps({}, 2), tmp_path / "w.pth", ("DATA.pkl", HOSTILE["bytearray"]))
    with pytest.raises(ValueError, match="one comes twice"):
        load_tensors(path)


# ---- checkpoints of the release


def release_file(path, **changes):
    torch.manual_seed(0)
    state = to_release(ToCo(SMALL, 3), module_prefix=False)
    for name, value in changes.items():
        state[name] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.blocks.1000000000.x", torch.ones(1), "it has 3 blocks, none of which is number 2"),
        ("encoder.blocks.\u00b2.x", torch.ones(1), "it has 3 blocks, none of which is number 2"),
        ("encoder.blocks.2.x", torch.ones(1), "missing tensors"),
        ("encoder.pos_embed", torch.ones(1, 0, 32), "0 position embeddings are not one and a square grid"),
        ("encoder.pos_embed", torch.ones(1, 1, 32), "1 position embeddings are not one and a square grid"),
        ("encoder.blocks.0.mlp.fc1.weight", torch.ones(2**31, 0), "mlp at most 131072"),
        ("classifier.weight", torch.ones(2**31, 0, 1, 1), "of another shape"),
        ("proj_head.mlp.0.weight", torch.ones(60_000, 0), "of another shape"),
        ("proj_head.mlp.0.weight", torch.ones(8, 32).to(torch.complex64), "holds complex64 and not float32"),
    ],
)
def test_releases_that_declare_more_than_they_hold(tmp_path, name, tensor, message):
    """Block number 10**9 asked for as many blocks; its name in superscript for ValueError."""
    path, growth, began = release_file(tmp_path / "r.pth", **{name: tensor}), memory_growth(), time.process_time()
    with pytest.raises(ToCoError, match=message):
        from_release(path, heads=2, layer=1)
    assert growth() < 300 and time.process_time() - began < 10


def test_a_release_is_still_read(tmp_path):
    model = from_release(release_file(tmp_path / "r.pth"), heads=2, layer=1)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(ToCo(SMALL, 3).parameters(), model.parameters(), strict=True))


def test_a_skeleton_leaves_linspace_its_numbers(monkeypatch):
    """timm before 1.0.21 reads them while it builds; with it no release checkpoint and no run could be opened."""
    found = []

    def build(config):
        found.append((torch.linspace(0, 1, 3).tolist(), torch.ones(2).device.type))
        return build_encoder(config)

    monkeypatch.setattr("toco_core.model.build_encoder", build)
    assert {value.device.type for value in skeleton(SMALL, 3).state_dict().values()} == {"meta"}
    assert found == [([0.0, 0.5, 1.0], "meta")]


def test_a_skeleton_has_names_and_shapes_of_the_model_and_no_numbers():
    ours, model = skeleton(dataclasses.replace(SMALL, pretrained=True), 3).state_dict(), ToCo(SMALL, 3).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.items()}
    assert {v.device.type for v in ours.values()} == {"meta"}


# ---- run folders


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "plain_vit(image=64, patch=8, width=1000000, depth=12, heads=4, mlp=64)", "width at most 16384"),
        ("backbone", "plain_vit(image=64, patch=8, width=4, depth=100000000, heads=1, mlp=1)", "depth at most 64"),
        ("backbone", f"plain_vit(image={'9' * 5000}, patch=8, width=4, depth=1, heads=1, mlp=1)", "is not understood"),
        ("backbone", "plain_vit(image=64, patch=8, width=16384, depth=64, heads=1, mlp=131072)", "of another model"),
        ("proj_hidden", 10**9, "proj_hidden = 1000000000 is not allowed: at least 1, at most 65536"),
        ("proj_hidden", 65536, "of another model"),
        ("decoder_width", 65536, "of another model"),
    ],
)
def test_a_config_that_asks_for_terabytes(tmp_path, field, value, message):
    """The config of a stranger's run is compared with the tensors beside it before a model is built."""
    data, run = write_voc_folder(tmp_path / "data"), Run(tmp_path / "run")
    run.folder.mkdir()
    config = override(tiny(), dataset=str(data), device="cpu").to_dict()
    config["model"][field] = value
    (run.folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": {"x": torch.ones(1)}, "optimizer": {}, "step": 1}, run.folder / "checkpoint.pt")
    growth, began = memory_growth(), time.process_time()
    with pytest.raises(ToCoError, match=message):
        open_run(run.folder)
    assert growth() < 500 and time.process_time() - began < 10


@pytest.mark.parametrize(
    ("name", "value"), [("best", "high"), ("best", None), ("skipped", 1.5), ("step", True), ("step", -1)]
)
def test_checkpoints_with_odd_values(tmp_path, name, value):
    """A best validation of another type was a TypeError at the first validation."""
    run = Run(tmp_path)
    torch.save(
        {"model": {}, "optimizer": {}, "step": 1, "best": 1.5, "skipped": 0, name: value}, tmp_path / "checkpoint.pt"
    )
    with pytest.raises(ToCoError, match=f"checkpoint.pt is no checkpoint of this package: its {name} is"):
        run.load()


def test_rates_and_moments_are_the_configs_not_the_checkpoints(tmp_path):
    layer = torch.nn.Linear(2, 2)

    def optimizer():
        return torch.optim.AdamW([{"params": list(layer.parameters()), "base_lr": 0.5}], lr=0.5)

    first = optimizer()
    layer(torch.ones(1, 2)).sum().backward()
    first.step()
    state = first.state_dict()
    state["param_groups"] = [{"lr": "fast", "betas": None}]
    second = optimizer()
    load_optimizer_state(second, state, Run(tmp_path))
    assert second.param_groups[0]["lr"] == 0.5 and second.param_groups[0]["base_lr"] == 0.5
    assert_close(second.state_dict()["state"], first.state_dict()["state"], rtol=0, atol=0)
    for change in ({"step": torch.ones(3)}, {"exp_avg": torch.ones(2, 2).long()}, {"more": torch.ones(1)}, {"step": 3}):
        bad = {"state": {0: state["state"][0] | change, 1: state["state"][1]}}
        with pytest.raises(ToCoError, match="the checkpoint's optimizer does not fit"):
            load_optimizer_state(optimizer(), bad, Run(tmp_path))


# ---- weights


@pytest.mark.parametrize(
    "state",
    [
        {"pos_embed": torch.ones(5)}, {"pos_embed": torch.ones(1, 10, 32).long()}, {3: torch.ones(1)},
        {"pos_embed": torch.ones(1, 10, 32).to(torch.complex64)}, {None: torch.ones(1)},
        {"pos_embed": torch.ones(2, 5, 3, 1)},
        {"pos_embed": torch.ones(1, 10, 32).to_sparse()},
    ],
)  # fmt: skip
def test_odd_weights(tmp_path, state):
    """They ended in IndexError, AttributeError, TypeError and RuntimeError."""
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ToCoError, match="w.pth'"):
        load_weights(ToCo(SMALL, 3).encoder, tmp_path / "w.pth")


@pytest.mark.parametrize("steps", [-1e30, float("nan"), float("inf"), 1e30])
def test_an_optimizer_of_impossible_steps_is_refused(tmp_path, steps):
    """AdamW raised OverflowError in the first step of a resumed training: found by mutated checkpoints."""
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = optimizer.state_dict()
    load_optimizer_state(optimizer, found, Run(tmp_path / "run"))
    found["state"][1]["step"] = torch.tensor(steps, dtype=torch.float64)
    with pytest.raises(ToCoError, match="optimizer does not fit: parameter 1 has been through .* steps"):
        load_optimizer_state(optimizer, found, Run(tmp_path / "run"))
