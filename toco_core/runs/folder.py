"""A run's folder: what was asked for, on what, what came out, and where to go on.

config.json       every field of the TrainConfig
manifest.json     versions, machine, git state, data: what is needed to repeat it
metrics.jsonl     one line per logged step or validation, appended as they happen
checkpoint.pt     the newest whole state; replaced at once, so an interruption leaves the one before
best.pt           the state with the best validation so far
step-00000500.pt  a state that was asked for (`keep_every` of `train.train`)
failure.pt        a step whose loss was not finite (see `failures`)
metrics.json      the final numbers; only a finished run has it
film/             small pictures of the training, where it was asked for (see `train.film`)
scores.json       what `scores.score_run` found for the finished run
model.safetensors the weights of a run that comes with the package (see `shipped`), which has no checkpoints
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.version

from toco_core.config import TrainConfig
from toco_core.data import TrainVal
from toco_core.data.fingerprint import data_differences, data_fingerprint
from toco_core.errors import ToCoError
from toco_core.machine.files import load_tensors
from toco_core.machine.intake import read_json, read_text
from toco_core.machine.locks import alone
from toco_core.machine.writing import (
    flush_folder,
    new_part,
    open_to_append,
    place_file,
    remove_parts,
    write_whole,
    writing,
)

from .packed import MODEL, packed_state

LATER = ("device", "precision", "network", "decoder_dilation")
"""Settings of label maps and evaluations that were not always written down: where a folder does not say them, they are
taken for today's, as its weights are today's."""


class Run:
    """The folder `<out_dir>/<data set>-layer<layer>-seed<seed>-<hash of the config>`; equal configs share it."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.saved: int | None = None
        """Steps done in the newest checkpoint that was saved or loaded here."""

    @property
    def begun(self) -> bool:
        """Whether the folder is that of a run: it has a log or a checkpoint."""
        return any((self.folder / name).is_file() for name in ("metrics.jsonl", "checkpoint.pt"))

    @classmethod
    def of(cls, config: TrainConfig, variant: str = "") -> "Run":
        """The run of a config; nothing is written yet. `$TOCO_RUNS`, where set, stands for the default "runs".

        `variant` names what the config does not say (see `own_terms.variant`); it ends the folder's name.

        Paths are resolved first: the same relative `dataset` in two folders is two runs. A run that an older version
        of the package began, under a name with the path as it is written or with every field, is found.
        """
        default = config.out_dir == TrainConfig().out_dir
        folder, resolved = Path(default and os.environ.get("TOCO_RUNS") or config.out_dir), config.resolved()
        name = _run_name(resolved, resolved.short_hash())
        earlier = _run_name(config, config.short_hash()), _run_name(config, config.short_hash(every_field=True))
        names = [f"{n}-{variant}" if variant else n for n in (name, *earlier)]
        there = (n for n in names if os.path.isfile(folder / n / "config.json"))
        return cls(folder / next(there, names[0]))

    @contextlib.contextmanager
    def alone(self, *, wait: bool = True) -> Iterator[None]:
        """Keep other processes of this machine from training the same run at the same time; they wait, and then find it
        finished. Without `wait` ToCoError is raised where another process has the run."""
        with alone(self.folder, "trains", wait=wait):
            yield

    def data_changes(self, data: TrainVal) -> dict[str, bool]:
        """What differs, in words, between the data that the run knows and these, and whether training depends on it. A
        run without a manifest cannot be compared."""
        known = self._known()
        parts = known.get("fingerprint")
        if isinstance(parts, dict):
            return data_differences(parts, data_fingerprint(data, parts))
        if not isinstance(known.get("data_sha256"), str) or known["data_sha256"] == data_digest(data):
            return {}
        sizes = known["data"] if isinstance(known.get("data"), dict) else {}
        found = {"train": len(data.train), "val": len(data.val)}
        differs = [f"{part} has {n} images, not {sizes[part]}" for part, n in found.items() if sizes.get(part, n) != n]
        return dict.fromkeys(differs or ["names or image-level labels are others"], True)

    def refuse_other_data(self, data: TrainVal, weights: str | None = None) -> None:
        """Raise ToCoError where the run began with other data, or with another content of the file `weights`, than
        these: its result is not theirs."""
        self.refuse_changes(self.data_changes(data), weights)

    def refuse_changes(self, changes: Iterable[str], weights: str | None = None) -> None:
        """Raise ToCoError where there are changes of the data, or the file `weights` has another content."""
        differs, ways = [*changes], ["train(..., resume=False) replaces that run", "another out_dir keeps both"]
        if differs and not self.finished:
            ways.append("changed_data=True (toco train --changed-data) goes on with the data of today")
        before = self._known().get("weights_sha256")
        if weights and isinstance(before, str) and os.path.isfile(weights) and file_digest(weights) != before:
            differs.append(f"the file {weights} has other weights")
        if differs:
            raise ToCoError(f"{self.folder} was trained on something else: {', '.join(differs)}; {', '.join(ways)}")

    def note_changes(self, changes: Iterable[str], data: TrainVal, step: int) -> None:
        """Write into the manifest what changed in the data, when, and that from `step` on the run is of these."""
        known = self.manifest()
        before = known["data_changes"] if isinstance(known.get("data_changes"), list) else []
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = data_facts(data) | {"data_changes": [*before, {"step": step, "time": now, "changes": [*changes]}]}
        with self._writing():
            write_whole(self.folder / "manifest.json", as_json(known | facts))

    def begin(self, config: TrainConfig, **facts) -> None:
        """Write config and manifest; what an earlier run left here is not this one's. Raises ToCoError where the folder
        cannot be written."""
        with self.alone(), self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = sorted(path.name for path in self.folder.glob("step-*.pt"))
            # what says that the run is finished goes first, so that an interruption here leaves an unfinished one
            earlier = ("scores.json", "metrics.json", "checkpoint.pt", "best.pt", *kept, "failure.pt", "metrics.jsonl")
            frames = sorted(path.relative_to(self.folder) for path in self.folder.glob("film/*"))
            for name in [*earlier, *frames]:
                (self.folder / name).unlink(missing_ok=True)
            remove_parts(self.folder)
            write_whole(self.folder / "config.json", as_json(config.to_dict()))
            write_whole(self.folder / "manifest.json", as_json(manifest() | facts))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "metrics.json").is_file()

    def config(self) -> TrainConfig:
        """The config it was started with. Raises ToCoError that says so for the folder of a model that was handed on
        (see `hub`)."""
        values = self._read("config.json")
        if {"class_names", "config"} <= values.keys():
            raise ToCoError(
                f"{self.folder} is no run but a model that `toco share` or `toco second` wrote: `toco label` and "
                f"`toco evaluate --data` take it"
            )
        return TrainConfig.from_dict(values)

    def manifest(self) -> dict:
        """Versions, machine, git state and data of its start."""
        return self._read("manifest.json")

    def class_names(self) -> tuple[str, ...] | None:
        """The classes that it was trained for, background first; None where no manifest tells them."""
        names = self._names("classes")
        return tuple(names) if len(names) > 1 else None

    def left_out(self) -> frozenset[str]:
        """The images that were left out of its data, as broken; none where no manifest tells them."""
        return frozenset(self._names("left_out"))

    def _known(self) -> dict:
        """The manifest; nothing where there is none."""
        return self.manifest() if (self.folder / "manifest.json").is_file() else {}

    def _names(self, key: str) -> list[str]:
        """A list of names that the manifest has of the data; [] where it has none."""
        data = self._known().get("data")
        names = data.get(key) if isinstance(data, dict) else None
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def refuse_other_classes(self, names: Sequence[str], where: object) -> None:
        """Raise ToCoError where the classes of `where`, background first, are not those that it was trained for: what
        it says of one would be taken for another. A run that does not tell its classes cannot be compared."""
        known = self.class_names()
        if known is None or known == tuple(names):
            return
        gone, new = ([name for name in one if name not in other] for one, other in ((known, names), (names, known)))
        words = [f"{verb} {', '.join(some)}" for verb, some in (("lacks", gone), ("has", new)) if some]
        raise ToCoError(
            f"{self.folder} was trained on other classes: {where} {' and '.join(words) or 'has them in another order'} "
            f"today; name and order them as then (classes.txt keeps an order), or train anew; `toco label` needs no "
            f"data set"
        )

    def metrics(self) -> dict:
        """The final numbers. Raises ToCoError for a run that is not finished."""
        return self._read("metrics.json")

    def finish(self, metrics: dict) -> None:
        """Write the final numbers: from now on the run counts as finished."""
        with self._writing():
            write_whole(self.folder / "metrics.json", as_json(metrics))

    def scores(self) -> dict | None:
        """What `keep_scores` was given; None before, and for a run that is not finished."""
        return self._read("scores.json") if self.finished and (self.folder / "scores.json").is_file() else None

    def keep_scores(self, scores: dict) -> None:
        """Write what the finished run was scored with (see `scores`)."""
        with self._writing():
            write_whole(self.folder / "scores.json", as_json(scores))

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl; a link of that name is not followed."""
        path = self.folder / "metrics.jsonl"
        with self._writing(), open_to_append(path) as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def records(self) -> list[dict]:
        """All lines logged so far; a last line cut short by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        if not os.path.lexists(path):
            return []
        text = read_text(path, "the log of a run", "json_bytes")
        try:
            records = [json.loads(line) for line in text.split("\n")[:-1]]
        except (ValueError, RecursionError) as error:
            raise ToCoError(f"{path} cannot be read as the log of a run: {error}") from error
        if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
            raise ToCoError(f"{path} cannot be read as the log of a run: each line is a record with a step")
        return records

    def keep_records_before(self, step: int, *, validated: bool = True) -> None:
        """Forget what was logged from `step` on: a resumed run logs it again; where the step before was not `validated`
        to its end, also what was logged of its validation."""

        def stays(record: dict) -> bool:
            return record["step"] < step and (validated or record["step"] < step - 1 or "total" in record)

        kept = [json.dumps(record) + "\n" for record in self.records() if stays(record)]
        with self._writing():
            remove_parts(self.folder)  # of a killed process
            write_whole(self.folder / "metrics.jsonl", "".join(kept))

    def save(self, state: dict, *, best: bool = False, keep: bool = False) -> None:
        """Replace the checkpoint: written beside, flushed to the disk, then renamed.

        `best` makes it best.pt, too, and `keep` step-<number>.pt, which later checkpoints leave alone. A process killed
        at any moment leaves whole files only, the old ones or the new ones. Raises ToCoError where the disk is full or
        the folder cannot be written; the checkpoint before is then untouched.
        """
        names = [name for name, wanted in (("best.pt", best), (f"step-{state['step']:08d}.pt", keep)) if wanted]
        self._replace("checkpoint.pt", state, also=names)
        self.saved = state["step"]

    def save_failure(self, state: dict) -> Path:
        """Write what `failures.load_failure` reads; the file."""
        self._replace("failure.pt", state)
        return self.folder / "failure.pt"

    def load(self, which: str = "last") -> dict | None:
        """A checkpoint: the "last", the "best", or that of a kept step ("500"); None where there is none. Loading it
        runs no code of the file's. Raises ToCoError for a file that is damaged or no checkpoint."""
        names = {"last": "checkpoint.pt", "best": "best.pt"}
        if which not in names and not which.isdecimal():
            raise ToCoError(f"checkpoint {which!r}: last, best or the number of a kept step is allowed")
        path = self.folder / (names.get(which) or f"step-{int(which):08d}.pt")
        if which == "last" and not path.is_file() and (self.folder / MODEL).is_file():
            return packed_state(self.folder, self.config())
        if not path.is_file():
            return None
        state = read_state(path, ("model", "optimizer", "step"))
        if type(state["step"]) is not int or state["step"] < 0:
            raise ToCoError(f"{path} is no checkpoint of this package: its step is {state['step']!r:.40}")
        for name, kinds in (("best", (int, float)), ("skipped", (int,))):
            if type(state.get(name, 0)) not in kinds:
                raise ToCoError(f"{path} is no checkpoint of this package: its {name} is {state[name]!r:.40}")
        if which == "last":
            self.saved = state["step"]
        return state

    def kept_steps(self) -> list[int]:
        """The steps whose checkpoints were kept."""
        names = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt"))
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> dict:
        """The last checkpoint. Raises ToCoError where there is none, and as `load`."""
        state = self.load()
        if state is None:
            raise ToCoError(f"{self.folder} has no checkpoint yet: its training has not come to its first validation")
        return state

    def _replace(self, name: str, state: dict, also: Sequence[str] = ()) -> None:
        with self._writing(), new_part(self.folder / name) as part:
            with open(part, "wb") as file:
                _save(state, file)
                file.flush()
                os.fsync(file.fileno())
            for other in also:  # before the name that a resumed run goes on from: it would not come here again
                place_file(part, self.folder / other)
            os.replace(part, self.folder / name)
            flush_folder(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What the system says about writing, in our words."""
        with writing(self.folder, "out_dir: "):
            yield

    def _read(self, name: str) -> dict:
        path = self.folder / name
        if not os.path.lexists(path):
            raise ToCoError(f"{self.folder} has no {name}: it is not the folder of a run that came so far")
        values = read_json(path)
        if not isinstance(values, dict):
            raise ToCoError(f"{path} holds no record with named values")
        return values


def manifest() -> dict:
    """Versions, machine and git state, as far as they can be told."""
    from importlib import metadata

    versions = {}
    known = ("toco_core", "torch", "torchvision", "timm", "numpy", "pillow", "opencv-python-headless", "opencv-python")
    for name in known:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": _git_state(),
    }


def data_facts(data: TrainVal) -> dict:
    """What a manifest says of the data."""
    left_out = {name for split in data[:2] for name in getattr(split, "left_out", ())}
    facts = {"train": len(data.train), "val": len(data.val), "classes": list(data.train.class_names)}
    return {
        "data": facts | ({"left_out": sorted(left_out)} if left_out else {}),
        "data_sha256": data_digest(data),
        "fingerprint": data_fingerprint(data),
    }


def data_digest(data: TrainVal) -> str:
    """Changes with any name, any image-level label, or their order, in either split."""
    digest = hashlib.sha256()
    for split in data[:2]:
        digest.update(json.dumps([list(split.names), np.asarray(split.image_labels).tolist()]).encode())
    return digest.hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _run_name(config: TrainConfig, digits: str) -> str:
    dataset = Path(config.data.dataset).name or "data"
    return f"{dataset}-layer{config.model.layer}-seed{config.seed}-{digits}"


def _git_state() -> dict | None:
    """Commit of the checkout that this package runs from, and whether tracked files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed below another checkout: not its commit
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_state(path: Path, wanted: tuple[str, ...]) -> dict:
    """A file of `torch.save` with at least the entries `wanted`, read without running code of the file's."""
    try:
        state = load_tensors(path)
    except ToCoError:
        raise
    except Exception as error:  # noqa: BLE001  torch raises many kinds
        raise ToCoError(f"{path} cannot be read as a checkpoint of this package: {type(error).__name__}") from error
    missing = [name for name in wanted if not isinstance(state, dict) or name not in state]
    if missing:
        raise ToCoError(f"{path} is no checkpoint of this package: it has no {missing[0]!r}")
    return state


def claim_folder(folder: Path, settings: dict, what: str) -> None:
    """Begin a folder that an interrupted `what` ("export") goes on with: its manifest.json holds `settings`.

    Raises ToCoError where the folder holds something else, or one with other settings or without some of them, or
    cannot be written.
    """
    what = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    path, settings = folder / "manifest.json", json.loads(json.dumps(settings))
    if path.is_file():
        try:
            known = read_json(path)["settings"]
            compared = {*known, *settings} - (set(LATER) - {*known})
            different = sorted(k for k in compared if known.get(k) != settings.get(k))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ToCoError(f"{path} is not the manifest of {what}: choose a new folder") from None
        if different and not any(k in known for k in different):
            raise ToCoError(
                f"{folder} holds {what} that says nothing of its {', '.join(different)}: choose a new folder, or write "
                f"them into the settings in {path.name} where they are known"
            )
        if different:
            raise ToCoError(f"{folder} holds {what} with another {', '.join(different)}: choose a new folder")
    with writing(folder):
        if not path.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ToCoError(f"{folder} is not empty and holds no {what.partition(' ')[2]}: choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"finished": False, "settings": settings}, indent=1) + "\n")


@contextlib.contextmanager
def claimed(folder: Path, settings: dict, what: str, does: str) -> Iterator[None]:
    """Hold a folder alone (see `machine.locks`), claim it, and remove what a killed process left half-written."""
    with alone(folder, does), writing(folder):
        claim_folder(folder, settings, what)
        remove_parts(folder, "**/*")
        yield


def _save(state: dict, file) -> None:
    """`torch.save`, with the system's own error where writing fails: torch replaces it by one of its own."""
    failed: list[OSError] = []

    class Writer:
        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self):
            file.flush()

    try:
        torch.save(state, Writer())
    except Exception:
        if failed:
            raise failed[0] from None
        raise


def as_json(values: dict) -> str:
    """The text of a JSON file; null for what is no finite number."""
    return json.dumps(_finite(values), indent=1) + "\n"


def _finite(value):
    """JSON knows no NaN: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
