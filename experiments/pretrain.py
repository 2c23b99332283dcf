"""How the shipped backbone came about: image-level labels of single animals, mosaics and scenes, from nothing.

    python experiments/pretrain.py     # about an hour on one core; the same call resumes

Question: can a vision transformer of 12 blocks and 2.4 million weights be for the embedded world what an ImageNet
backbone is for PASCAL VOC, with image-level supervision only? As ImageNet has more classes than VOC, the backbone sees
24 species, of which the data set has 8, on pictures that the data set never uses. No mask is read anywhere.

1. `single`   one animal (or none) per picture: species, coat and colours from the class token and from the maximum over
              the patch tokens. The encoder grows from 3 to 6 to 12 blocks (Gong et al. 2019, "progressively stacking").
2. `mosaic`   four such pictures share a canvas of 128 x 128, the crossing at random: the same targets from the maximum
              over the tokens of each picture, after the last block and after one earlier block drawn anew in each step;
              every fourth step shows scenes instead, whose tags come from the maximum over all tokens. So a token
              answers for its surroundings.
3. `middle`   the same, but the last of the blocks that are read so is the tenth. After the twelfth only the tags of the
              whole canvas are asked for, from the class token and from the mean of the tokens, as ImageNet's
              classification does: its tokens become alike, as those of backbones that are pretrained on ImageNet are.

Writes the encoder (fp16, safetensors) and a record with its curves.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from toco_core.backbone import build_encoder
from toco_core.config import ModelConfig
from toco_core.data.scenes import cache_folder, draw_scene
from toco_core.data.world.species import COATS, SPECIES

SIDE, CROP, CANVAS, PATCH, WIDTH = 80, 72, 128, 8, 128
NONE = len(SPECIES)
TARGETS = {"species": len(SPECIES) + 1, "coat": len(COATS), "colours": len(SPECIES)}
WEIGHTS = {"species": 1.0, "coat": 0.4, "colours": 0.3}
STAGES = (("single", 3), ("single", 6), ("single", 12), ("mosaic", 12), ("middle", 12))
"""Kind and number of blocks."""
RATES = ((1.0, 0.02, 0.3), (0.9, 0.02, 0.3), (0.7, 0.01, 1.0), (0.6, 0.3, 1.0), (0.3, 0.0, 1.0))
"""Of each stage, as `Stage` takes them."""
BLOCKS = {"mosaic": range(6, 13), "middle": range(6, 11)}
"""The blocks after which mosaics are read: the last of them always, and one of the others in each step."""
STREAM = 77_000_001
"""First element of the pretraining seeds; the data set's own begin with its version."""
EMPTY = 0.2
"""Share of pictures without an animal."""


# ---- pictures


def draw_singles(chunk: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `first <= i < last`: uint8 n 80 80 3, and their species, coat and colours, n 3 (-100: no animal)."""
    cv2.setNumThreads(1)
    images, labels = [], []
    for i in range(*chunk):
        rng = np.random.default_rng([STREAM, 1, i])
        empty = rng.random() < EMPTY
        scene = draw_scene(
            rng, SIDE, SIDE, n_species=1, n_animals=0 if empty else 1, among=range(len(SPECIES)), body=(0.22, 0.38),
            usual=0.6, loyalty=2.0,
        )  # fmt: skip
        images.append(scene.image)
        labels.append((NONE, -100, -100) if empty else scene.animals[0])
    return np.stack(images), np.array(labels)


def draw_scenes(chunk: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scenes `first <= i < last`: uint8 n 128 128 3, and which species they show, n 24."""
    cv2.setNumThreads(1)
    images, labels = [], []
    for i in range(*chunk):
        rng = np.random.default_rng([STREAM, 2, i])
        scene = draw_scene(rng, CANVAS, CANVAS, among=range(len(SPECIES)), body=(0.14, 0.26), loyalty=2.0)
        images.append(scene.image)
        labels.append(np.isin(np.arange(len(SPECIES)), [animal.species for animal in scene.animals]))
    return np.stack(images), np.array(labels)


def pool_of(draw, kind: str, n: int, workers: int) -> tuple[Tensor, Tensor]:
    """`n` pictures, uint8 n 3 h w, and their labels; drawn once and kept in the cache folder."""
    file = cache_folder() / f"pretraining-v3-{kind}-{n}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        chunks = [(i, min(i + 200, n)) for i in range(0, n, 200)]
        with ProcessPoolExecutor(workers) as pool:
            parts = list(tqdm(pool.map(draw, chunks), total=len(chunks), desc=f"drawing {kind}"))
        images, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        np.savez(file.with_suffix(".part.npz"), images=images, labels=labels)
        file.with_suffix(".part.npz").replace(file)
    with np.load(file) as stored:
        return torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(stored["labels"])


def varied(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Random crop, flip, brightness, contrast and colour balance: uint8 n 3 h w to float n 3 crop crop in [-1, 1]."""
    n, side = len(images), images.shape[-1]
    top, left = (int(v) for v in torch.randint(0, side - crop + 1, (2,), generator=generator))
    x = images[:, :, top : top + crop, left : left + crop].float() / 255
    x = torch.where((torch.rand(n, generator=generator) < 0.5)[:, None, None, None], x.flip(-1), x)
    gain = 1 + 0.15 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    contrast = 1 + 0.3 * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (((x - mean) * contrast + mean) * gain).clamp(0, 1) * 2 - 1


def mosaics(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """4n pictures, uint8 4n 3 80 80, to canvases n 3 128 128 in [-1, 1] and the cell 0..3 of each token, 256."""
    row, column = (PATCH * int(torch.randint(6, 11, (1,), generator=generator)) for _ in range(2))
    x = varied(images, SIDE, generator).unflatten(0, (-1, 4))
    canvas = x.new_empty(len(x), 3, CANVAS, CANVAS)
    cell = torch.empty(CANVAS // PATCH, CANVAS // PATCH, dtype=torch.long)
    for i, (top, bottom) in enumerate(((0, row), (row, CANVAS))):
        for j, (left, right) in enumerate(((0, column), (column, CANVAS))):
            h, w = bottom - top, right - left
            y0, x0 = (int(torch.randint(0, SIDE - size + 1, (1,), generator=generator)) for size in (h, w))
            canvas[:, :, top:bottom, left:right] = x[:, 2 * i + j, :, y0 : y0 + h, x0 : x0 + w]
            cell[top // PATCH : bottom // PATCH, left // PATCH : right // PATCH] = 2 * i + j
    return canvas, cell.flatten()


# ---- the encoder


def of_depth(depth: int) -> nn.Module:
    """The shipped backbone's encoder, from nothing, with its first `depth` blocks."""
    encoder = build_encoder(ModelConfig(backbone="scenes_vit_nano", pretrained=False))
    encoder.blocks = encoder.blocks[:depth]
    for block in encoder.blocks:
        block.attn.fused_attn = False  # faster in bf16 on a CPU
    return encoder.train()


def deeper(encoder: nn.Module, depth: int) -> nn.Module:
    """An encoder of more blocks that computes nearly the same: each block is followed by copies of itself, every copy's
    contribution to the residual stream divided by their number."""
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
    matrices = [p for p in encoder.blocks.parameters() if p.ndim == 2 and p.requires_grad]
    others = [
        p for p in (*encoder.parameters(), *heads.parameters()) if p.requires_grad and all(p is not m for m in matrices)
    ]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True),
    ]


def heads_of(prefixes) -> nn.ModuleDict:
    return nn.ModuleDict(
        {f"{prefix}_{name}": nn.Linear(WIDTH, n) for prefix in prefixes for name, n in TARGETS.items()}
    )


def tag_heads(prefixes) -> nn.ModuleDict:
    return nn.ModuleDict({f"{prefix}_tags": nn.Linear(WIDTH, len(SPECIES)) for prefix in prefixes})


def picture_loss(heads: nn.ModuleDict, prefix: str, vectors: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies of species, coat and colours, labels n 3."""
    return sum(
        WEIGHTS[name]
        * F.cross_entropy(heads[f"{prefix}_{name}"](vectors), labels[:, i], label_smoothing=0.1, ignore_index=-100)
        for i, name in enumerate(TARGETS)
    )


class Stage:
    """One stage: `loss(encoder, heads, number of the step)`, `accuracy(encoder, heads)`, and which steps it takes."""

    def __init__(self, name: str, depth: int, steps: int, rates: tuple[float, float, float], singles, scenes, args):
        """`rates`: at the beginning and at the end, as shares of `args.lr`, and the power of the decay between them."""
        self.name, self.depth, self.steps, self.rates, self.args = name, depth, steps, rates, args
        (self.images, self.labels), (self.scenes, self.tags) = singles, scenes
        self.held_out, self.held_out_scenes = 1000, 200

    def pick(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.held_out, len(self.images), (n,), generator=generator)

    def lr(self, step: int) -> float:
        begin, end, power = self.rates
        share = max(0.02, 1 - step / self.steps * (1 - end / begin)) ** power
        return self.args.lr * begin * min(1.0, (step + 1) / 60) * share

    def heads(self) -> nn.ModuleDict:
        if self.name == "single":
            return heads_of(("token", "max"))
        read = [f"block{block}" for block in BLOCKS[self.name]]
        heads = heads_of(read)
        heads.update(tag_heads(["token", *read] if self.name == "mosaic" else ["token", "mean", *read]))
        return heads

    def loss(self, encoder: nn.Module, heads: nn.ModuleDict, step: int, generator: torch.Generator) -> Tensor:
        if self.name == "single":
            pick = self.pick(self.args.batch, generator)
            tokens = self.run(encoder, varied(self.images[pick], CROP, generator))[-1]
            vectors = {"token": tokens[:, 0], "max": tokens[:, 1:].amax(1)}
            return sum(picture_loss(heads, prefix, x, self.labels[pick]) for prefix, x in vectors.items())
        if step % 4 == 3:
            pick = torch.randint(self.held_out_scenes, len(self.scenes), (self.args.canvases,), generator=generator)
            canvas, cell, tags = varied(self.scenes[pick], CANVAS, generator), None, self.tags[pick].float()
        else:
            pick = self.pick(4 * self.args.canvases, generator)
            canvas, cell = mosaics(self.images[pick], generator)
            tags = F.one_hot(self.labels[pick, 0], NONE + 1)[:, :NONE].unflatten(0, (-1, 4)).amax(1).float()
        blocks = BLOCKS[self.name]
        early = int(torch.randint(blocks[0], blocks[-1], (1,), generator=generator))
        *before, last = self.run(encoder, canvas, (early, 10) if self.name == "middle" else (early,))
        binary = F.binary_cross_entropy_with_logits
        total = 5 * binary(heads["token_tags"](last[:, 0]), tags)
        if self.name == "middle":
            total = total + 10 * binary(heads["mean_tags"](last[:, 1:].mean(1)), tags)
        for block, tokens in zip((early, blocks[-1]), [*before, last], strict=False):
            patches, prefix = tokens[:, 1:], f"block{block}"
            if cell is None:
                total = total + 15 * binary(heads[f"{prefix}_tags"](patches.amax(1)), tags)
            else:
                vectors = torch.stack([patches[:, cell == k].amax(1) for k in range(4)], dim=1).flatten(0, 1)
                total = total + picture_loss(heads, prefix, vectors, self.labels[pick])
        return total

    def run(self, encoder: nn.Module, canvas: Tensor, blocks: tuple[int, ...] = ()) -> list[Tensor]:
        """All tokens after each of `blocks` (that of the class is 0) and after the final norm, float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32):
            if not blocks:
                return [encoder.forward_features(canvas).float()]
            last, before = encoder.forward_intermediates(
                canvas, indices=[block - 1 for block in blocks], output_fmt="NLC", return_prefix_tokens=False
            )
        return [*(F.pad(tokens.float(), (0, 0, 1, 0)) for tokens in before), last.float()]

    @torch.no_grad()
    def accuracy(self, encoder: nn.Module, heads: nn.ModuleDict) -> dict[str, float]:
        """Share of held-out pictures whose target is named rightly (tags: by sign), per head of the last block."""
        encoder.eval()
        random, hits = torch.Generator().manual_seed(0), {}
        for start in range(0, 400, 40):
            pick = torch.arange(start, start + 40)
            if self.name == "single":
                tokens = self.run(encoder, self.images[pick][:, :, 4:76, 4:76].float() / 127.5 - 1)[-1]
                found = {"token": tokens[:, 0], "max": tokens[:, 1:].amax(1)}
            else:
                canvas, cell = mosaics(self.images[pick], random)
                before, last = self.run(encoder, canvas, (10,))
                found = {}
                for prefix, tokens in (("block10", before), ("block12", last))[: 2 if self.name == "mosaic" else 1]:
                    cells = [tokens[:, 1:][:, cell == k].amax(1) for k in range(4)]
                    found[prefix] = torch.stack(cells, 1).flatten(0, 1)
                tags = F.one_hot(self.labels[pick, 0], NONE + 1)[:, :NONE].unflatten(0, (-1, 4)).amax(1) > 0
                logits = heads["token_tags"](last[:, 0])
                hits.setdefault("token_tags", []).append(((logits > 0) == tags).all(1).float())
            for prefix, vectors in found.items():
                for i, name in enumerate(TARGETS):
                    right = heads[f"{prefix}_{name}"](vectors).argmax(1) == self.labels[pick, i]
                    hits.setdefault(f"{prefix}_{name}", []).append(right[self.labels[pick, i] >= 0].float())
        encoder.train()
        return {name: round(float(torch.cat(values).mean()), 3) for name, values in hits.items()}


def save(encoder: nn.Module, path: Path) -> None:
    """The encoder in fp16, replaced at once."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.detach().half().contiguous() for k, v in encoder.state_dict().items()}, str(part))
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=5, default=(1200, 600, 400, 1400, 1400), help="of the stages")
    parser.add_argument("--pictures", type=int, default=36_000)
    parser.add_argument("--scenes", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step of the first stage")
    parser.add_argument("--canvases", type=int, default=16, help="in a step of the others")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--float32", action="store_true", help="instead of bf16 products")
    parser.add_argument(
        "--check", type=int, default=200, help="steps between looks at held-out pictures, and checkpoints"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"), help="checkpoints of every stage")
    parser.add_argument("--out", type=Path, default=Path("toco_core/weights/scenes_vit_nano.safetensors"))
    parser.add_argument("--record", type=Path, default=Path("experiments/records/pretrain.json"))
    args = parser.parse_args()

    singles = pool_of(draw_singles, "singles", args.pictures, args.workers)
    scenes = pool_of(draw_scenes, "scenes", args.scenes, args.workers)
    stages = [Stage(*stage, n, r, singles, scenes, args) for stage, n, r in zip(STAGES, args.steps, RATES, strict=True)]
    args.work.mkdir(parents=True, exist_ok=True)
    last = args.work / "last.pt"
    state = (
        torch.load(last, weights_only=True) if last.is_file() else {"stage": 0, "step": 0, "curve": [], "seconds": 0.0}
    )
    encoder, heads, begun = None, None, time.monotonic() - state["seconds"]
    curve = state["curve"]
    for number, stage in enumerate(stages):
        if number < state["stage"]:
            continue
        resumed = number == state["stage"] and "encoder" in state
        depth = stage.depth
        torch.manual_seed(args.seed + number)
        if resumed or number == 0:
            encoder = of_depth(depth)
        elif depth > len(encoder.blocks):
            encoder = deeper(encoder, depth)
        earlier, heads = heads, stage.heads()
        if stage.name == "middle" and not resumed:  # the heads of the blocks that are read go on
            heads.load_state_dict(
                {k: v for k, v in earlier.state_dict().items() if k in heads.state_dict()}, strict=False
            )
        optimizers, first = optimizers_for(encoder, heads, args), 0
        if resumed:
            encoder.load_state_dict(state["encoder"])
            heads.load_state_dict(state["heads"])
            for optimizer, found in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(found)
            first = state["step"]
        parameters = [p for p in (*encoder.parameters(), *heads.parameters()) if p.requires_grad]
        for step in tqdm(
            range(first, stage.steps), initial=first, total=stage.steps, desc=f"{stage.name}, {depth} blocks"
        ):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = stage.lr(step)
            generator = torch.Generator().manual_seed(args.seed + 1_000_003 * (number + 1) + step)
            loss = stage.loss(encoder, heads, step, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if (step + 1) % args.check == 0 or step + 1 == stage.steps:
                seconds = round(time.monotonic() - begun)
                row = {
                    "stage": stage.name,
                    "blocks": depth,
                    "step": step + 1,
                    "seconds": seconds,
                    "loss": round(loss.item(), 3),
                }
                curve.append(row | stage.accuracy(encoder, heads))
                tqdm.write(str(curve[-1]))
                state = {
                    "stage": number,
                    "step": step + 1,
                    "curve": curve,
                    "seconds": float(seconds),
                    "encoder": encoder.state_dict(),
                    "heads": heads.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                }
                torch.save(state, last.with_suffix(".part"))
                last.with_suffix(".part").replace(last)
        if stage.name != "single":
            save(encoder, args.work / f"{stage.name}.safetensors")
    save(encoder, args.out)
    facts = {k: v for k, v in vars(args).items() if k not in ("work", "out", "record", "workers")}
    record = facts | {"rates": RATES, "threads": torch.get_num_threads(), "torch": torch.__version__, "curve": curve}
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{curve[-1]}; wrote {args.out}")


if __name__ == "__main__":
    main()
