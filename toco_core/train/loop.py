"""Training: the loop around a step (`train`); what a step computes is in `objective`."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.data import Batch, TrainVal, open_data
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import Evaluation, evaluate_as
from toco_core.machine import distributed
from toco_core.machine.device import keep_freed_memory, resolve_device
from toco_core.machine.precision import attention_of, autocast_of, resolve_precision
from toco_core.model import ToCo
from toco_core.objective import TERMS, Objective, Term
from toco_core.runs.comparison import refuse_other_run
from toco_core.runs.folder import Run, data_facts, file_digest
from toco_core.runs.opened import Opened, load_model_state, open_run
from toco_core.runs.own_terms import check_terms, own_terms, variant
from toco_core.runs.shipped import shipped_run
from toco_core.train.backward import backward, crop_generator, recorded_blocks
from toco_core.train.batches import config_batches, to_device
from toco_core.train.changes import GOES_ON, allowed_changes, refuse_broken
from toco_core.train.failures import failed_step, gradient_length, not_finite
from toco_core.train.film import Film
from toco_core.train.interruptions import StepGuard, saved_when_stopped, with_resume_hint
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.optimizer import build_training, config_groups, load_optimizer_state, set_rates
from toco_core.train.rival import build_rival, load_rival, of_both
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
        run = Run.of(config, variant(terms, config))
        with run.alone(wait=share.n == 1) if share.first else contextlib.nullcontext():
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
    changed_data: bool = False,
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
        terms: of the objective, by name: `TERMS | {"mine": Term(...)}` adds one (see `objective`). What is your
            own in it, source and values (see `runs.described`), is part of the run's name.
        data: the two splits, by default `open_data(config.data)`.
        on_record: called with each logged record, a dictionary that has "step" and either losses or validation scores.
        on_step: called after each step with the model and the number of steps that it has learned for. It may evaluate
            the model and must not change it; what it raises ends the training.
        resume: go on from the checkpoint of an interrupted run of the same config; a finished run is loaded, not
            repeated. False: start anew.
        changed_data: go on although the images or labels of an interrupted run have changed; its manifest then says
            what, when and from which step on. Masks that nothing learns from may change without it.
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

    Raises ToCoError for what cannot work, before the first step where it can be known: before a run begins, every image
    and mask that it will read is decoded once. A loss or a gradient that is not finite ends the run before it reaches
    the weights; `failures.load_failure` brings that step back.
    """
    numbers = {"save_every": save_every, "save_minutes": save_minutes, "keep_every": keep_every}
    for name, value in (numbers | {"skip_nonfinite": skip_nonfinite, "film": film}).items():
        if not value >= 0:
            raise ToCoError(f"{name} = {value} is not allowed: 0 or more")
    share = distributed.current()
    part = share.part(config.schedule.batch_size)
    config.check_parts(share.n)
    required(config.log_to)
    device, data = resolve_device(config.device), data or open_data(config.data)
    run, kept = Run.of(config, variant(terms, config)), KeptTokens() if kept is None else kept
    options = {"on_record": on_record, "progress": progress, "skip_nonfinite": skip_nonfinite}
    options["changed_data"] = changed_data
    training = _Training(config, terms, data, run, share, device, **options)
    keep_freed_memory()
    camera = Film(run, data.val, config, every=film if share.first else 0)
    training.begin(share.from_first(run.load() if resume and share.first else None), kept)
    start = training.start
    compute = distributed.shared_step(of_both, torch.nn.ModuleList(training.networks), share)
    saved_at, guard = time.monotonic(), StepGuard(start, patient=share.n == 1)

    def keeps(done: int) -> bool:
        return bool(keep_every) and done % keep_every == 0

    with (
        attention_of(training.model, config, device),
        kept.of(training.model, blocks=kept_blocks(config)),
        recorded_blocks(training.model, config, share.n),
        teaching(teacher_of(training.teacher), config, device, kept),
        teaching(training.rival, config, device, kept),
        with_resume_hint(run, GOES_ON),
        contextlib.closing(training),
        guard,
        saved_when_stopped(guard, run, lambda done: training.save(done, keep=keeps(done))),
    ):
        stopped = training.unvalidated  # in the validation that belongs to its last step
        if stopped:
            training.validate(start - 1)
            training.save(start, keep=keeps(start))
        bar = tqdm(
            training.batches(part),
            total=config.schedule.steps,
            initial=start,
            desc="training",
            unit="step",
            disable=not training.progress,
            file=sys.stdout,
        )
        at_end = start == config.schedule.steps
        if camera.due(start, last=at_end) and (stopped or not at_end) and not camera.has(start):
            camera.take(training.model, start)
        training.model.train()
        for step, loaded in enumerate(bar, start):
            guard.begin()
            result = training.learn(step, loaded, compute, crop_generator(config, step, part.start))
            done = step + 1
            ends = done == config.schedule.steps
            if step % config.log_interval == 0 or ends:
                bar.set_postfix(loss=f"{training.log(step, result)['total']:.3f}")
            interval = config.eval_interval
            training.unvalidated = validates = ends or bool(interval) and done % interval == 0
            guard.end(done)
            if camera.due(done, last=ends):
                camera.take(training.model, done)
            if on_step:
                on_step(training.model, done)
            if validates:
                bar.set_description("validating")
                training.validate(step)
                bar.set_description("training")
            due = save_every and done % save_every == 0 or 0 < 60 * save_minutes < time.monotonic() - saved_at
            if validates or keeps(done) or due:
                training.save(done, keep=keeps(done))
                saved_at = time.monotonic()
        return training.finish()


class _Training:
    """A run in progress: what its checkpoints hold, and what changes it."""

    def __init__(
        self,
        config: TrainConfig,
        terms: Mapping[str, Term],
        data: TrainVal,
        run: Run,
        share: distributed.Share,
        device: torch.device,
        *,
        on_record: Callable[[dict], None] | None,
        progress: bool,
        skip_nonfinite: int,
        changed_data: bool,
    ):
        self.config, self.terms, self.data, self.run, self.share, self.device = config, terms, data, run, share, device
        self.on_record, self.progress = (on_record, progress) if share.first else (None, False)
        self.skip_nonfinite, self.changed_data = skip_nonfinite, changed_data
        self.model, self.optimizer = build_training(config, data.train.n_classes, device, fused=device.type != "mps")
        self.teacher = build_teacher(self.model, config)
        self.rival = build_rival(self.model, config)
        self.networks = [self.model] if self.rival is None else [self.model, self.rival]
        """Those that are trained."""
        for group in [] if self.rival is None else config_groups(self.rival, config):
            self.optimizer.add_param_group(group)
        if config.schedule.compile_blocks:
            for network in self.networks:
                network.compile_blocks()
        self.autocast = autocast_of(config, device)
        self.tracker = NoTracker()
        self.start, self.best, self.skipped = 0, -1.0, 0
        self.unvalidated = False
        """Whether the validation that belongs to the last step is still to come."""
        self.is_best = False
        """Whether the last validation is the best so far, and no checkpoint says so yet."""
        self.validation: Evaluation | None = None

    def begin(self, state: dict | None, kept: KeptTokens) -> None:
        """Go on from a checkpoint, or begin the run's folder and fit the classifiers; then open the tracker."""
        changes = [] if state is None else self._restore(state)
        if state is None or changes:
            refuse_broken(self.data, self.share, progress=self.progress)
        if state is None and self.share.first:
            self._begin_folder()
        elif changes and self.share.first:
            self._accept(changes)
        if self.share.first:
            self.run.keep_records_before(self.start, validated=not self.unvalidated)
        if self.config.schedule.warm_start_steps and not self.start:  # before the processes make the model one
            blocks = kept_blocks(self.config)
            options = {"autocast": self.autocast, "progress": self.progress}
            for number, network in enumerate(self.networks):
                with attention_of(network, self.config, self.device), kept.of(network, blocks=blocks):
                    seed = self.config.seed + number
                    warm_start(network, self.data.train, self.config, seed=seed, **options)
        if self.teacher is not None and not self.start:
            self.teacher.update_parameters(self.model)
        if self.share.first:
            self.tracker = open_tracker(self.config, self.run, self.start)

    def _restore(self, state: dict) -> list[str]:
        """Take over a checkpoint; what changed in the data since the run began."""
        load_model_state(self.model, state["model"], self.run, self.data)
        load_optimizer_state(self.optimizer, state["optimizer"], self.run)
        if self.teacher is not None:
            load_teacher(self.teacher, state, self.run, self.data)
        if self.rival is not None:
            load_rival(self.rival, state, self.run, self.data)
        self.start, self.unvalidated = state["step"], state.get("unvalidated") is True
        self.best, self.skipped = state.get("best", self.best), state.get("skipped", self.skipped)
        if not self.share.first:
            return self.share.from_first(None)
        return self.share.from_first(allowed_changes(self.run, self.config, self.data, changed_data=self.changed_data))

    def _accept(self, changes: list[str]) -> None:
        """Go on with data that changed: note it, and tell it."""
        if any(what.startswith("val") for what in changes) and not self.run.finished:
            self.best = -1.0  # no score of other data is the best on these
            self.save(self.start)
        self.run.note_changes(changes, self.data, self.start)
        if self.progress:
            told = f"{self.run.folder} goes on after step {self.start} with changed data: {', '.join(changes)}"
            tqdm.write(told, file=sys.stdout)

    def _begin_folder(self) -> None:
        data, weights = self.data, self.config.model.weights_file
        self.run.begin(
            self.config,
            **data_facts(data),
            weights_sha256=file_digest(weights) if weights else None,
            processes=self.share.n,
            device=str(self.device),
            precision=resolve_precision(self.config.precision, self.device),
            own_terms=own_terms(self.terms, self.config),
        )

    def batches(self, part: slice) -> Iterable[Batch]:
        """This process's part of every batch from the first step of this call on."""
        return config_batches(
            self.data,
            self.config,
            self.model,
            part=part,
            start_step=self.start,
            stop_step=self.config.schedule.steps,
            workers=self.config.data.workers,
            cache=self.config.data.cache,
            views_per_image=self.config.data.views_per_image,
            pin_memory=self.device.type == "cuda",
        )

    def learn(self, step: int, loaded: Batch, compute: Callable, generator: torch.Generator) -> Objective:
        """One step; its losses. Raises ToCoError where they are not finite and no step may be left out any more."""
        config, share, model = self.config, self.share, self.model
        set_rates(self.optimizer, config, step)
        batch = to_device(loaded, model, self.device)
        if config.release.average_before_teacher:
            self._average_heads()
        self.optimizer.zero_grad(set_to_none=True)
        options = {"terms": self.terms, "generator": generator, "autocast": self.autocast, "share": share}
        result = backward(compute, model, batch, config, step, **options, **self._beside())
        fault = not_finite({"loss": result.total, "gradient's length": gradient_length(*self.networks)}, share)
        if fault:  # it must not reach the weights, nor the next checkpoint
            self.skipped += 1
            if self.skipped > self.skip_nonfinite:
                beside, parts = self._beside(), share.gathered(loaded)
                raise failed_step(fault, self.run, model, beside, parts, result, config, step, share)
            if self.progress:
                tqdm.write(f"step {step} is left out: {fault}", file=sys.stdout)
        if not config.release.average_before_teacher:
            self._average_heads()
        if not fault:
            self.optimizer.step()
            if self.teacher is not None:
                self.teacher.update_parameters(model)
        return result

    def _average_heads(self) -> None:
        for network in self.networks:
            network.update_ema(self.config.schedule.momentum)

    def _beside(self) -> dict[str, ToCo]:
        """The networks beside the first one, by their names in checkpoints."""
        found = {"teacher": teacher_of(self.teacher), "rival": self.rival}
        return {name: network for name, network in found.items() if network is not None}

    def log(self, step: int, result: Objective) -> dict:
        """Note a step's losses and rates; the record."""
        record = {"step": step, **self.share.numbers({"total": result.total, **result.terms})} | self._left_out()
        self._note(record)
        self.tracker.log(step, {f"rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups})
        return record

    def _note(self, record: dict) -> None:
        if self.share.first:
            self.run.log(record)
            self.tracker.log(record["step"], tagged(record))
        if self.on_record:
            self.on_record(record)

    def _left_out(self) -> dict[str, int]:
        return {"skipped": self.skipped} if self.skipped else {}

    def _evaluation(self) -> Evaluation:
        bar_below = self.progress and sys.stdout.isatty()  # a second bar below the first needs a terminal
        options = {"progress": bar_below, "what": "validating", "share": self.share}
        return evaluate_as(self.config, self.model, self.data.val, **options)

    def validate(self, step: int) -> None:
        """Validate after a step and note the scores."""
        self.validation = self._evaluation()
        scores = _final_numbers(self.validation, self.config)
        self._note({"step": step} | scores)
        if self.config.log_to and self.share.first:
            for tag, picture in validation_pictures(self.model, self.data.val, self.config).items():
                self.tracker.picture(step, tag, picture)
        score, before = scores.get("cam_miou", scores["map"]), self.best
        self.best, self.unvalidated, self.is_best = max(before, score), False, score > before

    def save(self, done: int, *, keep: bool = False) -> None:
        """Write a checkpoint after so many steps, where this is the first process; `keep` as for `Run.save`."""
        if self.share.first:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"config": self.config.to_dict(), "step": done, "best": self.best, "skipped": self.skipped}
            state |= {name: network.state_dict() for name, network in self._beside().items()}
            self.run.save(state | ({"unvalidated": True} if self.unvalidated else {}), best=self.is_best, keep=keep)
        self.is_best = False

    def close(self) -> None:
        """Close the tracker."""
        self.tracker.close(whole=not self.unvalidated)

    def finish(self) -> Trained:
        """The model in evaluation mode, and the run marked as finished."""
        self.model.eval()
        if self.validation is None:  # a finished run was loaded
            self.validation = self._evaluation()
        if self.share.first:
            steps, protocol = self.config.schedule.steps, f"val: {self.validation.protocol}"
            numbers = _final_numbers(self.validation, self.config)
            self.run.finish(numbers | {"steps": steps, "protocol": protocol} | self._left_out())
        return Trained(self.model, self.run, self.data, self.validation)


def trained_run(
    config: TrainConfig, *, data: TrainVal | None = None, terms: Mapping[str, Term] = TERMS, **options
) -> Opened:
    """The run of a config: what notebooks that look into a model begin with. One that comes with the package is opened
    there, the same on every machine; another is trained first where it is not finished, `options` as for `train`.

    Raises ToCoError as `train` does, also for a finished run of other data or other weights.
    """
    data = data or open_data(config.data)
    own = variant(terms, config)
    run = (None if own else shipped_run(config)) or Run.of(config, own)
    if not run.finished:
        train(config, data=data, terms=terms, **options)
    refuse_other_run(run, config, data)
    return open_run(run.folder, data=data, device=config.device)._replace(config=config)


def _final_numbers(validation: Evaluation, config: TrainConfig) -> dict:
    """Scores in percent and the best threshold; without masks only the image-level ones."""
    best = {"best_beta": validation.cam.best_beta} if validation.n_masks else {}
    return validation.summary(config.labels.beta) | best
