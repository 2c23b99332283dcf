"""Hand a trained run on: a folder with a model card, and the Hugging Face Hub.

    toco share runs/<run> my_model                    # the folder
    toco share runs/<run> my_model --push name/model  # the folder, and the Hub

    shared = from_pretrained("name/model")            # or a folder
    shared.model, shared.config, shared.class_names

model.safetensors   the network, as after the last step
config.json         every field of the config, the class names, the versions
README.md           the model card: scores with their protocol, data set, versions, how to use it

No data set is needed to read one. Paths of the machine that trained are left out: of a data set its name is kept.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from toco_core import __version__
from toco_core.config import LossConfig, TrainConfig, override
from toco_core.data.split import utf8
from toco_core.errors import ToCoError, in_a_line
from toco_core.machine.files import read_tensors, refuse_wrong_keys
from toco_core.machine.hub import hub_reason, quick_hub
from toco_core.machine.intake import read_bytes, read_json
from toco_core.machine.locks import alone
from toco_core.machine.writing import PART, new_part, remove_parts, whole_file, writing
from toco_core.model import ToCo, loaded_model, skeleton
from toco_core.runs.folder import Run
from toco_core.runs.shipped import named_run

FILES = ("model.safetensors", "config.json", "README.md")
SCORES = {
    "cam": "final CAM",
    "aux_cam": "auxiliary CAM",
    "refined": "final CAM, refined",
    "pseudo_label": "pseudo label",
    "seg": "segmentation",
}


SECOND = "# A second network"  # how the card of one begins
SECOND_LOSS = LossConfig(cls=0.0, aux_cls=0.0, ptc=0.0, ctc=0.0, seg=1.0, seg_start=0, energy=0.0)  # and what taught it
TRAINING = "training"  # in its folder: what it goes on from until it is written


class Pretrained(NamedTuple):
    """A model that was handed on, in evaluation mode on the CPU."""

    model: ToCo
    config: TrainConfig
    class_names: tuple[str, ...]
    """Background first, then the K classes in the order of the model's outputs."""


def save_pretrained(run: Run | str | Path, folder: str | Path) -> Path:
    """Write weights, config and model card of a finished run into `folder`; the folder.

    Raises ToCoError for a run that is not finished, or whose records or tensors are not those of its config, and for a
    folder that holds other files or cannot be written.
    """
    run = run if isinstance(run, Run) else named_run(run)
    config = run.config()
    if not run.finished:
        raise ToCoError(f"{run.folder} is not a finished run: train it to its end first")
    config, manifest, metrics, scores = _without_paths(config), run.manifest(), run.metrics(), run.scores()
    try:
        names = [utf8(name, f"{run.folder}/manifest.json") for name in manifest["data"]["classes"]]
        card = model_card(config, manifest, metrics, scores)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        records = "manifest.json, metrics.json and scores.json"
        raise ToCoError(f"{run.folder}: no card can be made of {records} ({in_a_line(error)})") from error
    state = run.newest()["model"]
    wanted = skeleton(config.model, len(names) - 1, affinity_blocks=config.affinity_blocks())
    refuse_wrong_keys(str(run.folder), state, wanted.state_dict())
    return write_pretrained(folder, state, config, names, card)


def write_pretrained(
    folder: str | Path, state: Mapping[str, Tensor], config: TrainConfig, class_names: Sequence[str], card: str
) -> Path:
    """Write a model's weights, its config without paths, and a card into `folder`, all of them or none; the folder.

    Raises ToCoError for a folder that holds other files or cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    facts = {"toco_core": __version__, "class_names": list(class_names), "config": _without_paths(config).to_dict()}
    contents = (
        save(tensors, {"format": "pt"}),
        f"{json.dumps(facts, indent=2)}\n".encode(),
        card.encode(errors="replace"),
    )
    with alone(folder, "writes"), writing(folder):
        refuse_other_files(folder)
        remove_parts(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for name, content in zip(FILES, contents, strict=True):
                file = stack.enter_context(whole_file(folder / name))
                file.write(content)
                file.flush()  # none takes its place before all have theirs on the disk
        _remove_training(folder / TRAINING)
    return folder


def claim_new(folder: Path) -> None:
    """Make the folder into which a model will be written, so that one that cannot be written is told before hours of
    training. Raises ToCoError for it, and as `refuse_other_files` does."""
    refuse_other_files(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with new_part(folder / FILES[0]):
            pass


def refuse_other_files(folder: Path) -> None:
    """Raise ToCoError for a folder into which no model can be written, as it holds other files or cannot be read."""
    training, own = folder / TRAINING, {*FILES, f"{TRAINING}/checkpoint.pt"}
    with writing(folder):
        there = list(folder.iterdir()) if os.path.lexists(folder) else []
        if training.is_dir() and not training.is_symlink():
            there = [path for path in there if path != training] + list(training.iterdir())
    if any(path.is_dir() or path.relative_to(folder).as_posix() not in own and path.suffix != PART for path in there):
        raise ToCoError(f"folder = {str(folder)!r} holds other files: a new folder, or one written before, is allowed")


def from_pretrained(source: str | Path, *, revision: str | None = None) -> Pretrained:
    """Read a folder that `save_pretrained` wrote, or fetch such a repository ("name/model") from the Hub.

    Nothing in the files is executed. Raises ToCoError where there is no such folder or repository, and where the
    tensors are not those of the config. Second networks that older versions wrote have their first run's losses in
    their config: they are known by their card.
    """
    folder = Path(source) if Path(source).is_dir() else _fetched(str(source), revision)
    try:
        facts = read_json(folder / "config.json")
        if not isinstance(facts["class_names"], list):
            raise TypeError("class_names is no list")
        names, config = tuple(map(str, facts["class_names"])), TrainConfig.from_dict(facts["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ToCoError(f"source = {str(source)!r} has no config.json of this package ({error})") from error
    found = read_tensors(folder / "model.safetensors", "source")
    model = loaded_model(f"source = {str(source)!r}", found, config, len(names) - 1)
    card = folder / "README.md"
    if card.is_file() and read_bytes(card, "text_bytes").startswith(SECOND.encode()):
        config = override(config, loss=SECOND_LOSS)
    return Pretrained(model.eval(), config, names)


def push_to_hub(run: Run | str | Path, repository: str, *, private: bool = False) -> str:
    """Upload what `save_pretrained` writes to the Hub's `repository` ("name/model"), made if missing; its address.

    Raises ToCoError for a repository that cannot be written: log in by `hf auth login`.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(run, folder)
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))
        except Exception as error:  # the Hub's, of the connection, of a token: of many types
            raise ToCoError(f"repository = {repository!r} could not be written ({hub_reason(error)})") from error


def model_card(config: TrainConfig, manifest: dict, metrics: dict, scores: dict | None) -> str:
    """Write the card: the Hub's front matter, then scores with protocol, data, training, versions and use.

    `metrics` are the run's final numbers on the validation part; `scores` what `evaluation.scores` kept, if anything.
    """
    dataset, data, schedule = config.data.dataset, manifest["data"], config.schedule
    classes = ", ".join(data["classes"][1:])
    rows = [("final CAM, best threshold", metrics.get("cam_miou")), ("segmentation", metrics.get("seg_miou"))]
    lines = [f"| {name} | {value:.1f} | {metrics['protocol']} |" for name, value in rows if value is not None]
    if scores:
        known = [(SCORES[name], value) for name, value in scores["miou"].items() if value is not None]
        lines += [f"| {name} | {value:.1f} | {scores['protocol']} |" for name, value in known]
    table = "\n".join(["| | mIoU (%) | protocol |", "|---|---|---|", *lines]) if lines else "There were no masks."
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"""---
license: apache-2.0
library_name: toco_core
pipeline_tag: image-segmentation
tags:
- weakly-supervised-semantic-segmentation
- class-activation-map
- vision-transformer
---

# ToCo, {config.model.backbone}, {dataset}

Weakly supervised semantic segmentation by [token contrast](https://arxiv.org/abs/2303.01267) (Ru et al., CVPR 2023):
trained with image-level labels only, by toco_core {__version__}.

## Scores

{table}

Image labels, mean average precision on the validation part: {metrics["map"]:.1f} %.

## Data

`{dataset}`: {data["train"]} images to train on, {data["val"]} to validate on. Classes: {classes}.

## Training

{schedule.steps} steps of {schedule.batch_size} images at {config.data.crop_size} pixels, auxiliary classifier on block
{config.model.layer}, seed {config.seed}; every field is in `config.json`. Python {manifest["python"]}, {versions}.

## Use

```python
from toco_core.runs.hub import from_pretrained

model, config, class_names = from_pretrained("<this folder or repository>")
```

The weights have the licence of what they were made of, too: that of the pretrained backbone and of the data.
"""


def _remove_training(folder: Path) -> None:
    """What a finished training of a second network has left in its folder."""
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    remove_parts(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _without_paths(config: TrainConfig) -> TrainConfig:
    weights = config.model.weights and Path(config.model.weights).name
    return override(config, dataset=Path(config.data.dataset).name, weights=weights, out_dir="runs", log_to="")


def _fetched(repository: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        with quick_hub():
            folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except Exception as error:  # the Hub's, of the connection, of a wrong name: of many types
        raise ToCoError(
            f"source = {repository!r} is no folder, and no repository of the Hub ({hub_reason(error)})"
        ) from error
    return Path(folder)
