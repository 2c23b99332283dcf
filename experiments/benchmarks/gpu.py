"""How fast is a training step on a GPU: images a second, memory, share of the card's peak, and does it wait?

    python experiments/benchmarks/gpu.py                     # ViT-B, crop 448, batch 4 and 16
    python experiments/benchmarks/gpu.py --compile           # also with compiled blocks

A late step, so that every term counts, from uint8 images in pinned memory to the optimiser's step, in bf16 with fused
attention. The share of the peak counts the multiplications of this step (nothing is done twice) and divides by a large
bf16 matrix product that is timed here, and by the maker's figure where the card is known. For comparison: the published
run took 0.584 s for a step of 4 images on two A100. Aim on one H100: 40 images a second.

Where the host waits for the device is found with `torch.cuda.set_sync_debug_mode`: each place, and how often in a step.
Without a GPU nothing is measured and no record is written. Writes experiments/records/benchmarks_gpu.json.
"""

import argparse
import collections
import statistics
import sys
import time
import warnings

import torch
from measure import LATE, batch_of, config_of, machine, model_of, write_record
from torch.utils.flop_counter import FlopCounterMode

from toco_core.data import Batch
from toco_core.objective import Step, objective
from toco_core.train.loop import attention_of, autocast_of, gradient_length, not_finite, to_device

K = 20
MAKERS_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense, SXM


class Training:
    """Model, optimiser and a batch on the host; `step` does what the training loop does between two batches."""

    def __init__(self, width: str, batch_size: int, device: torch.device, *, size: int = 448, compiled: bool = False):
        self.device = device
        self.config = config_of(width, precision="bf16", crop_size=size, local_size=96 * size // 448)
        self.model = model_of(self.config, K)
        like = batch_of(self.model, size, batch_size)
        views = [(255 * self.model.denormalise(view)).round().to(torch.uint8) for view in like[:3]]
        host = [*views, like.image_labels, like.valid_box]
        if device.type == "cuda":
            host = [tensor.pin_memory() for tensor in host]
        self.loaded = Batch(tuple(str(b) for b in range(batch_size)), *host)
        self.model.to(device)
        if compiled:
            for block in self.model.encoder.blocks:
                block.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.numbers = 0

    def losses(self):
        generator = torch.Generator().manual_seed(self.numbers)
        batch, autocast = to_device(self.loaded, self.model, self.device), autocast_of(self.config, self.device)
        step = Step(self.model, batch, self.config, LATE, generator=generator, autocast=autocast)
        return objective(step)

    def step(self) -> None:
        self.numbers += 1
        self.model.update_ema(self.config.schedule.momentum)
        with attention_of(self.model, self.config, self.device):
            total = self.losses().total
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
        if not not_finite({"loss": total, "gradient's length": gradient_length(self.model)}):
            self.optimizer.step()

    def flops(self) -> int:
        """Multiplications and additions of a step's matrix products, convolutions and attention."""
        with FlopCounterMode(display=False) as counter, self.model.plain_attention():
            self.losses().total.backward()
        return counter.get_total_flops()


def seconds_per_step(training: Training, steps: int) -> list[float]:
    for _ in range(3):
        training.step()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        training.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


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


def kernels_of(training: Training, top: int = 12) -> list[dict]:
    """The kernels that take most of the device's time in three steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            training.step()
        torch.cuda.synchronize()
    # an operator's row repeats the time of the kernels that it launched, and so does an annotation's
    on_device = (e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    events = sorted((e for e in on_device if not e.is_user_annotation), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) or 1
    return [{"name": e.key[:80], "share": round(e.self_device_time_total / total, 3)} for e in events[:top]]


def peak_flops(size: int = 8192) -> float:
    """What the card reaches in one large bf16 product."""
    one = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        one @ one
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        one @ one
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def measured(width: str, batch_size: int, steps: int, compiled: bool, reachable: float) -> dict:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    training = Training(width, batch_size, torch.device("cuda"), compiled=compiled)
    training.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    seconds = statistics.median(seconds_per_step(training, steps))
    memory = torch.cuda.max_memory_allocated() / 2**30
    waits = waits_of(training)
    kernels = kernels_of(training)
    flops = Training(width, batch_size, torch.device("cuda")).flops() if compiled else training.flops()
    maker = next((peak for card, peak in MAKERS_BF16.items() if card in torch.cuda.get_device_name()), None)
    return {
        "width": width,
        "batch": batch_size,
        "compiled": compiled,
        "ms_per_step": round(1000 * seconds, 1),
        "images_per_second": round(batch_size / seconds, 1),
        "peak_gib": round(memory, 2),
        "tflop_per_step": round(flops / 1e12, 2),
        "share_of_reachable": round(flops / seconds / reachable, 3),
        "share_of_makers_peak": None if maker is None else round(flops / seconds / maker, 3),
        "seconds_to_first_step": round(first, 1),
        "waits": waits,
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here (torch.cuda.is_available() is False): nothing was measured, no record was written")
    reachable = peak_flops()
    record = {"machine": machine() | {"gpu": torch.cuda.get_device_name(), "bf16_tflops": round(reachable / 1e12)}}
    print(record["machine"])
    record["points"] = []
    for compiled in (False, True) if args.compile else (False,):
        for batch_size in args.batches:
            point = measured(args.width, batch_size, args.steps, compiled, reachable)
            record["points"].append(point)
            print({key: value for key, value in point.items() if key not in ("waits", "kernels")}, flush=True)
            print("  waits:", point["waits"])
            for kernel in point["kernels"]:
                print(f"  {100 * kernel['share']:5.1f} %  {kernel['name']}")
    print("written:", write_record("benchmarks_gpu.json", record).name)


if __name__ == "__main__":
    main()
