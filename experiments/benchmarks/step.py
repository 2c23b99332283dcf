"""How much faster than a straightforward implementation are a training step, its pieces and the evaluation?

    python experiments/benchmarks/step.py                        # the table; about ten minutes on one thread
    python experiments/benchmarks/step.py --only crops PTC       # some rows

Both sides do the same work on the same pictures, in turn, in one process; a ratio is the median over the turns. The
baseline is our own slow implementation (baseline.py) in float32; a whole step in bf16 is held against the baseline in
bf16, too, by the same autocast. Before anything is timed both sides' results are compared, at full size. Of a whole
step it also counts the multiplications and additions of matrix products and convolutions, so that what is gained by
leaving work out can be told from what is gained by doing it faster, and how far the step is from the machine's own
limit, a large matrix product that takes its turn, too. Writes experiments/records/benchmarks_step.json, or
benchmarks_step_amx.json on a processor with matrix engines, which also name the machine.
"""

import argparse
import statistics

import baseline
import numpy as np
import torch
from measure import LATE, alternate, batch_of, config_of, machine, model_of, product, ratio, write_record
from torch.utils.flop_counter import FlopCounterMode

from toco_core import crops, labels, losses
from toco_core.config import override, tiny
from toco_core.evaluation.evaluate import CAMCounts, evaluate
from toco_core.evaluation.metrics import ConfusionMatrix
from toco_core.machine.device import keep_freed_memory
from toco_core.machine.precision import attention_of, autocast_of, has_matrix_engines, passes_of
from toco_core.model import build_model
from toco_core.objective import Step, objective, term_weights
from toco_core.train.kept_tokens import KeptTokens
from toco_core.train.optimizer import parameter_groups

CPU = torch.device("cpu")
SIZE, BATCH, K, VIEWS, LOCAL = 448, 2, 20, 8, 96
PRODUCT = 4096  # side of the matrices of that product: takes a second, as a shorter one catches the machine by chance
SLOW, SLOW_BF16, FAST = "baseline", "baseline in bf16", "toco_core"


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one: dict, other: dict) -> float:
    """Relative error of all gradients together: norm of the difference over norm."""
    squares = {name: ((one[name] - other[name]).square().sum(), one[name].square().sum()) for name in one}
    return (sum(s[0] for s in squares.values()) / sum(s[1] for s in squares.values())).sqrt().item()


def worst(wanted: dict, found: dict) -> float:
    """Largest relative error of a loss term. Of one below 0.01 the error itself, in hundredths: CTC without a negative
    crop is about 1e-5, and what the baseline makes of that is rounding."""
    errors = [((wanted[t] - found[t]) / wanted[t].abs().clamp(min=0.01)).detach().abs() for t in wanted]
    return torch.stack(errors).max().item()


def gflop_of(work) -> float:
    """Billions of multiplications and additions in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def whole_step(width: str, repeats: int, size: int = SIZE) -> dict:
    """Encoder, heads, CAMs, labels, losses, backward, moving average, optimiser."""
    configs = {
        p: config_of(width, precision=p, crop_size=size, local_size=LOCAL * size // SIZE) for p in ("fp32", "bf16")
    }
    config = configs["fp32"]
    model = model_of(config, K)
    batch, weights = batch_of(model, size, BATCH), term_weights(config, LATE)
    region = labels.region_mask(torch.rand(BATCH, K, size, size), batch.image_labels, beta_l=0.4, beta_h=0.6)
    boxes = crops.sample_crops(region, n_crops=VIEWS, crop_size=config.crops.local_size, valid_box=batch.valid_box)

    groups = parameter_groups(model, lr=1e-6, head_lr_scale=10, weight_decay=0.01)
    slow_optimizer = baseline.optimizer_of(groups, config.schedule.betas)
    fast_optimizer = torch.optim.AdamW(groups, betas=config.schedule.betas, fused=True)

    def slow(boxes=None, train=True, precision="fp32"):
        with model.plain_attention(), autocast_of(configs[precision], CPU)():
            found = baseline.step_losses(model, batch, config, weights, boxes)
        model.zero_grad(set_to_none=True)
        found.total.backward()
        if train:
            slow_optimizer.step()
            baseline.average_head(model, config.schedule.momentum)
        return found

    def fast(precision, boxes=None, train=True):
        config = configs[precision]
        autocast = autocast_of(config, CPU)
        with attention_of(model, config, CPU):
            step = Step(model, batch, config, LATE, boxes=boxes, autocast=autocast)
            found = objective(step)
            model.zero_grad(set_to_none=True)
            found.total.backward()
        if train:
            fast_optimizer.step()
            model.update_ema(config.schedule.momentum)
        return found, step

    wanted = slow((boxes.top, boxes.left), train=False)
    slow_gradients = gradients(model)
    agreement = {}
    for precision in configs:
        found, step = fast(precision, boxes, train=False)
        agreement[precision] = {
            "losses": worst(wanted.terms, found.terms),
            "gradients": difference(slow_gradients, gradients(model)),
            "labels": float((wanted.pseudo_label == step.pseudo_label).double().mean()),
            "flags": float((wanted.is_positive == step.is_positive).double().mean()),
        }
    sides = {
        SLOW: slow,
        SLOW_BF16: lambda: slow(precision="bf16"),
        "fp32": lambda: fast("fp32"),
        "bf16": lambda: fast("bf16"),
        "fp32 product": product(torch.float32, PRODUCT),
        "bf16 product": product(torch.bfloat16, PRODUCT),
    }
    seconds = alternate(sides, repeats)
    with model.plain_attention():  # the fused kernel is not counted
        gflop = {SLOW: gflop_of(lambda: slow(train=False)), "fp32": gflop_of(lambda: fast("fp32", train=False))}
    gflop |= {SLOW_BF16: gflop[SLOW], "bf16": gflop["fp32"]}
    return {"seconds": seconds, "agreement": agreement, "gflop": gflop}


def pieces(repeats: int) -> dict[str, dict]:
    """Name -> both sides of what a step calls besides the network, on what a ViT-Tiny says about a batch."""
    config = config_of("tiny")
    model = model_of(config, K)
    batch = batch_of(model, SIZE, BATCH)
    image_labels, boxes = batch.image_labels, batch.valid_box
    unit = model.denormalise(batch.images).clamp(0, 1)
    betas = config.labels.thresholds()
    with torch.no_grad():
        cam, aux_cam = baseline.multi_scale_cam(model, batch.images, (1.0,))
    own_aux_cam = aux_cam.contiguous()  # map by map in memory, as `cam.multi_scale_cam` makes it
    valid = labels.valid_cam(cam, image_labels)
    region = labels.region_mask(aux_cam, image_labels, **betas)
    patch_map = torch.randn(BATCH, model.width, SIZE // 16, SIZE // 16, requires_grad=True)
    token_label = torch.tensor([0, 0, 255, 4])[torch.randint(0, 4, (BATCH, 7, 7))].repeat_interleave(4, 1)
    token_label = token_label.repeat_interleave(4, 2)
    student = torch.nn.functional.normalize(torch.randn(BATCH, 2 + VIEWS, 1024), dim=-1).requires_grad_()
    teacher = torch.nn.functional.normalize(torch.randn(BATCH, 2, 1024), dim=-1)
    flags = torch.rand(BATCH, 2 + VIEWS) > 0.5
    flags[:, :2] = True
    truth = np.random.default_rng(0).integers(0, K + 1, (375, 500)).astype(np.uint8)
    truth[::9] = 255
    guess = np.random.default_rng(1).integers(0, K + 1, (375, 500)).astype(np.uint8)

    def slow_crops(drawn=None):
        region = baseline.region_of(aux_cam, image_labels, *betas.values())
        drawn = drawn or baseline.draw_boxes(region, boxes, VIEWS, LOCAL)
        return baseline.cut_and_flag(batch.local_image, region, *drawn, LOCAL, 0.2)

    def fast_crops(drawn=None):
        region = labels.region_mask(own_aux_cam, image_labels, **betas)
        drawn = drawn or crops.sample_crops(region, n_crops=VIEWS, crop_size=LOCAL, valid_box=boxes)
        return crops.cut_crops(batch.local_image, *drawn, LOCAL), crops.crop_flags(region, *drawn, LOCAL)

    def slow_ptc():
        loss = baseline.ptc_loss(patch_map, baseline.affinity_mask(token_label))
        return loss.detach(), *torch.autograd.grad(loss, patch_map)

    def fast_ptc():
        loss = losses.ptc_loss(patch_map, token_label)
        return loss.detach(), *torch.autograd.grad(loss, patch_map)

    def slow_ctc():
        loss = baseline.ctc_loss(student, teacher, flags, 0.5)
        return loss.detach(), *torch.autograd.grad(loss, student)

    def fast_ctc():
        loss = losses.ctc_loss(student, teacher, flags, temperature=0.5)
        return loss.detach(), *torch.autograd.grad(loss, student)

    def fast_confusion():
        matrix = ConfusionMatrix(K)
        matrix.update(truth, guess)
        return torch.from_numpy(matrix.counts)

    work = {
        "PAR": (
            lambda: baseline.pseudo_label(unit, valid, image_labels, boxes, **betas),
            lambda: labels.pseudo_label(unit, valid, image_labels, valid_box=boxes, **betas),
            4 * repeats,
        ),
        "regions, crops and flags": (slow_crops, fast_crops, 10 * repeats),
        "PTC": (slow_ptc, fast_ptc, 5 * repeats),
        "CTC": (slow_ctc, fast_ctc, 20 * repeats),
        "confusion matrix": (
            lambda: torch.from_numpy(baseline.confusion(truth, guess, K + 1)),
            fast_confusion,
            40 * repeats,
        ),
    }
    found = {}
    for name, (slow, fast, times) in work.items():
        drawn = baseline.draw_boxes(region, boxes, VIEWS, LOCAL)
        results = [side(drawn) if name == "regions, crops and flags" else side() for side in (slow, fast)]
        found[name] = {"agreement": agreement_of(*results), "seconds": alternate({SLOW: slow, FAST: fast}, times)}
    return found


def frozen_blocks(repeats: int, n: int = 8) -> dict:
    """What the frozen blocks of the embedded recipe say of a batch of new pictures: one by one, and as it comes."""
    config = override(tiny(), precision="bf16")
    model = build_model(config, K)
    model.freeze_blocks(config.schedule.frozen_blocks)
    side = config.data.crop_size
    pictures = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    passes, kept = passes_of(model, config), KeptTokens(gib=0)

    def tokens(parts):
        with passes(), kept.of(model, blocks=config.schedule.frozen_blocks):
            return torch.cat([kept.tokens(model, part)[0] for part in parts])

    sides = {SLOW: lambda: tokens(pictures.split(1)), FAST: lambda: tokens([pictures])}
    agreement = {"equal": float((sides[SLOW]() == sides[FAST]()).double().mean())}
    return {"agreement": agreement, "seconds": alternate(sides, 4 * repeats)}


def agreement_of(slow, fast) -> dict[str, float]:
    """Labels: the share that is equal. Numbers: the largest relative error."""
    slow, fast = (side if isinstance(side, tuple) else (side,) for side in (slow, fast))
    out = {}
    for one, other in zip(slow, fast, strict=True):
        if one.is_floating_point():
            error = ((one - other).norm() / one.norm()).item()
            out["error"] = np.maximum(out.get("error", 0.0), error).item()  # NaN stays NaN
        else:
            out["equal"] = min(out.get("equal", 1.0), float((one == other).double().mean()))
    return out


class Pictures:
    """A split in memory, of native size 375 x 500, as the loaders want it."""

    def __init__(self, n: int):
        rng = np.random.default_rng(0)
        self.names = [f"picture {i}" for i in range(n)]
        self.images = [rng.integers(0, 256, (375, 500, 3), np.uint8) for _ in range(n)]
        self.masks = [rng.integers(0, K + 1, (375, 500)).astype(np.uint8) for _ in range(n)]
        self.image_labels = np.zeros((n, K), np.float32)
        self.image_labels[np.arange(n), rng.integers(0, K, n)] = 1

    def __len__(self):
        return len(self.names)

    def image(self, index):
        return self.images[index]

    def mask(self, index):
        return self.masks[index]


def evaluation(repeats: int, n: int = 2) -> dict:
    """CAM, auxiliary CAM and segmentation of `n` images at 448 square, scored at native size and all 21 thresholds."""
    from toco_core.data import evaluation_items, to_unit

    source = Pictures(n)
    configs = {p: config_of("tiny", precision=p) for p in ("fp32", "bf16")}
    model = model_of(configs["fp32"], K).eval()
    scales = configs["fp32"].labels.cam_scales

    def slow(betas=CAMCounts.betas):
        items = (
            (model.normalise(to_unit(i.image)), i.image_labels, i.mask) for i in evaluation_items(source, size=SIZE)
        )
        with model.plain_attention():
            return baseline.evaluate(model, items, scales, betas)

    def fast(precision):
        with attention_of(model, configs[precision], CPU):
            autocast = autocast_of(configs[precision], CPU)
            return evaluate(model, source, size=SIZE, scales=scales, autocast=autocast, progress=False)

    wanted, found = slow()[0], fast("fp32").cam
    agreement = [1 - np.abs(wanted[i] - confusion_at(found, i)).sum() / 2 / wanted[i].sum() for i in range(len(wanted))]
    one = int(round(0.5 * (len(CAMCounts.betas) - 1)))
    sides = {
        SLOW: slow,
        "baseline, one threshold": lambda: slow(CAMCounts.betas[one : one + 1]),
        "fp32": lambda: fast("fp32"),
        "bf16": lambda: fast("bf16"),
    }
    seconds = {name: [s / n for s in values] for name, values in alternate(sides, repeats).items()}
    return {"seconds": seconds, "agreement": {"equal": float(min(agreement))}}


def confusion_at(counts: CAMCounts, i: int) -> np.ndarray:
    """The confusion matrix at threshold number `i`."""
    matrix = counts.counts[i + 1 :].sum(0)
    matrix[:, 0] += counts.counts[: i + 1].sum((0, 2))
    return matrix


def row(name: str, target: float | None, result: dict, slow: str, fast: str) -> dict:
    seconds = result["seconds"]
    work = {}
    if "gflop" in result:
        gflop = result["gflop"]
        reached = 2e-9 * PRODUCT**3 / statistics.median(seconds[f"{fast} product"])
        work = {
            "baseline_gflop": round(gflop[slow]),
            "toco_core_gflop": round(gflop[fast]),
            "gflops_of_a_product": round(reached),
            "share_of_that": round(gflop[fast] / statistics.median(seconds[fast]) / reached, 2),
        }
    return {
        "name": name,
        "target": target,
        "ratio": round(ratio(seconds, slow, fast), 2),
        "baseline_ms": round(1000 * statistics.median(seconds[slow]), 3),
        "toco_core_ms": round(1000 * statistics.median(seconds[fast]), 3),
        "turns": len(seconds[slow]),
        "agreement": result["agreement"].get(fast, result["agreement"]),
        **work,
    }


def rows(repeats: int, wanted: list[str]):
    """Every row of the table, as it is measured."""

    def asked(*names):
        return not wanted or any(word.lower() in name.lower() for name in names for word in wanted)

    steps = {f"whole step, ViT-{width.capitalize()}": width for width in ("tiny", "small")}
    for name, width in steps.items():
        if asked(name):
            result = whole_step(width, repeats)
            yield row(f"{name}, float32", 2.2, result, SLOW, "fp32")
            yield row(f"{name}, bf16", 4.5, result, SLOW, "bf16")
            yield row(f"{name}, bf16 against the baseline in bf16", 3.2, result, SLOW_BF16, "bf16")
    targets = {"PAR": 14, "regions, crops and flags": 3, "PTC": 1.5, "CTC": 2.5, "confusion matrix": 2}
    if asked(*targets):
        for name, result in pieces(repeats).items():
            if asked(name):
                yield row(name, targets[name], result, SLOW, FAST)
    if asked("frozen blocks"):
        yield row("frozen blocks of 8 pictures, against one by one, bf16", 1.5, frozen_blocks(repeats), SLOW, FAST)
    if asked("evaluation"):
        result = evaluation(repeats)
        yield row("evaluation, 21 thresholds, float32", None, result, SLOW, "fp32")
        yield row("evaluation, 21 thresholds, bf16", 3, result, SLOW, "bf16")
        yield row("evaluation, baseline at one threshold, float32", None, result, "baseline, one threshold", "fp32")
        yield row("evaluation, baseline at one threshold, bf16", None, result, "baseline, one threshold", "bf16")


def line(r: dict) -> str:
    target = "" if r["target"] is None else f"{r['target']:g}x"
    agreement = ", ".join(f"{k} {v:.2g}" if v < 0.5 else f"{k} {100 * v:.2f} %" for k, v in r["agreement"].items())
    ms = f"{r['baseline_ms']:.4g} | {r['toco_core_ms']:.4g}"
    work = ""
    if "share_of_that" in r:
        work = f"{r['baseline_gflop']} / {r['toco_core_gflop']}, {100 * r['share_of_that']:.0f} % of a product's speed"
    return f"| {r['name']} | {ms} | {r['ratio']:.2f}x | {target} | {agreement} | {work} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of a whole step; short pieces take more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="words of the rows that are wanted; writes no record")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    here = machine()
    print(" ".join(f"{key}={value}" for key, value in here.items()))
    print("| piece | baseline ms | toco_core ms | ratio | target | agreement | GFLOP of both |")
    print("|---|---|---|---|---|---|---|", flush=True)
    found = []
    for r in rows(args.repeats, args.only):
        found.append(r)
        print(line(r), flush=True)
    if not args.only:
        name = "benchmarks_step_amx.json" if has_matrix_engines() else "benchmarks_step.json"
        print("written:", write_record(name, {"machine": here, "rows": found}).name)


if __name__ == "__main__":
    main()
