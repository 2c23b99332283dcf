"""Training: the loop around a step (`train`); what a step computes is in `objective`."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.data import TrainVal, open_data
from toco_core.data.fingerprint import data_fingerprint
from toco_core.evaluation.evaluate import Evaluation, evaluate_as
from toco_core.machine import distributed
from toco_core.machine.device import keep_freed_memory, resolve_device
from toco_core.machine.precision import attention_of, autocast_of, resolve_precision
from toco_core.model import ToCo
from toco_core.objective import TERMS, Term, objective
from toco_core.runs.folder import Run, data_digest, file_digest
from toco_core.runs.opened import Opened, load_model_state, open_run
from toco_core.runs.own_terms import check_terms, own_terms, variant
from toco_core.runs.shipped import shipped_run
from toco_core.train.backward import backward, crop_generator
from toco_core.train.batches import config_batches, to_device
from toco_core.train.failures import failed_step, gradient_length, not_finite
from toco_core.train.film import Film
from toco_core.train.interruptions import StepGuard, saved_when_stopped, with_resume_hint
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.optimizer import build_training, load_optimizer_state, set_rates
from toco_core.train.teacher import build_teacher, load_teacher, teacher_of, teaching
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
    on_step: Callable[[ToCo, int], None] | None = None,
    resume: bool = True,
    progress: bool = True,
    save_every: int = 0,
    save_minutes: float = 10.0,
    keep_every: int = 0,
    skip_nonfinite: int = 0,
    film: int = 0,
    kept: KeptTokens | None = None,
) -> Trained:
    """Train as `config` says, and validate. The run's folder follows from the config (see `runs.Run`).

    Args:
        terms: of the objective, by name: `TERMS | {"mine": Term(...)}` adds one (see `objective`). Its source is part
            of the run's name.
        data: the two splits, by default `open_data(config.data)`.
        on_record: called with each logged record, a dictionary that has "step" and either losses or validation scores.
        on_step: called after each step with the model and the number of steps that it has learned for. It may evaluate
            the model and must not change it; what it raises ends the training.
        resume: go on from the checkpoint of an interrupted run of the same config; a finished run is loaded, not
            repeated. False: start anew.
        save_every, save_minutes: checkpoints between those of the validations, after so many steps and after so much
            time; 0: none.
        keep_every: steps whose checkpoints are kept for good, multiples of this number; 0: none. The last one and that
            of the best validation (final CAM; image labels where there are no masks) are always kept.
        skip_nonfinite: so many steps may be left out because their loss or its gradient is not finite.
        film: steps between two frames of the training's film, small CAMs of four validation images in the run's folder
            (see `film`); 0: none. A finished run gets none.
        kept: tokens of frozen blocks that earlier runs computed, where `config` keeps them (see `train.kept_tokens`).
            It moves no bit.

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
    model, optimizer = build_training(config, data.train.n_classes, device, fused=device.type != "mps")
    schedule, teacher = config.schedule, build_teacher(model, config)
    if schedule.compile_blocks:
        model.compile_blocks()
    autocast = autocast_of(config, device)
    keep_freed_memory()

    run = Run.of(config, variant(terms))
    camera = Film(run, data.val, config, every=film if share.first else 0)
    state = share.from_first(run.load() if resume and share.first else None)
    start, best, skipped, saved_at, unvalidated = 0, -1.0, 0, time.monotonic(), False
    if state is not None:
        load_model_state(model, state["model"], run, data)
        load_optimizer_state(optimizer, state["optimizer"], run)
        if teacher is not None:
            load_teacher(teacher, state, run, data)
        if share.first:
            run.refuse_other_data(data, config.model.weights_file)
        start, best, skipped = state["step"], state.get("best", best), state.get("skipped", skipped)
        unvalidated = state.get("unvalidated") is True
    elif share.first:
        run.begin(
            config,
            data={"train": len(data.train), "val": len(data.val), "classes": list(data.train.class_names)},
            data_sha256=data_digest(data),
            fingerprint=data_fingerprint(data),
            weights_sha256=file_digest(config.model.weights_file) if config.model.weights_file else None,
            processes=share.n,
            device=str(device),
            precision=resolve_precision(config.precision, device),
            own_terms=own_terms(terms),
        )
    if share.first:
        run.keep_records_before(start, validated=not unvalidated)
    progress = progress and share.first
    kept = KeptTokens() if kept is None else kept
    if schedule.warm_start_steps and not start:  # before the processes share the model, which makes their weights equal
        with attention_of(model, config, device), kept.of(model, blocks=kept_blocks(config)):
            warm_start(model, data.train, config, autocast=autocast, progress=progress)
    if teacher is not None and not start:
        teacher.update_parameters(model)
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
            state |= {"teacher": teacher.module.state_dict()} if teacher is not None else {}
            numbers = {"step": done, "best": best, "skipped": skipped}
            run.save(state | numbers | ({"unvalidated": True} if unvalidated else {}), **which)

    def keeps(done: int) -> bool:
        return bool(keep_every) and done % keep_every == 0

    validation, guard = None, StepGuard(start, patient=share.n == 1)
    with (
        attention_of(model, config, device),
        kept.of(model, blocks=kept_blocks(config)),
        teaching(teacher, config, device, kept),
        with_resume_hint(run),
        contextlib.closing(tracker),
        guard,
        saved_when_stopped(guard, run, save),
    ):
        if unvalidated:  # it was stopped in the validation that belongs to its last step
            is_best, unvalidated = validate_after(start - 1), False
            save(start, best=is_best, keep=keeps(start))
        batches = config_batches(
            data,
            config,
            model,
            part=part,
            start_step=start,
            stop_step=schedule.steps,
            workers=config.data.workers,
            cache=config.data.cache,
            views_per_image=config.data.views_per_image,
            pin_memory=device.type == "cuda",
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
        if camera.due(start) and start < schedule.steps and not camera.has(start):
            camera.take(model, start)
        model.train()
        for step, loaded in enumerate(bar, start):
            guard.begin()
            set_rates(optimizer, config, step)
            batch = to_device(loaded, model, device)
            if config.release.average_before_teacher:
                model.update_ema(schedule.momentum)
            generator = crop_generator(config, step, part.start)
            optimizer.zero_grad(set_to_none=True)
            options = {"terms": terms, "generator": generator, "autocast": autocast, "share": share}
            options |= {"teacher": teacher_of(teacher)}
            result = backward(compute, model, batch, config, step, **options)
            fault = not_finite({"loss": result.total, "gradient's length": gradient_length(model)}, share)
            if fault:  # it must not reach the weights, nor the next checkpoint
                skipped += 1
                if skipped > skip_nonfinite:
                    raise failed_step(
                        fault, run, model, teacher_of(teacher), share.gathered(loaded), result, config, step, share
                    )
                if progress:
                    bar.write(f"step {step} is left out: {fault}", file=sys.stdout)
            if not config.release.average_before_teacher:
                model.update_ema(schedule.momentum)
            if not fault:
                optimizer.step()
                if teacher is not None:
                    teacher.update_parameters(model)

            done = step + 1
            if step % config.log_interval == 0 or done == schedule.steps:
                record = {"step": step, **share.numbers({"total": result.total, **result.terms})}
                note(record | ({"skipped": skipped} if skipped else {}))
                tracker.log(step, {f"rate/{group['name']}": group["lr"] for group in optimizer.param_groups})
                bar.set_postfix(loss=f"{record['total']:.3f}")
            unvalidated = done == schedule.steps or bool(config.eval_interval) and done % config.eval_interval == 0
            guard.end(done)
            if camera.due(done, last=done == schedule.steps):
                camera.take(model, done)
            if on_step:
                on_step(model, done)
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


def trained_run(
    config: TrainConfig, *, data: TrainVal | None = None, terms: Mapping[str, Term] = TERMS, **options
) -> Opened:
    """The run of a config: what notebooks that look into a model begin with. One that comes with the package is opened
    there, the same on every machine; another is trained first where it is not finished, `options` as for `train`.

    Raises ToCoError as `train` does, also for a finished run of other data or other weights.
    """
    data = data or open_data(config.data)
    run = (shipped_run(config) if not variant(terms) else None) or Run.of(config, variant(terms))
    if not run.finished:
        train(config, data=data, terms=terms, **options)
    run.refuse_other_data(data, config.model.weights_file)
    return open_run(run.folder, data=data, device=config.device)._replace(config=config)


def _final_numbers(validation: Evaluation, config: TrainConfig) -> dict:
    """Scores in percent and the best threshold; without masks only the image-level ones."""
    best = {"best_beta": validation.cam.best_beta} if validation.n_masks else {}
    return validation.summary(config.labels.beta) | best
