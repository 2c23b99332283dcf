"""The second half of the backbone's pretraining: mosaics, so that a patch token answers for its own surroundings.

    python experiments/pretrain_backbone.py --minutes 16
    python experiments/pretrain_mosaics.py --minutes 14

Question: after the first half, which reads the mean of the patch tokens, every token of a picture says the same: a CAM
of it is bright everywhere. Does classification of mosaics repair that? Four pictures of one animal each share a canvas
of 128 x 128; the crossing lies at random. Each cell's tokens, pooled by the maximum as ToCo pools, tell the species
and coat of that cell's animal, after the last block and, with a head of its own, after one block of the second half
drawn anew in every step; the class token tells which species are on the canvas. No mask is read.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pretrain_backbone import (
    STREAM,
    TARGETS,
    WIDTH,
    augment,
    descend,
    of_depth,
    optimizers_for,
    pictures,
    save,
    set_rate,
)
from torch import nn
from tqdm import tqdm

from toco_core.backbone import load_weights

CANVAS, PATCH, SIDE = 128, 8, 72
BLOCKS = range(6, 13)


def mosaics(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """4n pictures, uint8 4n 3 72 72, to canvases n 3 128 128 in [-1, 1] and the cell 0..3 of each token, 16 x 16."""
    row, column = (PATCH * int(torch.randint(7, 10, (1,), generator=generator)) for _ in range(2))
    x = augment(images, generator, crop=SIDE).unflatten(0, (-1, 4))
    canvas = x.new_empty(len(x), 3, CANVAS, CANVAS)
    cell = torch.empty(CANVAS // PATCH, CANVAS // PATCH, dtype=torch.long)
    for i, (top, bottom) in enumerate(((0, row), (row, CANVAS))):
        for j, (left, right) in enumerate(((0, column), (column, CANVAS))):
            h, w = bottom - top, right - left
            y0, x0 = (SIDE - h) // 2, (SIDE - w) // 2
            canvas[:, :, top:bottom, left:right] = x[:, 2 * i + j, :, y0 : y0 + h, x0 : x0 + w]
            cell[top // PATCH : bottom // PATCH, left // PATCH : right // PATCH] = 2 * i + j
    return canvas, cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--canvases", type=int, default=16, help="per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=Path("toco_core/weights/scenes_vit_nano.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("toco_core/weights/scenes_vit_nano.safetensors"))
    parser.add_argument("--record", type=Path, default=Path("experiments/records/pretrain_mosaics.json"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = pictures(args.pictures, args.workers)
    held_out = 1000
    encoder = of_depth(12)
    load_weights(encoder, args.weights)
    encoder.train()
    heads = nn.ModuleDict({f"{name}{block}": nn.Linear(WIDTH, n) for name, n in TARGETS.items() for block in BLOCKS})
    heads["present"] = nn.Linear(WIDTH, TARGETS["species"])
    optimizers = optimizers_for(encoder, heads, args)

    def logits(pick: torch.Tensor, random: torch.Generator) -> dict[str, torch.Tensor]:
        """Of the last block, of one block before it ("early_..."), and of the class token ("present")."""
        canvas, cell = mosaics(images[pick], random)
        block = int(torch.randint(BLOCKS[0], BLOCKS[-1], (1,), generator=random))
        with torch.autocast("cpu", torch.bfloat16):
            last, (early,) = encoder.forward_intermediates(canvas, indices=[block - 1], output_fmt="NLC")
        where, found = cell.flatten(), {"present": heads["present"](last[:, 0].float())}
        for prefix, number, patches in (("", BLOCKS[-1], last[:, 1:]), ("early_", block, early)):
            pooled = torch.stack([patches[:, where == k].amax(1) for k in range(4)], dim=1).flatten(0, 1).float()
            found |= {prefix + name: heads[f"{name}{number}"](pooled) for name in TARGETS}
        return found

    def accuracy() -> dict[str, float]:
        encoder.eval()
        with torch.no_grad():
            random = torch.Generator().manual_seed(0)
            found = [logits(torch.arange(i, i + 40), random) for i in range(0, 400, 40)]
        encoder.train()
        return {
            name: round(float((torch.cat([f[name] for f in found]).argmax(1) == labels[:400, i]).float().mean()), 3)
            for i, name in enumerate(TARGETS)
        }

    start, step, curve = time.monotonic(), 0, []
    bar = tqdm(total=round(args.minutes * 60), unit="s")
    while (spent := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1.0, spent / 0.03) * (0.5 * (1 + math.cos(math.pi * spent)) + 0.005)
        set_rate(optimizers, rate)
        pick = torch.randint(held_out, len(images), (4 * args.canvases,), generator=generator)
        found = logits(pick, generator)
        species, coat = labels[pick].unbind(1)
        present = F.one_hot(species, TARGETS["species"]).unflatten(0, (-1, 4)).amax(1).float()
        loss = (
            F.cross_entropy(found["species"], species, label_smoothing=0.1)
            + F.cross_entropy(found["early_species"], species, label_smoothing=0.1)
            + 0.5 * F.cross_entropy(found["coat"], coat, label_smoothing=0.1)
            + 0.5 * F.cross_entropy(found["early_coat"], coat, label_smoothing=0.1)
            + F.binary_cross_entropy_with_logits(found["present"], present)
        )
        descend(loss, encoder, heads, optimizers)
        step += 1
        if step % 20 == 0:
            bar.n = round(spent * args.minutes * 60)
            bar.set_postfix(step=step, loss=f"{loss.item():.3f}")
        if step % args.check == 0:
            curve.append({"step": step, "loss": round(loss.item(), 4), **accuracy()})
            tqdm.write(str(curve[-1]))
            save(encoder, args.out)
    save(encoder, args.out)
    record = {
        "question": "species and coat of each of four animals of a mosaic, from the maximum over its cell's tokens",
        "held_out_accuracy": accuracy(),
        "steps": step,
        "canvases": args.canvases,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "minutes": args.minutes,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "picture_stream": STREAM,
        "torch": torch.__version__,
        "curve": curve,
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['held_out_accuracy']} on 400 held-out pictures after {step} steps; wrote {args.out}")


if __name__ == "__main__":
    main()
