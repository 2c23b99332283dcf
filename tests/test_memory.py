import ctypes
import sys
from types import SimpleNamespace

import pytest

from toco_core.machine.device import keep_freed_memory


def test_both_thresholds_are_raised_where_glibc_is_there(monkeypatch):
    asked = {}
    library = SimpleNamespace(mallopt=lambda name, value: asked.update({name: value}) or 1)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert asked == {-1: 2**31 - 1, -3: 2**31 - 1}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda name, value: 0)])
def test_another_c_library_is_left_alone(monkeypatch, library):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not keep_freed_memory()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_another_system_is_left_alone(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not keep_freed_memory()
