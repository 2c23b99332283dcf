import pickle

from toco_core.errors import MOST, ToCoError


def test_a_message_is_one_line_that_prints():
    told = str(ToCoError("name = 'a\nb\x1b[31m\udce9ü猫\u202e' is\tnot allowed"))
    assert told == r"name = 'a\nb\x1b[31m\udce9ü猫\u202e' is\tnot allowed"
    told.encode()


def test_a_long_value_loses_its_middle():
    told = str(ToCoError(f"dataset = {'x' * 10**6} is not allowed: a folder is wanted"))
    assert (
        len(told) <= MOST and told.startswith("dataset = xxx") and told.endswith("x is not allowed: a folder is wanted")
    )


def test_it_travels_between_processes():
    assert str(pickle.loads(pickle.dumps(ToCoError("a\nb")))) == r"a\nb"
