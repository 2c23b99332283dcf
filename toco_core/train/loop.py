"""Training: the loop around a step (`train`); what a step computes is in `objective`."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from toco_core.config import DataConfig, TrainConfig, lr_at
from toco_core.data import Batch, TrainVal, open_train_val, to_unit, training_batches
from toco_core.data.augment import IMAGE_COLOUR
from toco_core.data.fingerprint import data_fingerprint
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import Evaluation, eval_size, evaluate
from toco_core.machine import distributed
from toco_core.machine.device import in_float64, keep_freed_memory
from toco_core.machine.distributed import ALONE, Share
from toco_core.machine.files import are_tensors, refuse_wrong_keys
from toco_core.model import ToCo, build_model, skeleton
from toco_core.objective import (
    TERMS,
    StepInput,
    Term,
    backward,
    check_terms,
    crop_generator,
    objective,
    own_terms,
    stage_starts,
    variant,
)
from toco_core.runs.folder import Run, data_digest, file_digest
from toco_core.runs.shipped import shipped_run
from toco_core.train.interruptions import StepGuard, saved_when_stopped, with_resume_hint
from toco_core.train.trackers import NoTracker, open_tracker, required, tagged, validation_pictures
from toco_core.train.warm_start import warm_start


class Trained(NamedTuple):
    """A finished run: the model in evaluation mode, its folder, its data, its last validation."""

    model: ToCo
    run: Run
    data: TrainVal
    validation: Evaluation


def _alone(function: Callable) -> Callable:
    """One process at a time trains a run; processes that share one training count as one.

    Those do not wait for others to end: only the first would, and the rest would give it up.
    """

    @functools.wraps(function)
    def waits(config: TrainConfig, *, terms: Mapping[str, Term] = TERMS, **options):
        share = distributed.current()
        check_terms(terms, config)
        with Run.of(config, variant(terms)).alone(wait=share.n == 1) if share.first else contextlib.nullcontext():
            return function(config, terms=terms, **options)

    return waits


@_alone
def train(
    config: TrainConfig,
    *,
    terms: Mapping[str, Term] = TERMS,
    data: TrainVal | None = None,
    on_record: Callable[[dict], None] | None = None,
    resume: bool = True,
    progress: bool = True,
    save_every: int = 0,
    save_minutes: float = 10.0,
    keep_every: int = 0,
    skip_nonfinite: int = 0,
) -> Trained:
    """Train as `config` says, and validate. The run's folder follows from the config (see `runs.Run`).

    Args:
        terms: of the objective, by name: `TERMS | {"mine": Term(...)}` adds one (see `objective`). Its source is part
            of the run's name.
        data: the two splits, by default `open_data(config.data)`.
        on_record: called with each logged record, a dictionary that has "step" and either losses or validation scores.
        resume: go on from the checkpoint of an interrupted run of the same config; a finished run is loaded, not
            repeated. False: start anew.
        save_every, save_minutes: checkpoints between those of the validations, after so many steps and after so much
            time; 0: none.
        keep_every: steps whose checkpoints are kept for good, multiples of this number; 0: none. The last one and that
            of the best validation (final CAM; image labels where there are no masks) are always kept.
        skip_nonfinite: so many steps may be left out because their loss or its gradient is not finite.

    Everything random in a step follows from (seed, step): where a run is interrupted, and how often, moves no bit.
    Among several processes (see `distributed`) each computes its part of every batch, and the first one writes.

    Raises ToCoError for what cannot work, before the first step where it can be known. A loss or a gradient that is not
    finite ends the run before it reaches the weights; `failures.load_failure` brings that step back.
    """
    share = distributed.current()
    part = share.part(config.schedule.batch_size)
    config.schedule.images_at_once(share.n)  # refuses parts of different sizes
    required(config.log_to)
    device, data = resolve_device(config.device), data or open_data(config.data)
    torch.manual_seed(config.seed)
    model = build_model(config, data.train.n_classes).to(device)
    schedule = config.schedule
    model.freeze_blocks(schedule.frozen_blocks)
    groups = model.parameter_groups(
        lr=schedule.lr,
        head_lr_scale=schedule.head_lr_scale,
        classifier_lr_scale=schedule.classifier_lr_scale,
        weight_decay=schedule.weight_decay,
        decay_all=config.release.decay_all,
    )
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, fused=device.type != "mps")
    if schedule.compile_blocks:
        model.compile_blocks()
    autocast = autocast_of(config, device)
    keep_freed_memory()

    run = Run.of(config, variant(terms))
    state = share.from_first(run.load() if resume and share.first else None)
    start, best, skipped, saved_at, unvalidated = 0, -1.0, 0, time.monotonic(), False
    if state is not None:
        load_model_state(model, state["model"], run, data)
        load_optimizer_state(optimizer, state["optimizer"], run)
        if share.first:
            run.refuse_other_data(data, weights_file(config))
        start, best, skipped = state["step"], state.get("best", best), state.get("skipped", skipped)
        unvalidated = state.get("unvalidated") is True
    elif share.first:
        run.begin(
            config,
            data={"train": len(data.train), "val": len(data.val), "classes": list(data.train.class_names)},
            data_sha256=data_digest(data),
            fingerprint=data_fingerprint(data),
            weights_sha256=file_digest(weights_file(config)) if weights_file(config) else None,
            processes=share.n,
            device=str(device),
            precision=resolve_precision(config.precision, device),
            own_terms=own_terms(terms),
        )
    if share.first:
        run.keep_records_before(start, validated=not unvalidated)
    progress = progress and share.first
    if schedule.warm_start_steps and not start:  # before the processes share the model, which makes their weights equal
        with attention_of(model, config, device):
            warm_start(model, data.train, config, autocast=autocast, progress=progress)
    compute = distributed.shared_step(objective, model, share)

    def validate() -> Evaluation:
        bar_below = progress and sys.stdout.isatty()  # a second bar below the first needs a terminal
        return evaluate_as(config, model, data.val, progress=bar_below, what="validating", share=share)

    tracker = open_tracker(config, run, start) if share.first else NoTracker()

    def note(record: dict) -> None:
        if share.first:
            run.log(record)
            tracker.log(record["step"], tagged(record))
        if on_record and share.first:
            on_record(record)

    def validate_after(step: int) -> bool:
        """Validate and log; whether it is the best so far."""
        nonlocal validation, best
        validation = validate()
        scores = _final_numbers(validation, config)
        note({"step": step} | scores)
        if config.log_to and share.first:
            for tag, picture in validation_pictures(model, data.val, config).items():
                tracker.picture(step, tag, picture)
        is_best = scores.get("cam_miou", scores["map"]) > best
        best = max(best, scores.get("cam_miou", scores["map"]))
        return is_best

    def save(done: int, **which: bool) -> None:
        if share.first:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": config.to_dict()}
            numbers = {"step": done, "best": best, "skipped": skipped}
            run.save(state | numbers | ({"unvalidated": True} if unvalidated else {}), **which)

    def keeps(done: int) -> bool:
        return bool(keep_every) and done % keep_every == 0

    validation, guard = None, StepGuard(start, patient=share.n == 1)
    with (
        attention_of(model, config, device),
        with_resume_hint(run),
        contextlib.closing(tracker),
        guard,
        saved_when_stopped(guard, run, save),
    ):
        if unvalidated:  # it was stopped in the validation that belongs to its last step
            is_best, unvalidated = validate_after(start - 1), False
            save(start, best=is_best, keep=keeps(start))
        batches = training_batches(
            data.train,
            crop_size=config.data.crop_size,
            batch_size=schedule.batch_size,
            part=part,
            seed=config.seed,
            start_step=start,
            stop_step=schedule.steps,
            workers=config.data.workers,
            cache=config.data.cache,
            pin_memory=device.type == "cuda",
            **view_options(config, model),
        )
        bar = tqdm(
            batches,
            total=schedule.steps,
            initial=start,
            desc="training",
            unit="step",
            disable=not progress,
            file=sys.stdout,
        )
        model.train()
        for step, loaded in enumerate(bar, start):
            guard.begin()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(
                    step,
                    base_lr=group["base_lr"],
                    steps=schedule.steps,
                    warmup_steps=schedule.warmup_steps,
                    warmup_ratio=schedule.warmup_ratio,
                    power=schedule.power,
                    rate_jump=config.release.rate_jump,
                )
            batch = to_device(loaded, model, device)
            if config.release.average_before_teacher:
                model.update_ema(schedule.momentum)
            generator = crop_generator(config, step, part.start)
            optimizer.zero_grad(set_to_none=True)
            options = {"terms": terms, "generator": generator, "autocast": autocast, "share": share}
            result = backward(compute, model, batch, config, step, **options)
            fault = not_finite({"loss": result.total, "gradient's length": gradient_length(model)}, share)
            if fault:  # it must not reach the weights, nor the next checkpoint
                skipped += 1
                if skipped > skip_nonfinite:
                    raise _failed(fault, run, model, share.gathered(loaded), result, config, step, share)
                if progress:
                    bar.write(f"step {step} is left out: {fault}", file=sys.stdout)
            if not config.release.average_before_teacher:
                model.update_ema(schedule.momentum)
            if not fault:
                optimizer.step()

            done = step + 1
            if step % config.log_interval == 0 or done == schedule.steps:
                record = {"step": step, **_numbers({"total": result.total, **result.terms}, share)}
                note(record | ({"skipped": skipped} if skipped else {}))
                tracker.log(step, {f"rate/{group['name']}": group["lr"] for group in optimizer.param_groups})
                bar.set_postfix(loss=f"{record['total']:.3f}")
            unvalidated = done == schedule.steps or bool(config.eval_interval) and done % config.eval_interval == 0
            guard.end(done)
            validates, is_best = unvalidated, False
            if validates:
                bar.set_description("validating")
                is_best, unvalidated = validate_after(step), False
                bar.set_description("training")
            due = save_every and done % save_every == 0 or 0 < 60 * save_minutes < time.monotonic() - saved_at
            if validates or keeps(done) or due:
                save(done, best=is_best, keep=keeps(done))
                saved_at = time.monotonic()
        model.eval()
        if validation is None:  # a finished run was loaded
            validation = validate()
        if share.first:
            run.finish(
                _final_numbers(validation, config)
                | {"steps": schedule.steps, "protocol": f"val: {validation.protocol}"}
                | ({"skipped": skipped} if skipped else {})
            )
    return Trained(model, run, data, validation)


def not_finite(values: dict[str, Tensor], share: Share = ALONE) -> str:
    """ "the loss is nan", of the first whose mean over the processes is not finite; "" where all are.

    Here a step waits for the device, and, where it makes the dense energy's lattices, at its beginning. It must:
    whether the weights change, and whether the run goes on, hangs on the answer. All kernels of the step are queued by
    then, so that little more than the launch of the optimizer's is not hidden behind them.
    """
    found = _numbers(values, share)
    return next((f"the {what} is {value}" for what, value in found.items() if not math.isfinite(value)), "")


def gradient_length(model: ToCo) -> Tensor:
    """Euclidean length of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def load_model_state(model: ToCo, found: dict[str, Tensor], run: Run, data: TrainVal) -> None:
    """Raises ToCoError that says what differs, where a checkpoint is of other classes or of another model."""
    refuse_other_model(model, found, run, data)
    model.load_state_dict(found)


def refuse_other_model(model: ToCo, found: dict[str, Tensor], run: Run, data: TrainVal) -> None:
    """What `load_model_state` raises; the model may be a `skeleton`."""
    wanted, name = model.state_dict(), "classifier.weight"
    if not are_tensors(found):
        raise ToCoError(f"{run.folder}: the checkpoint holds no tensors by name")
    if name in found and found[name].ndim == 2 and len(found[name]) != len(wanted[name]):
        raise ToCoError(
            f"{run.folder}: the checkpoint is of a model for {len(found[name])} classes, but {data.train.root} has "
            f"{len(wanted[name])}: it needs the data set that it was trained on"
        )
    refuse_wrong_keys(f"{run.folder}: the checkpoint is of another model", found, wanted)


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: dict, run: Run) -> None:
    """The same for the optimizer's averages."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    try:
        for number, values in found["state"].items():
            if any(values[name].shape != shapes[number] for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"the averages of parameter {number} have another shape")
            if set(values) != {"step", "exp_avg", "exp_avg_sq"} or values["step"].numel() != 1:
                raise ValueError(f"parameter {number} has other values than step, exp_avg and exp_avg_sq")
            if not all(value.is_floating_point() for value in values.values()):
                raise ValueError(f"the values of parameter {number} are no floating-point numbers")
        own = optimizer.state_dict()["param_groups"]  # rates and moments are the config's, not the file's
        optimizer.load_state_dict({"state": found["state"], "param_groups": own})
    except Exception as error:  # noqa: BLE001  what a foreign file holds may fail anywhere
        raise ToCoError(f"{run.folder}: the checkpoint's optimizer does not fit: {error}") from error


def _failed(fault, run, model, parts: list[Batch], result, config, step, share: Share) -> ToCoError:
    """Saves the step that failed, over all processes, and tells of it."""
    names = [name for part in parts for name in part.names]
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in Batch._fields if name != "names"}
    terms = _numbers(result.terms, share)
    message = f"{fault} on step {step}: {terms}; images {', '.join(names)}"
    if share.first:
        run.save_failure(
            {
                "step": step,
                "message": message,
                "config": config.to_dict(),
                "model": model.state_dict(),
                "batch": tensors,
                "names": names,
            }
        )
    return ToCoError(f"{message}; failures.load_failure({str(run.folder)!r}) brings it back")


class Opened(NamedTuple):
    """A run to look into: its model in evaluation mode, its config, its folder, its data."""

    model: ToCo
    config: TrainConfig
    run: Run
    data: TrainVal


def trained_run(
    config: TrainConfig,
    *,
    data: TrainVal | None = None,
    progress: bool = True,
    terms: Mapping[str, Term] = TERMS,
) -> Opened:
    """The run of a config: what notebooks that look into a model begin with. One that comes with the package is opened
    there, the same on every machine; another is trained first where it is not finished.

    Raises ToCoError as `train` does, also for a finished run of other data or other weights.
    """
    data = data or open_data(config.data)
    run = (shipped_run(config) if not variant(terms) else None) or Run.of(config, variant(terms))
    if not run.finished:
        train(config, data=data, progress=progress, terms=terms)
    run.refuse_other_data(data, weights_file(config))
    return open_run(run.folder, data=data, device=config.device)._replace(config=config)


def open_run(
    folder: Path | str, *, data: TrainVal | None = None, device: str = "auto", checkpoint: str = "last"
) -> Opened:
    """A checkpoint in a run's folder: the "last", the "best", or that of a kept step ("500"). Raises ToCoError where
    there is none, or it is of other classes or of another layout, and where `data` are given that it was not trained
    on."""
    run = Run(folder)
    config, state = run.config(), run.load(checkpoint)
    if state is None:
        if checkpoint != "last" and run.load() is not None:
            kept = ", ".join(map(str, run.kept_steps())) or "no steps"
            raise ToCoError(f"{run.folder} has no checkpoint {checkpoint!r}: it has the last one and kept {kept}")
        raise ToCoError(f"{run.folder} has no checkpoint yet: its training has not come to its first validation")
    given, data = data is not None, data or open_data(config.data)
    refuse_other_model(skeleton(config.model, data.train.n_classes), state["model"], run, data)
    model = build_model(config, data.train.n_classes, pretrained=False)
    load_model_state(model, state["model"], run, data)
    if given:
        run.refuse_other_data(data)
    return Opened(model.to(resolve_device(device)).eval(), config, run, data)


def evaluate_as(
    config: TrainConfig,
    model: ToCo,
    source,
    *,
    crf: bool | Mapping = False,
    crf_workers: int = 0,
    on_batch: Callable | None = None,
    progress: bool = True,
    what: str = "evaluating",
    share: Share = ALONE,
    keep: Path | str | None = None,
) -> Evaluation:
    """`evaluate` on a split with the sizes, scales, precision and attention that `config` trains and validates with."""
    device = model.classifier.weight.device
    with attention_of(model, config, device):
        return evaluate(
            model,
            source,
            size=eval_size(config),
            **config.labels.cam_options(),
            seg_scales=config.seg_scales,
            max_over_scales=config.release.max_over_scales,
            crf=crf,
            crf_workers=crf_workers,
            autocast=autocast_of(config, device),
            on_batch=on_batch,
            progress=progress,
            workers=config.data.workers,
            what=what,
            share=share,
            keep=keep,
        )


def estimate_seconds(config: TrainConfig, data: TrainVal, *, terms: Mapping[str, Term] = TERMS) -> float:
    """About how long `train` will take here: three steps of each stage and a few validation images are measured."""
    device = resolve_device(config.device)
    model = build_model(config, data.train.n_classes).to(device).train()
    autocast, schedule = autocast_of(config, device), config.schedule
    keep_freed_memory()
    starts = sorted({0, schedule.steps} | {s for s in stage_starts(config, terms) if s < schedule.steps})
    total = 0.0
    with attention_of(model, config, device):
        batches = training_batches(
            data.train,
            crop_size=config.data.crop_size,
            batch_size=schedule.batch_size,
            seed=config.seed,
            stop_step=3 * len(starts),
            **view_options(config, model),
        )
        for first, last in zip(starts, starts[1:], strict=False):
            seconds = []
            for _ in range(3):
                began = _when_done(device)
                batch = to_device(next(batches), model, device)
                generator = torch.Generator().manual_seed(0)
                options = {"terms": terms, "generator": generator, "autocast": autocast}
                backward(objective, model, batch, config, first, **options)
                model.zero_grad(set_to_none=True)
                seconds.append(_when_done(device) - began)
            total += min(seconds) * (last - first)
        few = data.val.subset(range(min(8, len(data.val))))
        began = time.perf_counter()
        evaluate_as(config, model, few, progress=False)
        validations = -(-schedule.steps // config.eval_interval) if config.eval_interval else 1
        total += validations * (time.perf_counter() - began) * len(data.val) / len(few)
    return total


def _when_done(device: torch.device) -> float:
    """The clock, in seconds, when all that was queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def weights_file(config: TrainConfig) -> str | None:
    """The file that the encoder begins with; None where it begins with others or at random."""
    return config.model.weights if config.model.pretrained else None


def open_data(config: DataConfig) -> TrainVal:
    """The two splits that a config names; the embedded data set is drawn first where it is not there yet."""
    return open_train_val(config.dataset, train=config.train_split, val=config.val_split)


def to_device(batch: Batch, model: ToCo, device: torch.device) -> StepInput:
    """A loaded batch, its images normalised as the backbone expects, its image labels where they are."""

    def ready(images: Tensor) -> Tensor:
        return model.normalise(to_unit(images.to(device, non_blocking=True)))

    return StepInput(
        ready(batch.images),
        ready(batch.global_view),
        ready(batch.local_image),
        batch.image_labels,
        batch.valid_box.to(device, non_blocking=True),
    )


def view_options(config: TrainConfig, model: ToCo) -> dict:
    """Keywords of `data.training_views` that a config determines, and the model's mean colour."""
    mean_colour = tuple((255 * model.mean).round().int().flatten().tolist())
    return {
        "scale_range": config.data.scale_range,
        "scale_relative": config.data.scale_relative,
        "blur_sigma": config.data.blur_sigma,
        "image_colour": IMAGE_COLOUR if config.release.always_blurred else IMAGE_COLOUR._replace(blur=0.0),
        "pad_colour": (0, 0, 0) if config.release.black_padding else mean_colour,
        "independent_local_image": config.release.independent_local_image,
        "mirrored_valid_box": config.release.mirrored_valid_box,
    }


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises ToCoError for a device that is not there.

    On CUDA two settings of the process change: a GPU named by its number becomes the current one, which is what pinned
    memory goes by, and a convolution in float32 is computed in float32, not in TF32.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, number = name.partition(":")
    if not there.get(kind) or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise ToCoError(f"device = {name!r} is not on this machine; there is {', '.join(k for k in there if there[k])}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor has instructions for it, else fp32. No timing: it is the same every time."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = _cpu_has("avx512_bf16") or has_matrix_engines()
    return "bf16" if device.type == "cpu" and native else "fp32"


def has_matrix_engines() -> bool:
    """Whether the processor multiplies bf16 matrices in units of its own (AMX), seven times as fast as float32."""
    return _cpu_has("amx_tile")


def _cpu_has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


def autocast_of(config: TrainConfig, device: torch.device) -> Callable:
    """A function that returns the precision context of a config."""
    bf16 = resolve_precision(config.precision, device) == "bf16"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def attention_of(model: ToCo, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The kernels that are the fastest for a config's precision, for everything that is computed in this context.

    In bf16 on a CPU attention by matrix products trains about twice as fast as the fused kernel; with matrix engines
    (AMX) that is so only where a gradient follows, and passes without one take the fused kernel. In `medium` precision
    matrix products of float32 are computed in bf16 by torch's setting, which is restored afterwards.
    """
    precision, products = resolve_precision(config.precision, device), torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu" and precision == "bf16":
            stack.enter_context(model.plain_attention(fused_without_gradient=has_matrix_engines()))
        if precision == "medium":
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("medium")
        yield


def passes_of(model: ToCo, config: TrainConfig) -> Callable:
    """A function that returns the context of a pass as a config wants it: kernels and precision."""
    device = model.classifier.weight.device
    autocast = autocast_of(config, device)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with attention_of(model, config, device), autocast():
            yield

    return context


def _numbers(terms: dict[str, Tensor], share: Share) -> dict[str, float]:
    """Means over the processes, as plain numbers."""
    values = share.mean(in_float64(torch.stack([value.detach() for value in terms.values()])))
    return dict(zip(terms, values.tolist(), strict=True))


def _final_numbers(validation: Evaluation, config: TrainConfig) -> dict:
    """Scores in percent and the best threshold; without masks only the image-level ones."""
    best = {"best_beta": validation.cam.best_beta} if validation.n_masks else {}
    return validation.summary(config.labels.beta) | best
