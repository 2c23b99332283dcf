"""What does one wait for before anything happens: imports, the model, the embedded data set, the first image?

    python experiments/benchmarks/startup.py

Each stage in a process of its own, in the order of a notebook's first cells; process time (the processor's work; the
first start on a machine also reads some 500 MB of libraries from its disk) and wall time, median of three. "torch" is
the floor: it is imported in any case. Writes experiments/records/benchmarks_startup.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from measure import machine, write_record

STAGES = {
    "import torch": "import torch",
    "import toco_core": "import toco_core",
    "a notebook's imports": "from toco_core import viz; import toco_core.config.parameters, toco_core.train.loop",
    "the same and timm": """
from toco_core import viz; import toco_core.config.parameters, toco_core.train.loop
from toco_core.machine.torchvision_shim import make_importable
make_importable()
import timm""",
    "the same and a model": """
from toco_core import viz; import toco_core.config.parameters, toco_core.train.loop
from toco_core.config import tiny
from toco_core.model import ToCo
ToCo(tiny().model, 8)""",
    "the embedded data set, drawn": """
from toco_core.data.scenes import scenes_folder
scenes_folder(progress=False)""",
}
TIMED = """
import time
wall, own = time.perf_counter(), time.process_time()
{code}
print(time.perf_counter() - wall, time.process_time() - own)"""


def seconds_of(code: str) -> tuple[float, float]:
    """Wall and process time of some code in a new process with an empty cache of data sets."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TOCO_CACHE": cache}
        command = [sys.executable, "-c", TIMED.format(code=code)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    wall, own = output.split()[-2:]
    return float(wall), float(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    record = {"machine": machine(), "stages": {}}
    for name, code in STAGES.items():
        wall, own = (statistics.median(v) for v in zip(*(seconds_of(code) for _ in range(args.repeats)), strict=True))
        record["stages"][name] = {"wall_seconds": round(wall, 2), "process_seconds": round(own, 2)}
        print(f"{name:32} {wall:6.2f} s wall  {own:6.2f} s process", flush=True)
    print("written:", write_record("benchmarks_startup.json", record).name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
