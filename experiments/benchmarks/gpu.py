"""How right and how fast is this code on a GPU? One command of at most eight minutes that asks everything at once.

    python experiments/benchmarks/gpu.py --out FOLDER               # on one GPU
    python experiments/benchmarks/gpu.py --out FOLDER --rehearse    # the same code on the CPU, tiny sizes, seconds

It needs torch, torchvision, timm, NumPy, OpenCV, jaxtyping and what these bring along. FOLDER/gpu.json is written anew
after every section and FOLDER/gpu.log holds what is printed; a section that fails leaves its error there and the others
go on; none begins after `--minutes`. The sections, the most wanted first:

- correctness: the release's values, and ten steps of a ViT-Tiny and of the embedded model on the CPU in float32 against
  the device in float32 and bf16: every loss term, the gradients of the first step, its labels;
- speed: a late step (every term counts) from uint8 images in pinned memory to the optimiser's step, in bf16, eager and
  with replayed blocks, at the end with compiled ones: images a second, peak memory, share of the peak, share of the
  time in which the device idles, its largest kernels, and every place where the host waits for it;
- pieces: PAR, PTC, lattices, energy, dense CRF, crops;
- evaluation with several scales and mirror images, without and with the dense CRF; the loader; the embedded recipe and
  its pretraining in minutes.

The share of the peak counts the multiplications of a step (nothing is done twice) and divides by a large bf16 product
that is timed here, and by the maker's figure where the card is known. For comparison: the published run took 0.584 s
for a step of 4 images on two A100. Aim on one H100: 100 images a second at batch 16, 60 at batch 4.
"""

import argparse
import collections
import contextlib
import itertools
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare machine: the package is not installed

import cv2
import numpy as np
import torch
from measure import LATE, batch_of, config_of, machine, model_of
from torch.utils.flop_counter import FlopCounterMode

from toco_core import crops, labels, losses, par
from toco_core.backbone import build_encoder
from toco_core.config import TrainConfig, override, tiny
from toco_core.data import Batch, open_data, training_batches
from toco_core.evaluation.evaluate import evaluate
from toco_core.lattice import energy_lattices
from toco_core.losses import dense_energy_loss
from toco_core.machine.device import resolve_device
from toco_core.machine.graphs import BlockGraphs
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.objective import Step, objective
from toco_core.refiners.crf import crf_lattices, dense_crf
from toco_core.train.backward import backward
from toco_core.train.batches import to_device, view_options
from toco_core.train.failures import gradient_length, not_finite
from toco_core.train.loop import train

K = 20
MAKERS_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense, SXM
REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "reference_values"
PRETRAINING = Path(__file__).resolve().parents[1] / "records" / "pretrain.json"
CPU = torch.device("cpu")


class Plan(NamedTuple):
    """The device and the sizes of one run."""

    device: torch.device
    width: str = "base"
    size: int = 448
    batches: tuple[int, ...] = (4, 8, 16)
    compiled: tuple[int, ...] = (16,)
    """Batches that are measured with compiled blocks, too."""
    repeats: int = 20
    steps: int = 10
    """Of the comparison with the CPU."""
    small: int = 224
    """Crop of the ViT-Tiny in it."""
    images: int = 8
    """That are evaluated."""
    native: tuple[int, int] = (375, 500)
    workers: tuple[int, ...] = (0, 8, 14)
    product: int = 8192
    recipe: dict = {}
    """Changes of the embedded recipe."""
    scenes: int | None = None
    """Images of its two splits; None: all."""

    @property
    def local(self) -> int:
        """Side of a local view: the published 96 of 448 pixels."""
        return max(16, 96 * self.size // 448)

    def config(self, width: str, **changes) -> TrainConfig:
        return config_of(width, crop_size=self.size, local_size=self.local, **changes)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable, repeats: int | None = None) -> float:
        """Median over the repeats, after three calls that do not count."""
        for _ in range(3 if self.device.type == "cuda" else 1):
            work()
        found = []
        for _ in range(repeats or self.repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)


REHEARSAL = Plan(
    CPU, width="tiny", size=64, batches=(2,), compiled=(), repeats=1, steps=2, small=64, images=2, native=(40, 56),
    workers=(0,), product=64,
    recipe={
        "steps": 2, "warmup_steps": 1, "batch_size": 2, "n_local": 2, "eval_interval": 0, "crop_size": 64,
        "cache": False, "cam_scales": (1.0,),
    },
    scenes=4,
)  # fmt: skip


# ---- correctness


def correctness(plan: Plan) -> dict:
    found = {"reference": reference_errors(plan.device)}
    for name, config, size, batch_size in (
        ("ViT-Tiny", config_of("tiny", crop_size=plan.small, local_size=96 * plan.small // 448), plan.small, 2),
        ("embedded", override(tiny(), **plan.recipe), tiny().data.crop_size, 4),
    ):
        wanted = ten_steps(config, "fp32", CPU, size, batch_size, plan.steps)
        for precision in ("fp32", "bf16"):
            sizes = (size, batch_size, plan.steps)
            ours = ten_steps(config, precision, plan.device, *sizes, boxes=wanted.boxes)
            found[f"{name}, {precision}"] = compared(wanted, ours)
            replayed = ten_steps(config, precision, plan.device, *sizes, boxes=wanted.boxes, recorded=True)
            found[f"{name}, {precision}, replayed against eager"] = compared(ours, replayed)
    return found


def reference_errors(device: torch.device) -> dict[str, float]:
    """Largest error of each value against the release's, relative to the largest; of labels the share that differs."""

    def arrays(name: str) -> dict[str, torch.Tensor]:
        with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as stored:
            return {key: torch.from_numpy(stored[key]).to(device) for key in stored.files}

    def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        ours = ours.detach().reshape(theirs.shape)
        return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()

    found = {}
    given = arrays("par")
    found["PAR"] = error(par.refine(given["images"], given["masks"]), given["refined_10"])
    given = arrays("ptc")
    tokens = given["tokens"].requires_grad_()
    loss = losses.ptc_loss(tokens, given["labels"], keep_constant=True)
    found["PTC"] = error(loss, given["loss"])
    found["PTC gradient"] = error(torch.autograd.grad(loss, tokens)[0], given["grad"])
    given = arrays("ctc")
    student = given["student"].requires_grad_()
    temperature = given["temperature"].item()
    loss = losses.ctc_loss(student, given["teacher"], given["positive"] == 1, temperature=temperature)
    found["CTC"] = error(loss, given["loss"])
    found["CTC gradient"] = error(torch.autograd.grad(loss, student)[0], given["grad"])
    given = arrays("cam_labels")
    label = labels.pseudo_label(
        given["images"], given["cam"], given["image_labels"], beta_l=0.25, beta_h=0.7, valid_box=given["boxes"]
    )
    found["pseudo labels that differ"] = (label != given["par_label"]).double().mean().item()
    given = arrays("crop_flags")
    flags = crops.crop_flags(given["roi_mask"], given["top"], given["left"], int(given["crop_size"]))
    found["flags that differ"] = (flags != (given["positive"] == 1)).double().mean().item()
    return found


class Steps(NamedTuple):
    """What some steps of training computed, on the CPU."""

    terms: list[dict[str, float]]
    gradients: dict[str, torch.Tensor]
    """Of the first step, as are the labels."""
    labels: dict[str, torch.Tensor]
    boxes: list[crops.CropBoxes]
    """Where each step cut its local views."""


def ten_steps(
    config: TrainConfig,
    precision: str,
    device: torch.device,
    size: int,
    batch: int,
    steps: int,
    *,
    boxes: list[crops.CropBoxes] | None = None,
    recorded: bool = False,
) -> Steps:
    """Training steps on one batch, every term counting, from the same weights everywhere; and from the same crops,
    which one pixel of a region more or less would move."""
    config = override(config, precision=precision)
    model = model_of(config, K)
    inputs = batch_of(model, size, batch)
    inputs = type(inputs)(*(x if name == "image_labels" else x.to(device) for name, x in inputs._asdict().items()))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    terms, gradients, found_labels, drawn = [], {}, {}, []
    with attention_of(model, config, device), model.recorded_blocks() if recorded else contextlib.nullcontext():
        for number in range(steps):
            if model.graphs is not None:
                model.graphs.begin_step()
            options = {"generator": torch.Generator().manual_seed(number), "autocast": autocast_of(config, device)}
            given = None if boxes is None else crops.CropBoxes(*(value.to(device) for value in boxes[number]))
            step = Step(model, inputs, config, LATE, boxes=given, **options)
            result = objective(step)
            optimizer.zero_grad(set_to_none=True)
            result.total.backward()
            terms.append({name: value.item() for name, value in result.terms.items()})
            if not number:
                gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
                names = ("pseudo_label", "token_label", "is_positive")
                found_labels = {name: getattr(step, name).cpu() for name in names}
            drawn.append(crops.CropBoxes(*(value.cpu() for value in step.boxes)))
            model.update_ema(config.schedule.momentum)
            optimizer.step()
    return Steps(terms, gradients, found_labels, drawn)


def compared(wanted: Steps, ours: Steps) -> dict:
    """Per term the relative difference on each step; gradients of the first step as a whole and the worst tensor."""
    squares = {
        n: ((g - wanted.gradients[n]).square().sum(), wanted.gradients[n].square().sum())
        for n, g in ours.gradients.items()
    }
    whole = (sum(s[0] for s in squares.values()) / sum(s[1] for s in squares.values())).sqrt().item()
    errors = {name: (s[0] / s[1].clamp(min=1e-30)).sqrt().item() for name, s in squares.items()}
    worst = max(errors, key=errors.get)
    pairs = list(zip(wanted.terms, ours.terms, strict=True))

    def one(theirs: float, found: float) -> float:
        return abs(found - theirs) / max(abs(theirs), 1e-2)

    return {
        "terms": {name: [round(one(w[name], o[name]), 8) for w, o in pairs] for name in wanted.terms[0]},
        "gradients": whole,
        "worst_gradient": {worst: errors[worst]},
        "labels_equal": {n: (ours.labels[n] == w).double().mean().item() for n, w in wanted.labels.items()},
    }


# ---- speed of a step


class Training:
    """Model, optimiser and a batch on the host; `step` does what the training loop does between two batches.

    `way`: "eager"; "replayed", with the blocks as CUDA graphs; "compiled", with them made by torch.compile; or both.
    """

    def __init__(self, plan: Plan, batch_size: int, way: str = "eager"):
        size, self.device = plan.size, plan.device
        self.config = plan.config(plan.width, precision="bf16")
        self.model = model_of(self.config, K)
        like = batch_of(self.model, size, batch_size)
        views = [(255 * self.model.denormalise(view)).round().to(torch.uint8) for view in like[:3]]
        host = [*views, like.image_labels, like.valid_box]
        if self.device.type == "cuda":
            host = [tensor.pin_memory() for tensor in host]
        self.loaded = Batch(tuple(str(b) for b in range(batch_size)), *host)
        self.model.to(self.device)
        if "compiled" in way:
            self.model.compile_blocks()
        if "replayed" in way and self.device.type == "cuda":
            self.model.graphs = BlockGraphs(self.model.encoder.blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.number = 0

    def total(self) -> torch.Tensor:
        """The loss of a step, after its backward pass."""
        batch = to_device(self.loaded, self.model, self.device)
        generator, autocast = torch.Generator().manual_seed(self.number), autocast_of(self.config, self.device)
        return backward(objective, self.model, batch, self.config, LATE, generator=generator, autocast=autocast).total

    def step(self) -> None:
        self.number += 1
        self.model.update_ema(self.config.schedule.momentum)
        with attention_of(self.model, self.config, self.device):
            self.optimizer.zero_grad(set_to_none=True)
            total = self.total()
        if not not_finite({"loss": total, "gradient's length": gradient_length(self.model)}):
            self.optimizer.step()

    def flops(self) -> int:
        """Multiplications and additions of a step's matrix products, convolutions and attention."""
        with FlopCounterMode(display=False) as counter, self.model.plain_attention():
            self.total()
        return counter.get_total_flops()


def speed(plan: Plan, batches: tuple[int, ...], ways: tuple[str, ...]) -> dict:
    reachable = product_flops(plan)
    found = {"bf16_product_tflops": round(reachable / 1e12, 3), "points": []}
    if not batches:
        return found
    fewest = min(batches)
    flops = Training(plan, fewest).flops() / fewest
    for batch, way in itertools.product(batches, ways):
        try:
            point = step_point(plan, batch, way, batch * flops, reachable)
        except Exception as error:  # noqa: BLE001  the other points are worth as much
            traceback.print_exc(file=sys.stdout)
            point = {"batch": batch, "way": way, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        found["points"].append(point)
        print({key: value for key, value in point.items() if key not in ("waits", "kernels")}, flush=True)
    return found


def product_flops(plan: Plan) -> float:
    """What the device reaches in one large bf16 product."""
    one = torch.randn(plan.product, plan.product, device=plan.device, dtype=torch.bfloat16)
    return 2 * plan.product**3 / plan.seconds(lambda: one @ one)


def step_point(plan: Plan, batch_size: int, way: str, flops: float, reachable: float) -> dict:
    on_gpu = plan.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = Training(plan, batch_size, way)
    began = time.perf_counter()
    training.step()
    plan.wait()
    first = time.perf_counter() - began
    seconds = plan.seconds(training.step)
    memory = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    card = torch.cuda.get_device_name() if on_gpu else ""
    maker = next((peak for name, peak in MAKERS_BF16.items() if name in card), None)
    return {
        "width": plan.width,
        "batch": batch_size,
        "way": way,
        "ms_per_step": round(1000 * seconds, 1),
        "images_per_second": round(batch_size / seconds, 1),
        "peak_gib": None if memory is None else round(memory, 2),
        "held_gib": None if memory is None else round(torch.cuda.memory_reserved() / 2**30, 2),
        "tflop_per_step": round(flops / 1e12, 4),
        "share_of_reachable": round(flops / seconds / reachable, 3),
        "share_of_makers_peak": None if maker is None else round(flops / seconds / maker, 3),
        "seconds_of_first_step": round(first, 1),
        **kernels_of(plan, training, seconds),
        "waits": waits_of(training) if on_gpu else {},
    }


def waits_of(training: Training) -> dict[str, int]:
    """Place in the code -> how often the host waited there in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return dict(collections.Counter(places).most_common())


def kernels_of(plan: Plan, training: Training, seconds: float, top: int = 10) -> dict:
    """The kernels that take most of the device's time, how many a step launches, and the share of it without any."""
    kind = torch.autograd.DeviceType.CUDA if plan.device.type == "cuda" else torch.autograd.DeviceType.CPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    if plan.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps = min(3, plan.repeats)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            training.step()
        plan.wait()
    # an operator's row repeats the time of the kernels that it launched, and so does an annotation's
    events = [e for e in profile.key_averages() if e.device_type == kind and not e.is_user_annotation]
    spent = {e.key: e.self_device_time_total if kind.name == "CUDA" else e.self_cpu_time_total for e in events}
    total = sum(spent.values()) or 1
    ranked = sorted(spent, key=spent.get, reverse=True)[:top]
    return {
        "idle_share": round(max(0.0, 1 - total / steps / 1e6 / seconds), 3),
        "launches_per_step": sum(e.count for e in events) // steps,
        "kernels": [{"name": key[:80], "share": round(spent[key] / total, 3)} for key in ranked],
    }


# ---- pieces, evaluation, loader, recipe


def pieces(plan: Plan) -> dict[str, float]:
    """Milliseconds of what a step calls besides the network, for the largest batch; the CRF for one image."""
    B, size, device, betas = max(plan.batches), plan.size, plan.device, {"beta_l": 0.25, "beta_h": 0.7}
    model = model_of(plan.config("tiny"), K)
    batch = batch_of(model, size, B)
    unit = model.denormalise(batch.images).clamp(0, 1).to(device)
    image_labels, boxes = batch.image_labels, batch.valid_box.to(device)
    coarse = torch.rand(B, K, size // 16, size // 16, generator=torch.Generator().manual_seed(0))
    cam = torch.nn.functional.interpolate(coarse.to(device), size=(size, size), mode="bilinear")
    label = labels.pseudo_label(unit, cam, image_labels, valid_box=boxes, **betas)
    region = labels.region_mask(cam, image_labels, **betas)
    tokens = torch.randn(B, 768, size // 16, size // 16, device=device, requires_grad=True)
    token_label = labels.token_label(cam, image_labels, tuple(tokens.shape[2:]), **betas)
    logits = torch.randn(B, K + 1, size, size, device=device, requires_grad=True)
    lattices = energy_lattices(unit)
    small = torch.nn.functional.interpolate(unit, scale_factor=0.5)
    affinity, masks = par.affinity(small), torch.rand(B, 4, *small.shape[2:], device=device)

    def drawn():
        found = crops.sample_crops(region, n_crops=8, crop_size=plan.local, valid_box=boxes)
        return crops.cut_crops(unit, *found, plan.local), crops.crop_flags(region, *found, plan.local)

    image = torch.nn.functional.interpolate(unit[:1], size=plan.native)[0]
    probs = torch.nn.functional.interpolate(logits[:1].detach(), size=plan.native)[0].softmax(0)
    work = {
        "pseudo label": lambda: labels.pseudo_label(unit, cam, image_labels, valid_box=boxes, **betas),
        "PAR's rounds": lambda: par.apply(affinity, masks),
        "PTC and its gradient": lambda: losses.ptc_loss(tokens, token_label).backward(),
        "lattices": lambda: energy_lattices(unit),
        "energy and its gradient": lambda: dense_energy_loss(logits, unit, label, boxes, lattices=lattices).backward(),
        "crops": drawn,
        "lattices of the CRF": lambda: crf_lattices(image),
        "dense CRF": lambda: dense_crf(probs, image),
    }
    return {name: round(1000 * plan.seconds(call, min(plan.repeats, 5)), 2) for name, call in work.items()}


class JPEGs:
    """A split in memory: smooth pictures as JPEG files, decoded when they are asked for, and their masks."""

    def __init__(self, n: int, size: tuple[int, int]):
        rng = np.random.default_rng(0)
        self.names, (H, W) = [f"picture {i}" for i in range(n)], size
        coarse = rng.integers(0, 256, (n, 12, 16, 3), np.uint8)
        pictures = [cv2.resize(picture, (W, H), interpolation=cv2.INTER_CUBIC) for picture in coarse]
        self.files = [cv2.imencode(".jpg", picture)[1] for picture in pictures]
        self.masks = [rng.integers(0, K + 1, size).astype(np.uint8) for _ in range(n)]
        self.image_labels = np.eye(K, dtype=np.float32)[rng.integers(0, K, n)]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(self.files[index], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def mask(self, index: int) -> np.ndarray:
        return self.masks[index]


def evaluation(plan: Plan) -> dict[str, float]:
    """Seconds an image: CAM at three scales, segmentation at three, all mirrored, scored at the image's own size."""
    config = plan.config(plan.width, precision="bf16")
    model = model_of(config, K).to(plan.device).eval()
    found = {}
    for name, crf, n in (("without CRF", False, plan.images), ("with CRF", True, min(2, plan.images))):
        source = JPEGs(n, plan.native)
        options = {"size": plan.size, "seg_scales": (1.0, 1.25, 1.5), "crf": crf, "progress": False}
        autocast = autocast_of(config, plan.device)
        with attention_of(model, config, plan.device):
            took = plan.seconds(lambda: evaluate(model, source, autocast=autocast, **options), 1)  # noqa: B023
        found[name] = round(took / n, 4)
    return found


def loader(plan: Plan) -> dict[str, float]:
    """Images a second that the loader makes of JPEGs of native size, by its number of workers."""
    config = plan.config("tiny")
    options = view_options(config, model_of(config, K))
    batch_size, found = max(plan.batches), {}
    for workers in plan.workers:
        batches = 3 if not workers else 20
        loaded = training_batches(
            JPEGs(64, plan.native), crop_size=plan.size, batch_size=batch_size, seed=0, workers=workers,
            stop_step=batches + 1, **options,
        )  # fmt: skip
        next(loaded)
        began = time.perf_counter()
        n = sum(len(batch.names) for batch in loaded)
        found[f"{workers} workers"] = round(n / (time.perf_counter() - began), 1)
    return found


def recipe(plan: Plan, folder: Path) -> dict[str, float]:
    """Minutes of the embedded recipe with its validations, and of the pretraining's recorded steps at full depth."""
    config = override(tiny(), device=str(plan.device), out_dir=str(folder / "runs"), **plan.recipe)
    began = time.perf_counter()
    data = open_data(config.data)
    data = data._replace(**{n: getattr(data, n).subset(range(plan.scenes)) for n in ("train", "val") if plan.scenes})
    finished = train(config, data=data, progress=False, resume=False)
    found = {"minutes of the recipe": round((time.perf_counter() - began) / 60, 3)}
    found["final CAM"] = round(finished.validation.summary(config.labels.beta)["cam_miou"], 2)

    encoder = build_encoder(tiny().model).to(plan.device).train()
    images = torch.rand(16, 3, 128, 128, device=plan.device)  # the canvases of a step
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-6)

    def step():
        with torch.autocast(plan.device.type, torch.bfloat16):
            encoder.forward_features(images).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps = sum(json.loads(PRETRAINING.read_text(encoding="utf-8"))["steps"])
    return found | {"minutes of the pretraining": round(steps * plan.seconds(step) / 60, 3)}


# ---- the command


class Log:
    """What is printed, in a file, too."""

    def __init__(self, path: Path):
        self.terminal, self.file = sys.stdout, path.open("w", encoding="utf-8")

    def write(self, text: str) -> None:
        self.terminal.write(text)
        self.file.write(text)

    def flush(self) -> None:
        self.terminal.flush()
        self.file.flush()


def run(plan: Plan, folder: Path, minutes: float) -> dict:
    """All sections; returns what gpu.json holds at the end."""
    sections = {
        "correctness": correctness,
        "speed": lambda plan: speed(plan, plan.batches, ("eager", "replayed")),
        "pieces": pieces,
        "evaluation": evaluation,
        "loader": loader,
        "recipe": lambda plan: recipe(plan, folder),
        "compiled": lambda plan: speed(
            plan, plan.compiled, ("compiled", "compiled and replayed")
        ),  # compiling alone takes minutes
    }
    began = time.perf_counter()
    on_gpu = plan.device.type == "cuda"
    record = {"machine": machine() | ({"gpu": torch.cuda.get_device_name()} if on_gpu else {})}
    print(record["machine"], flush=True)
    for name, section in sections.items():
        if time.perf_counter() - began > 60 * minutes:
            record[name] = {"left_out": f"{minutes:g} minutes are over"}
        else:
            start = time.perf_counter()
            try:
                record[name] = section(plan)
            except Exception as error:  # noqa: BLE001  the other sections are worth as much
                traceback.print_exc(file=sys.stdout)
                record[name] = {"error": f"{type(error).__name__}: {error}"}
            record[name]["section_seconds"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(record[name], indent=1), flush=True)
        (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=6, help="after these no further section begins")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at tiny sizes")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU here (torch.cuda.is_available() is False): nothing was measured, no record was written")
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "gpu.log")
    sys.stdout = log
    try:
        return run(REHEARSAL if args.rehearse else Plan(resolve_device("cuda")), args.out, args.minutes)
    finally:
        sys.stdout = log.terminal
        log.file.close()


if __name__ == "__main__":
    main()
