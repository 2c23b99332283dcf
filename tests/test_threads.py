"""How threads wait is set before torch is loaded, its OpenMP obeys, and what the user chose is left alone."""

import os
import re
import subprocess
import sys

import pytest

from toco_core.machine.threads import CHOSEN_BY_USER, SETTINGS


def run(code: str, **variables) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)


def settings_after(code: str, **variables) -> str:
    show = f"\nimport os\nprint({{n: os.environ[n] for n in {CHOSEN_BY_USER} if n in os.environ}})"
    return run(code + show, **variables).stdout.strip()


def test_they_are_set_when_the_package_is_imported_and_torch_is_not_needed_for_it():
    assert settings_after("import sys, toco_core\nassert 'torch' not in sys.modules") == str(SETTINGS)


@pytest.mark.parametrize(
    "name, value", (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "0"))
)
def test_what_the_user_chose_is_left_alone(name, value):
    assert settings_after("import toco_core", **{name: value}) == str({name: value})


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_the_runtime_obeys():
    said = run("import toco_core, torch", OMP_DISPLAY_ENV="verbose").stderr
    spins = re.search(r"GOMP_SPINCOUNT = '(\d+)'", said)
    if spins is None:
        pytest.skip("torch is built without GNU's OpenMP")
    assert spins[1] == SETTINGS["GOMP_SPINCOUNT"]
