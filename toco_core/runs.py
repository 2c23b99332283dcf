"""A run's folder: what was asked for, on what, what came out, and where to go on.

config.json       every field of the TrainConfig
manifest.json     versions, machine, git state, data: what is needed to repeat it
metrics.jsonl     one line per logged step or validation, appended as they happen
checkpoint.pt     the newest whole state; replaced at once, so an interruption leaves the one before
metrics.json      the final numbers; only a finished run has it
scores.json       what `scores.score_run` found for the finished run
"""

import json
import math
import os
import platform
import subprocess
from pathlib import Path

import torch

from .config import TrainConfig
from .errors import ToCoError


class Run:
    """The folder `<out_dir>/<data set>-layer<layer>-seed<seed>-<hash of the config>`; equal configs share it."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @classmethod
    def of(cls, config: TrainConfig) -> "Run":
        """The run of a config; nothing is written yet. `$TOCO_RUNS`, where set, stands for the default "runs"."""
        dataset = Path(config.data.dataset).name or "data"
        name = f"{dataset}-layer{config.model.layer}-seed{config.seed}-{config.short_hash()}"
        default = config.out_dir == TrainConfig().out_dir
        return cls(Path(default and os.environ.get("TOCO_RUNS") or config.out_dir) / name)

    def begin(self, config: TrainConfig, **facts) -> None:
        """Write config and manifest; what an earlier run left here is not this one's. Raises ToCoError where the folder
        cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("scores.json", "metrics.json", "metrics.jsonl", "checkpoint.pt"):
                (self.folder / name).unlink(missing_ok=True)
            write_whole(self.folder / "config.json", _json(config.to_dict()))
            write_whole(self.folder / "manifest.json", _json(manifest() | facts))
        except OSError as error:
            raise ToCoError(f"out_dir: cannot write to {self.folder}: {error.strerror or error}") from error

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "metrics.json").is_file()

    def config(self) -> TrainConfig:
        """The config it was started with."""
        return TrainConfig.from_dict(self._read("config.json"))

    def manifest(self) -> dict:
        """Versions, machine, git state and data of its start."""
        return self._read("manifest.json")

    def metrics(self) -> dict:
        """The final numbers. Raises ToCoError for a run that is not finished."""
        return self._read("metrics.json")

    def finish(self, metrics: dict) -> None:
        """Write the final numbers: from now on the run counts as finished."""
        write_whole(self.folder / "metrics.json", _json(metrics))

    def scores(self) -> dict | None:
        """What `keep_scores` was given; None before, and for a run that is not finished."""
        return self._read("scores.json") if self.finished and (self.folder / "scores.json").is_file() else None

    def keep_scores(self, scores: dict) -> None:
        """Write what the finished run was scored with (see `scores`)."""
        write_whole(self.folder / "scores.json", _json(scores))

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def records(self) -> list[dict]:
        """All lines logged so far; a last line cut short by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def keep_records_before(self, step: int) -> None:
        """Forget what was logged from `step` on: a resumed run logs it again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] < step]
        write_whole(self.folder / "metrics.jsonl", "".join(kept))

    def save(self, state: dict) -> None:
        """Replace the checkpoint: written beside, flushed to the disk, then renamed."""
        part = self.folder / "checkpoint.part"
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / "checkpoint.pt")

    def load(self) -> dict | None:
        """The newest checkpoint, or None. Loading it runs no code of the file's."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  torch raises many kinds
            raise ToCoError(f"{path} cannot be read as a checkpoint of this package: {type(error).__name__}") from error

    def _read(self, name: str) -> dict:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ToCoError(f"{self.folder} has no {name}: it is not the folder of a run that came so far") from None


def manifest() -> dict:
    """Versions, machine and git state, as far as they can be told."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "timm", "numpy", "opencv-python-headless", "opencv-python"):
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
        "git": _git_state(),
    }


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


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _json(values: dict) -> str:
    return json.dumps(_finite(values), indent=1) + "\n"


def _finite(value):
    """JSON knows no NaN: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
