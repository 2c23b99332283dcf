"""The model and the optimizer that a config trains, and the rates of a step."""

import torch

from toco_core.config import TrainConfig, lr_at
from toco_core.config.fields import LARGEST
from toco_core.errors import ToCoError
from toco_core.model import ToCo, build_model
from toco_core.runs.folder import Run


def build_training(
    config: TrainConfig, n_classes: int, device: torch.device, *, fused: bool | None = None
) -> tuple[ToCo, torch.optim.AdamW]:
    """Build the model of a config on a device, its first blocks frozen, and AdamW over the rest in groups with rates of
    their own. Seeds torch with the config's seed first.

    fused: AdamW's kernel; None: torch's own choice.
    """
    torch.manual_seed(config.seed)
    model, schedule = build_model(config, n_classes).to(device), config.schedule
    model.freeze_blocks(schedule.frozen_blocks)
    return model, torch.optim.AdamW(config_groups(model, config), betas=schedule.betas, fused=fused)


def config_groups(model: ToCo, config: TrainConfig) -> list[dict]:
    """`parameter_groups` with the rates and the decay of a config."""
    schedule = config.schedule
    return parameter_groups(
        model,
        lr=schedule.lr,
        head_lr_scale=schedule.head_lr_scale,
        classifier_lr_scale=schedule.classifier_lr_scale,
        weight_decay=schedule.weight_decay,
        decay_all=config.release.decay_all,
    )


def parameter_groups(
    model: ToCo,
    *,
    lr: float,
    head_lr_scale: float,
    weight_decay: float,
    decay_all: bool = True,
    classifier_lr_scale: float | None = None,
) -> list[dict]:
    """Groups for an optimiser, each with `name` ('encoder' or 'heads'), `params`, `lr`, `base_lr` and
    `weight_decay`.

    `classifier_lr_scale`: the two classifiers are a group 'classifiers' with this many times the encoder's rate.
    None: they belong to 'heads'.
    `decay_all`: every trained parameter decays, as in the release. Otherwise vectors (biases, norms, scales) and
    the prefix tokens do not, and form groups of their own.
    """
    groups: dict = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = "encoder" if full_name.startswith("encoder.") else "heads"
        if classifier_lr_scale is not None and full_name.startswith(("classifier.", "aux_classifier.")):
            name = "classifiers"
        decays = decay_all or (parameter.ndim > 1 and not full_name.endswith(("_token", "pos_embed")))
        groups.setdefault((name, decays), []).append(parameter)
    rate = {"encoder": lr, "heads": lr * head_lr_scale, "classifiers": lr * (classifier_lr_scale or head_lr_scale)}
    return [
        {
            "name": name,
            "params": params,
            "lr": rate[name],
            "base_lr": rate[name],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (name, decays), params in sorted(groups.items(), key=lambda item: list(rate).index(item[0][0]))
    ]


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, *, steps: int | None = None) -> None:
    """Set the learning rate of every group for a step, counted from 0, of `steps` (by default the schedule's)."""
    schedule = config.schedule
    steps = steps or schedule.steps
    for group in optimizer.param_groups:
        group["lr"] = lr_at(
            step,
            base_lr=group["base_lr"],
            steps=steps,
            warmup_steps=min(schedule.warmup_steps, steps),
            warmup_ratio=schedule.warmup_ratio,
            power=schedule.power,
            rate_jump=config.release.rate_jump,
        )


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: dict, run: Run) -> None:
    """Load AdamW's averages from a checkpoint. Raises ToCoError that says what differs."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    try:
        for number, values in found["state"].items():
            if any(values[name].shape != shapes[number] for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError(f"the averages of parameter {number} have another shape")
            if set(values) != {"step", "exp_avg", "exp_avg_sq"} or values["step"].numel() != 1:
                raise ValueError(f"parameter {number} has other values than step, exp_avg and exp_avg_sq")
            if not all(value.is_floating_point() for value in values.values()):
                raise ValueError(f"the values of parameter {number} are no floating-point numbers")
            if not 0 <= float(values["step"]) <= LARGEST:  # AdamW takes powers of it
                raise ValueError(f"parameter {number} has been through {float(values['step']):g} steps")
        own = optimizer.state_dict()["param_groups"]  # rates and moments are the config's, not the file's
        optimizer.load_state_dict({"state": found["state"], "param_groups": own})
    except Exception as error:  # noqa: BLE001  what a foreign file holds may fail anywhere
        raise ToCoError(f"{run.folder}: the checkpoint's optimizer does not fit: {error}") from error
