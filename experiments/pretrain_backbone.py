"""How the shipped backbone came about: classification of single animals, from nothing, on this machine.

    python experiments/pretrain_backbone.py --minutes 20

Question: can a ViT of 12 blocks and 2.4 million weights learn the species and the coat of one animal per picture from
its class token, as ImageNet models learn their classes, in minutes on two cores? The pictures are drawn by the
generator of the embedded data set, with seeds that the data set itself never uses; no mask is read. Writes the encoder
(fp16, safetensors) and a record.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from toco_core.backbone import build_encoder
from toco_core.config import ModelConfig
from toco_core.data.scenes import CLASS_NAMES, COATS, cache_folder, draw_scene

SIDE, CROP, WIDTH = 72, 64, 128
TARGETS = {"species": len(CLASS_NAMES) - 1, "coat": len(COATS)}
DEPTHS, GROW_AT = (3, 6, 12), (0.3, 0.5)
"""Blocks of the three stages, and the fractions of the training time at which the encoder grows."""
STREAM = 77_000_000
"""First element of the pretraining seeds; the data set's own begin with its version."""


def draw(chunk: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `first <= i < last`: uint8 n 72 72 3, and their species and coat, n 2."""
    cv2.setNumThreads(1)
    images, labels = [], []
    for i in range(*chunk):
        rng = np.random.default_rng([STREAM, 1, i])
        species = int(rng.integers(1, len(CLASS_NAMES)))
        scene = draw_scene(rng, SIDE, SIDE, n_animals=1, label=species, body=(0.18, 0.4), usual_coat=0.0)
        images.append(scene.image)
        labels.append((species - 1, scene.coats[0]))
    return np.stack(images), np.array(labels)


def pictures(n: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` pictures as uint8 n 3 72 72 and labels n 2, drawn once and kept in the cache folder."""
    file = cache_folder() / f"pretraining-v1-{n}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        step = 250
        chunks = [(i, min(i + step, n)) for i in range(0, n, step)]
        with ProcessPoolExecutor(workers) as pool:
            parts = list(tqdm(pool.map(draw, chunks), total=len(chunks), desc="drawing"))
        np.savez(file, images=np.concatenate([p[0] for p in parts]), labels=np.concatenate([p[1] for p in parts]))
    with np.load(file) as stored:
        return torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(stored["labels"])


def augment(images: torch.Tensor, generator: torch.Generator, *, crop: int = CROP) -> torch.Tensor:
    """Random crop, flip, brightness, contrast and colour balance: uint8 n 3 72 72 to float n 3 crop crop in [-1, 1]."""
    n = len(images)
    top, left = (int(v) for v in torch.randint(0, SIDE - crop + 1, (2,), generator=generator))
    x = images[:, :, top : top + crop, left : left + crop].float() / 255
    x = torch.where((torch.rand(n, generator=generator) < 0.5)[:, None, None, None], x.flip(-1), x)
    gain = 1 + 0.25 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    contrast = 1 + 0.4 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (((x - mean) * contrast + mean) * gain).clamp(0, 1) * 2 - 1


def of_depth(depth: int) -> nn.Module:
    """The shipped backbone's encoder, from nothing, with its first `depth` blocks."""
    encoder = build_encoder(ModelConfig(backbone="scenes_vit_nano", pretrained=False))
    encoder.blocks = encoder.blocks[:depth]
    for block in encoder.blocks:
        block.attn.fused_attn = False  # twice as fast in bf16 on the CPU that this was run on
    return encoder.train()


def deeper(encoder: nn.Module, depth: int) -> nn.Module:
    """An encoder of more blocks that computes nearly the same: each block is followed by copies of itself, every copy's
    contribution to the residual stream divided by their number (Gong et al. 2019, "progressively stacking")."""
    grown, times = of_depth(depth), depth // len(encoder.blocks)
    grown.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("blocks.")}, strict=False)
    with torch.no_grad():
        for i, block in enumerate(grown.blocks):
            block.load_state_dict(encoder.blocks[i // times].state_dict())
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight /= times
                last.bias /= times
    return grown


def optimizers_for(encoder: nn.Module, heads: nn.Module, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in encoder.blocks.parameters() if p.ndim == 2]
    others = [p for p in (*encoder.parameters(), *heads.parameters()) if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """The learning rate of every parameter."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate


def descend(loss: torch.Tensor, encoder: nn.Module, heads: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step, the gradient cut to length 1."""
    loss.backward()
    nn.utils.clip_grad_norm_([*encoder.parameters(), *heads.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="length of the training, on whatever this machine is")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--check", type=int, default=500, help="steps between looks at the held-out pictures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("toco_core/weights/scenes_vit_nano.safetensors"))
    parser.add_argument("--record", type=Path, default=Path("experiments/records/pretrain_backbone.json"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = pictures(args.pictures, args.workers)
    held_out = 1000
    heads = nn.ModuleDict(
        {f"{name}_{pool}": nn.Linear(WIDTH, n) for name, n in TARGETS.items() for pool in ("token", "mean")}
    )
    encoder = of_depth(DEPTHS[0])
    optimizers = optimizers_for(encoder, heads, args)

    def logits(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encoder.forward_features(x).float()
        pooled = {"token": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
        return {name: head(pooled[name.rsplit("_", 1)[1]]) for name, head in heads.items()}

    def accuracy() -> dict[str, float]:
        encoder.eval()
        with torch.no_grad():
            found = logits(images[:held_out, :, 4 : 4 + CROP, 4 : 4 + CROP].float() / 127.5 - 1)
        encoder.train()
        return {
            name: round(float((found[f"{name}_token"].argmax(1) == labels[:held_out, i]).float().mean()), 3)
            for i, name in enumerate(TARGETS)
        }

    start, step, grown, curve = time.monotonic(), 0, 0, []
    bar = tqdm(total=round(args.minutes * 60), unit="s")
    encoder.train()
    while (spent := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        if grown < len(GROW_AT) and spent >= GROW_AT[grown]:
            grown += 1
            encoder = deeper(encoder, DEPTHS[grown])
            optimizers = optimizers_for(encoder, heads, args)
            tqdm.write(f"step {step}: {DEPTHS[grown]} blocks")
        rate = args.lr * min(1.0, spent / 0.02) * (0.5 * (1 + math.cos(math.pi * spent)) + 0.005)
        set_rate(optimizers, rate)
        pick = torch.randint(held_out, len(images), (args.batch,), generator=generator)
        found = logits(augment(images[pick], generator))
        loss = sum(
            weight * F.cross_entropy(found[f"{name}_{pool}"], labels[pick, i], label_smoothing=0.1)
            for i, (name, weight) in enumerate(zip(TARGETS, (1.0, 0.5), strict=True))
            for pool in ("token", "mean")
        )
        descend(loss, encoder, heads, optimizers)
        step += 1
        if step % 100 == 0:
            bar.n = round(spent * args.minutes * 60)
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
        if step % args.check == 0:
            curve.append({"step": step, "loss": round(loss.item(), 4), **accuracy()})
            tqdm.write(str(curve[-1]))
    save(encoder, args.out)
    record = {
        "question": "species and coat of one animal from the class token",
        "held_out_accuracy": accuracy(),
        "steps": step,
        "depths": DEPTHS,
        "grown_at": GROW_AT,
        "pictures": args.pictures,
        "batch": args.batch,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "minutes": args.minutes,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "torch": torch.__version__,
        "curve": curve,
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['held_out_accuracy']} on {held_out} held-out pictures after {step} steps; wrote {args.out}")


def save(encoder: nn.Module, path: Path) -> None:
    """The encoder in fp16, replaced at once."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.detach().half().contiguous() for k, v in encoder.state_dict().items()}, str(part))
    part.replace(path)


if __name__ == "__main__":
    main()
