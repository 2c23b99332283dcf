"""Damaged and hostile files: every reader ends in a result or in ToCoError; never a crash, a hang, or memory without
end.

Mutated files keep their structure (see `mutators`); pipes, devices, folders and endless files take their place, too.
The ordinary run gives each reader a few, `pytest -m exhaustive` 10,000 each, each process with a cap.
The environment variable TOCO_FUZZ is the number for the ordinary run, TOCO_FUZZ_SEED the seed of both.
"""

import io
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_readers import FILES, READERS, ROWS, STATE, attempt, build_folders, ends_well, npy, peak_megabytes, saved

from toco_core.errors import ToCoError

INPUTS = int(os.environ.get("TOCO_FUZZ", "25"))
SEED = int(os.environ.get("TOCO_FUZZ_SEED", "0"))
SLOW_INPUTS, SLOW_SECONDS = 10_000, 3600
MEGABYTES = 1000  # by which this process may grow over all inputs of a reader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return build_folders(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="hangs are told by an alarm")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(folders, name):
    path, read = READERS[name](folders)
    whole = path.read_bytes()
    if name != "failure":  # whose model is left out here: it is refused before it is damaged
        assert ends_well(lambda: read(path), name)
    before = peak_megabytes()
    for number in range(INPUTS):
        chance = random.Random(f"{name} {SEED} {number}")
        try:
            attempt(path, read, whole, chance, f"{name} number {number}")
        except BaseException as error:
            raise AssertionError(f"{name} number {number} of seed {SEED}: {error!r}") from error
    assert peak_megabytes() - before < MEGABYTES


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files(name):
    command = [sys.executable, str(Path(__file__).with_name("fuzz_readers.py")), name, str(SLOW_INPUTS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SLOW_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    print(outcomes)
    assert outcomes.get("ok", 0) + outcomes.get("ToCoError", 0) == SLOW_INPUTS and "slow" not in outcomes


def refused(folders, name, content, words):
    path, read = READERS[name](folders)
    whole, before = path.read_bytes(), peak_megabytes()
    path.write_bytes(content)
    try:
        with pytest.raises(ToCoError, match=words):
            read(path)
    finally:
        path.write_bytes(whole)
    assert peak_megabytes() - before < 200


def header(shape, dtype="|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def packed(content: bytes) -> bytes:
    """A checkpoint whose parts are compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    return file.getvalue()


def test_bombs_are_refused(folders):
    """Small files that claim, or would become, gigabytes."""
    huge = bytearray(FILES["photo.png"])
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    refused(folders, "photo.png", bytes(huge), "photo.png (is refused|is 60000 x 60000)")
    refused(folders, "array.npy", header((10**6, 10**6)) + b"1", "is not a NumPy file of image labels: 1 bytes for")
    laughs = [1, 0, 1]
    for _ in range(40):
        laughs = [laughs, laughs]
    refused(folders, "mapping.npy", npy(np.array({"img_0": laughs}, object)), "'img_0' has no row of labels")
    long_memo = header((), "|O") + b"\x80\x04Nr\xff\xff\xff\xff."  # an index for which the C version makes 64 GB
    refused(folders, "mapping.npy", long_memo, "holds a NoneType")
    long_bytes = header((), "|O") + b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"."
    refused(folders, "mapping.npy", long_bytes, "is not a NumPy file of image labels")
    wide = {"weight": torch.ones(1).expand(10**12)}
    refused(folders, "weights.pth", saved(wide), "weights.pth.* cannot be read")
    refused(
        folders, "checkpoint", packed(saved(STATE | {"more": torch.zeros(50_000_000)})), "cannot be read as a check"
    )
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "lol"}">' for i in range(12))
    bomb = f"<!DOCTYPE a [{entities}]><annotation><object><name>&e11;</name></object></annotation>"
    refused(folders, "xml", bomb.encode(), "is not valid XML")
    refused(folders, "json", b"[" * 200_000, "is not valid JSON")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:\\secret"])
def test_no_list_leads_out_of_its_folder(folders, place):
    words = "is not a name inside"
    refused(folders, "list", f"{place}\n".encode(), words)
    refused(folders, "csv", f"file,tags\n{place}.png,cat\n".encode(), words)
    refused(folders, "json", json.dumps([{"file": f"{place}.png", "tags": ["cat"]}]).encode(), words)
    path, _ = READERS["coco"](folders)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = f"{place}.jpg"
    refused(folders, "coco", json.dumps(content).encode(), words)


def test_pickles_of_many_protocols_are_read(folders):
    """What older versions of Python and NumPy wrote, mapping in a pickle of its own protocol."""
    path, read = READERS["mapping.npy"](folders)
    whole = path.read_bytes()
    for protocol in (2, 3, 4):
        path.write_bytes(header((), "|O") + pickle.dumps(np.array(ROWS, dtype=object), protocol=protocol))
        assert read(path).tolist() == [[1, 0, 1], [0, 1, 0]]
    path.write_bytes(whole)
