"""What tells two functions of one's own apart, and what does not."""

import enum
import functools
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from toco_core.config import override, tiny
from toco_core.runs.described import described

SHARPNESS = 2.0
Kind = enum.Enum("Kind", ["A", "B"])


def helper(x):
    return x * 3


def reads_a_constant(x):
    return x * SHARPNESS


def asks_a_helper(x):
    def inner(y):
        return helper(y)

    return inner(x)


def around(value):
    def function(x):
        return x, value

    return function


def with_default(value):
    def function(x, *, value=value):
        return x, value

    return function


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x

    def method(self, x):
        return self.factor * x


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


@dataclass(frozen=True)
class Options:
    factor: float


def module(value):
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(layer.weight, value)
    torch.nn.init.zeros_(layer.bias)
    return layer


KINDS = {
    "number": lambda v: v,
    "list": lambda v: [1, v],
    "dictionary": lambda v: {"a": {"b": v}},
    "set": lambda v: {1, v},
    "NumPy scalar": np.float32,
    "array": lambda v: np.array([1, v]),
    "array of objects": lambda v: np.array([1, v, "a"], dtype=object),
    "tensor": torch.tensor,
    "bf16 tensor": lambda v: torch.tensor([1, v], dtype=torch.bfloat16),
    "network": module,
    "object": Scaled,
    "method": lambda v: Scaled(v).method,
    "object with slots": Slotted,
    "dataclass": Options,
    "config": lambda v: override(tiny(), ptc=v),
    "enumeration": lambda v: Kind.A if v == 2 else Kind.B,
    "partial": lambda v: functools.partial(helper, v),
    "cached": lambda v: functools.cache(around(v)),
    "function": around,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [around, with_default, lambda value: value], ids=["closure", "default", "itself"])
def test_a_value_that_a_function_holds_counts(kind, bound):
    one, same, other = (described(bound(KINDS[kind](value))) for value in (2, 2, 3))
    assert one == same != other


def test_globals_and_helpers_count(monkeypatch):
    before = [described(function) for function in (reads_a_constant, asks_a_helper)]
    assert before == [described(function) for function in (reads_a_constant, asks_a_helper)]
    monkeypatch.setattr(sys.modules[__name__], "SHARPNESS", 2.5)
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: x * 4)
    after = [described(function) for function in (reads_a_constant, asks_a_helper)]
    assert all(a != b for a, b in zip(before, after))


def test_globals_that_are_not_read_do_not_count(monkeypatch):
    def reads_an_attribute(step):
        return step.output

    before = described(reads_an_attribute)
    monkeypatch.setitem(reads_an_attribute.__globals__, "output", 7)
    assert described(reads_an_attribute) == before


def test_functions_without_source_are_told_by_their_code():
    def made(text):
        space = {}
        exec(f"def f(x):\n    inner = lambda y: {text}\n    return inner(x)", space)
        return described(space["f"])

    assert made("y + 1") == made("y + 1") != made("y + 2") and made("y + 1") != made("y - 1")


def test_a_script_is_the_same_in_the_processes_that_it_spawns(monkeypatch):
    """There it is called `__mp_main__`: the run of its term was trained in one folder and looked for in another."""
    told = []
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setattr(helper, "__module__", name)
        told.append(described(asks_a_helper))
    assert told[0] == told[1] and "__main__.helper" in told[0]


def test_what_is_installed_is_told_by_its_name():
    assert described(torch.relu) != described(torch.sigmoid) and described(np.exp) != described(np.log)
    assert described(np.mean) == described(np.mean) and "def mean" not in described(np.mean)
    assert described(around(torch.nn.functional)) != described(around(np.linalg))
    assert described(torch.Generator()) == described(torch.Generator())


def test_what_refers_to_itself_ends():
    ring = [1]
    ring.append(ring)
    one = Scaled(2)
    one.factor = one

    def recursive(x):
        return recursive(x - 1) if x else types

    assert described(ring) and described(one) and described(recursive)
    assert described([ring, one]) != described([one, ring])


def test_another_process_says_the_same():
    code = """
import test_described as t
from toco_core.runs.described import described
print(described([t.asks_a_helper, t.Scaled(3), {"b", "a", "c"}, t.KINDS]))
"""
    here, command = Path(__file__).parent, [sys.executable, "-c", code]
    runs = [
        subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=here, env=os.environ | {"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and "return x * 3" in runs[0]
