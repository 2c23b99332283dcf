"""Two processes with half of every batch against one with the whole."""

import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from killed_training import SMALL
from small_config import small_recipe, stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core import losses
from toco_core.__main__ import main
from toco_core.config import override, tiny
from toco_core.data import open_train_val
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate
from toco_core.machine import distributed
from toco_core.machine.distributed import ALONE, Share
from toco_core.model import ToCo
from toco_core.objective import TERMS, StepInput, Term, objective
from toco_core.runs.folder import Run
from toco_core.runs.own_terms import variant
from toco_core.train import launch
from toco_core.train.backward import backward, crop_generator
from toco_core.train.loop import train

K, B = 3, 4
ALL = {
    "cls": 1.0,
    "aux_cls": 0.9,
    "ptc": 0.2,
    "ctc": 0.5,
    "seg": 0.1,
    "energy": 0.05,
    "exchange": 0.4,
    "consistency": 0.3,
}


def config_of(data, out_dir):
    """Sizes of validation images differ; one step alone, three with everything."""
    config = override(small_recipe(), **SMALL, dataset=str(data), out_dir=str(out_dir))
    return override(config, steps=4, batch_size=B, eval_interval=2)


def model_of(config):
    """In float64 and far from its start, as in test_train.py; the decoder is sure of some pixels."""
    torch.manual_seed(0)
    model = ToCo(config.model, K).double()
    stir(model, 0.2)
    model.decoder.conv8.weight.data *= 30
    return model


def batch_of(model):
    """Four images of 32 x 48 that differ in how much of them is real: so do the numbers of pairs and of pixels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, B, 3, 5, 6, generator=generator, dtype=torch.float64)
    views = [model.normalise(F.interpolate(part, size=(32, 48), mode="bicubic").clamp(0, 1)) for part in coarse]
    image_labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    boxes = torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41], [8, 17, 9, 30], [0, 32, 20, 48]])
    return StepInput(*views, image_labels, boxes)


def objects(step):
    """A label of our own: B H W, 1 where the pseudo label shows a class."""
    return (step.pseudo_label > 0) & (step.pseudo_label != 255)


def count_objects(label):
    return label.sum()[None]


def edge_of_objects(step):
    """A term of our own: the mean squared logit of the background over all pixels of objects in the batch."""
    (pixels,) = step.count("own")
    return step.parts * (step.seg_logits[:, 0].square() * step.made(objects)).sum() / pixels


def one_step(config, share):
    """Terms of the whole batch and gradients after one step's backward pass."""
    model, part = model_of(config), share.part(B)
    batch = StepInput(*(value[part] for value in batch_of(model)))
    compute = distributed.shared_step(objective, model, share)
    terms = TERMS | {"own": Term(edge_of_objects, label=objects, count=count_objects, weight=0.3)}
    options = {"terms": terms, "weights": ALL | {"own": 0.3}}
    options |= {"generator": crop_generator(config, 20, part.start), "share": share}
    result = backward(compute, model, batch, config, 20, **options)
    terms = {"total": result.total, **result.terms}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: share.mean(value.detach()) for name, value in terms.items()}, gradients


def both_scores(data, share):
    """The evaluation at a square and at native size."""
    config = config_of(data, "unused")
    torch.manual_seed(3)
    model, source = ToCo(config.model, K), open_train_val(data, val="train").val
    return [
        evaluate(model, source, size=size, scales=(1.0,), batch_size=2, progress=False, share=share)
        for size in (32, None)
    ]


def in_one_of_two(rank, meeting, data, out_dir):
    torch.set_num_threads(1)
    with distributed.joined("cpu", init_method=meeting, rank=rank, world_size=2) as share:
        assert share == Share(rank, 2) and distributed.current() == share
        step = one_step(config_of(data, out_dir), share)
        in_parts = one_step(override(config_of(data, out_dir), accumulate=2), share)
        scores = both_scores(data, share)
        train(config_of(data, out_dir), progress=False)
        torch.save({"step": step, "in parts": in_parts, "counts": counts(scores)}, f"{out_dir}/{rank}.pt")


def counts(scores):
    """Everything that is counted or ranked, as plain values, and in which words."""
    numbers = [
        [torch.from_numpy(part).clone() for part in (s.cam.counts, s.aux_cam.counts, s.seg.iou)]
        + [s.n_masks, s.n_images, s.classes.mean_average_precision, s.aux_classes.f1]
        for s in scores
    ]
    return {"numbers": numbers, "protocols": [s.protocol for s in scores]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found: their files, the folder of images and the config of their run."""
    folder = tmp_path_factory.mktemp("two")
    data = write_voc_folder(folder / "data", n=7)
    arguments = ((folder / "store").as_uri(), str(data), str(folder))
    torch.multiprocessing.start_processes(in_one_of_two, arguments, nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], data, config_of(data, folder)


def assert_same_step(found, wanted):
    assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-9)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["step", "in parts"])
def test_losses_and_gradients_are_those_of_one_process(two, how):
    """Each process with its two images at once, and with one after the other."""
    found, _, config = two
    wanted = one_step(config, ALONE)
    for process in found:
        assert_same_step(process[how], wanted)
    assert all(value != 0 for value in wanted[0].values())


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_one_after_the_other_are_the_whole(two, parts, constant):
    config = override(two[2], ptc_constant=constant)
    assert_same_step(one_step(override(config, accumulate=parts), ALONE), one_step(config, ALONE))


def test_what_memory_holds_falls_with_the_parts(two):
    """Bytes of activations that wait for the backward pass, at most at any time."""

    def most_kept(accumulate):
        now, most = 0, 0

        def keep(tensor):
            nonlocal now, most
            now += tensor.nbytes
            most = max(most, now)
            return tensor

        def give_back(tensor):
            nonlocal now
            now -= tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            one_step(override(two[2], accumulate=accumulate), ALONE)
        return most

    whole = most_kept(1)
    assert most_kept(2) < 0.7 * whole and most_kept(4) < 0.5 * whole


def test_the_halves_of_the_batch_differ_in_pairs_and_pixels():
    """So that a mean of means would be another number."""
    labels = torch.tensor([[[0, 1, 1]], [[0, 255, 255]]])
    tokens = torch.randn(2, 5, 1, 3, generator=torch.Generator().manual_seed(0))
    halves = [losses.ptc_loss(tokens[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert abs(losses.ptc_loss(tokens, labels) - sum(halves) / 2) > 1e-3


def test_validation_is_that_of_one_process(two):
    found, data, _ = two
    wanted = counts(both_scores(data, ALONE))
    for process in found:
        assert_close(process["counts"]["numbers"], wanted["numbers"], rtol=0, atol=0, equal_nan=True)
        assert process["counts"]["protocols"] == wanted["protocols"]


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(two, tmp_path):
    _, data, config = two
    shared, alone = Run.of(config), train(override(config, out_dir=str(tmp_path)), progress=False).run
    assert shared.finished and shared.folder.name == alone.folder.name
    assert shared.manifest()["processes"] == 2 and alone.manifest()["processes"] == 1
    one, two_ = ([r for r in run.records() if "total" in r] for run in (alone, shared))
    for name in ("total", "cls", "aux_cls", "ptc", "ctc"):  # float32: a label near a threshold may move
        assert_close(two_[0][name], one[0][name], rtol=1e-4, atol=1e-5)
    assert [r["step"] for r in shared.records()] == [r["step"] for r in alone.records()]


def one_of_two_dies(rank, dying, meeting, data, out_dir):
    """A training without end; the process `dying` is killed at some moment after the first step."""
    torch.set_num_threads(1)
    config = override(config_of(data, out_dir), steps=10**6, eval_interval=0)

    def die():
        while not Run.of(config).records():
            time.sleep(0.05)
        time.sleep(random.random())
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == dying:
        threading.Thread(target=die, daemon=True).start()
    try:
        with distributed.joined("cpu", init_method=meeting, rank=rank, world_size=2):
            train(config, progress=False, save_every=1)
    except ToCoError as error:
        Path(out_dir, "told").write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("dying", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_other(tmp_path, dying):
    """It ended in gloo's own RuntimeError; the other says within a minute what is left."""
    data = write_voc_folder(tmp_path / "data", n=4)
    arguments = (dying, (tmp_path / "store").as_uri(), str(data), str(tmp_path))
    both = [
        torch.multiprocessing.get_context("spawn").Process(target=one_of_two_dies, args=(rank, *arguments))
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    try:
        both[dying].join(120)
        both[1 - dying].join(60)
        assert [both[dying].exitcode, both[1 - dying].exitcode] == [-signal.SIGKILL, 0]
    finally:
        for process in both:
            process.kill()
    told = (tmp_path / "told").read_text()
    assert told.startswith("another process of this training has ended (") and "\n" not in told
    assert "the same call goes on from there" in told or dying == 0


def test_shares():
    assert [Share(rank, 3).part(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(ToCoError, match="batch_size = 8 cannot be shared equally by 3 processes"):
        Share(0, 3).part(8)
    assert [Share(rank, 2).chunks(7, 2) for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6]]
    assert Share(2, 3).chunks(3, 2) == [] and ALONE.chunks(3, 2) == [0, 1, 2]
    assert distributed.current() == ALONE and ALONE.gathered(5) == [5] and ALONE.from_first("a") == "a"


def test_the_command_line_trains(tmp_path, capsys):
    data = write_voc_folder(tmp_path / "data", n=4)
    config = override(config_of(data, tmp_path / "runs"), steps=1, warmup_steps=0)
    changed = {**SMALL, "dataset": str(data), "out_dir": str(tmp_path / "runs"), "steps": 1, "warmup_steps": 0,
               "batch_size": B, "eval_interval": 2}  # fmt: skip
    base, ours = tiny().to_dict(), config.to_dict()
    for section, values in ours.items():
        if isinstance(values, dict):
            changed |= {name: value for name, value in values.items() if base[section][name] != value}
    main(["train", "tiny", *(f"{name}={value!r}" for name, value in changed.items())])
    said = capsys.readouterr().out
    assert str(Run.of(config).folder) in said and Run.of(config).finished
    assert "a step takes about" in said and f"batch_size = {B} is not the recipe's" in said


@pytest.mark.slow
def test_a_notebook_starts_processes(two, tmp_path):
    """The run above is there already: its processes find it finished, and a failing one is told by its message."""
    _, _, config = two
    told = []
    opened = launch.train_on(config, processes=2, on_record=told.append)
    assert opened.run.folder == Run.of(config).folder and told == opened.run.records()
    with pytest.raises(ToCoError, match="processes = 2 with ctc_batch_negatives is not allowed: 1"):
        launch.train_on(override(config, ctc_batch_negatives=True), processes=2)
    with pytest.raises(ToCoError, match="batch_size = 4 cannot be shared equally by 3 processes"):
        launch.train_on(config, processes=3)
    with pytest.raises(ToCoError, match="accumulate = 4 x 2 processes must divide batch_size = 4"):
        launch.train_on(override(config, accumulate=4), processes=2)
    with pytest.raises(ToCoError, match="dataset folder /nowhere does not exist"):
        launch.train_on(override(config, dataset="/nowhere", out_dir=str(tmp_path)), processes=2)


@pytest.mark.slow
def test_processes_train_with_a_term_of_ones_own_and_tell_its_records(two, tmp_path):
    """The run is the term's, not the plain one; started anew it tells what is logged now, not the old log."""
    config = override(two[2], steps=2, out_dir=str(tmp_path))
    terms = TERMS | {"own": Term(edge_of_objects, label=objects, count=count_objects, weight=0.3)}
    first, again = [], []
    opened = launch.train_on(config, processes=2, terms=terms, on_record=first.append)
    assert opened.run.folder == Run.of(config, variant(terms, config)).folder and not Run.of(config).folder.exists()
    assert opened.run.manifest()["own_terms"].keys() == {"own"} and first == opened.run.records()
    opened = launch.train_on(config, processes=2, terms=terms, on_record=again.append, resume=False)
    assert again == opened.run.records() and len(again) == len(first) and all("own" in r for r in again if "total" in r)


def refused(model, done):
    """Of two processes the second one ends, after the first validation."""
    if done == 3 and distributed.current().rank == 1:
        raise ToCoError("enough")


def failed(model, done):
    if done == 3 and distributed.current().rank == 1:
        raise ZeroDivisionError("by zero")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_step", "words"),
    [
        (refused, "^enough; the checkpoint is in .* and the same call goes on from there$"),
        (failed, "^a process of the training ended: ZeroDivisionError: by zero$"),
    ],
)
def test_what_ended_one_process_is_told_and_not_that_the_first_saw_it_go(two, tmp_path, on_step, words):
    config = override(two[2], out_dir=str(tmp_path))
    with pytest.raises(ToCoError, match=words):
        launch.train_on(config, processes=2, on_step=on_step)
    assert Run.of(config).load()["step"] == 2


def test_a_term_that_other_processes_cannot_see_is_refused_before_they_start(two, tmp_path, monkeypatch):
    """Of a notebook, and without a name. A script is run again by the processes that it spawns."""
    config, main = override(two[2], out_dir=str(tmp_path)), types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def own(step):
        return step.output.class_logits.mean()

    own.__module__, own.__qualname__, main.own = "__main__", "own", own
    for term in (Term(own, weight=0.1), Term(lambda step: own(step), weight=0.1)):
        with pytest.raises(ToCoError, match="the term 'own' with processes = 2 is not allowed: functions of a module"):
            launch.train_on(config, processes=2, terms=TERMS | {"own": term})
    assert not Run.of(config).folder.exists()
    launch._refuse_hidden(TERMS | {"own": Term(edge_of_objects, label=objects, count=count_objects)}, 2)
    main.__file__ = "script.py"
    launch._refuse_hidden(TERMS | {"own": Term(own, weight=0.1)}, 2)


def test_a_refusal_is_told_where_another_process_ends_first(tmp_path, monkeypatch):
    """The others see only that one has gone; here all end so, and one of them had refused."""
    config = override(tiny(), dataset="/nowhere", out_dir=str(tmp_path))

    class Ended:
        processes = ()

        def join(self, timeout):
            raise launch.multiprocessing.ProcessRaisedException("RuntimeError: Connection closed by peer", 1, 4)

    def start(function, args, **options):
        with pytest.raises(launch.multiprocessing.ProcessRaisedException, match="/nowhere does not exist"):
            begun(function, (1, *args[1:]), **options | {"nprocs": 1, "join": True})
        return Ended()

    begun = launch.multiprocessing.start_processes
    monkeypatch.setattr(launch.multiprocessing, "start_processes", start)
    with pytest.raises(ToCoError, match="^dataset folder /nowhere does not exist"):
        launch.train_on(config, processes=2)
