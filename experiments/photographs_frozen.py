"""What a frozen backbone knows of photographs: how should a classifier read the tokens, and of which block?

    python experiments/photographs_frozen.py --dataset <VOC folder> --weights vit_tiny.safetensors --name voc_six

A linear classifier is fitted to the frozen tokens of five sixths of the *training* images, as a warm start does it, for
each pooling and for each of the last blocks; its CAM (mirrored, too) is scored on the last sixth, as it is and carried
once along the attention of the recipe's blocks, at its best threshold. Expected: channels' maxima are bad readers, a
class's own scores are good ones, and attention adds much to a CAM that has the right places. Cost: two minutes of a CPU
core. Writes experiments/records/photographs_frozen_<name>.json.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from common import RECORDS, use_threads

from toco_core.cam import class_activation, normalise_cam
from toco_core.config import override, photographs
from toco_core.data import evaluation_items, holdout, open_source, to_unit
from toco_core.data.loader import in_batches
from toco_core.evaluation.evaluate import CAMCounts
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.machine.writing import write_whole
from toco_core.model import build_model
from toco_core.predict.image import strongest
from toco_core.refiners.attention import carried, token_affinity
from toco_core.train.warm_start import classifier_input, fit_classifier

BLOCKS = (9, 10, 11, 12)
POOLINGS = ("max", "mean", "topk", "cam_topk")
AT_ONCE = 16


@torch.no_grad()
def seen(model, source, config, *, mirrored: bool = False, attended=()):
    """Per block of BLOCKS the normed patch tokens of a split, n N D, and the mean attention, n N N."""
    tokens, attention = {block: [] for block in BLOCKS}, []
    for batch in in_batches(evaluation_items(source, size=config.data.crop_size), AT_ONCE):
        images = model.normalise(to_unit(torch.cat([item.image for item in batch])))
        images = images.flip(-1) if mirrored else images
        with attention_of(model, config, images.device), autocast_of(config, images.device)():
            found = model.inside(images, attend=attended)
            for block in BLOCKS:
                x = found.blocks[block - 1]
                x = found.normed[-1] if block == model.depth else F.layer_norm(x, x.shape[-1:], eps=1e-6)
                tokens[block].append(x.bfloat16())
        if attended:
            attention.append(found.tokens.attention)
    return {block: torch.cat(parts) for block, parts in tokens.items()}, torch.cat(attention) if attended else None


def fitted(tokens, labels, pooling: str, steps: int) -> torch.Tensor:
    """The weight of a classifier of these tokens."""
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.Linear(tokens.shape[-1], labels.shape[1], bias=False)
    torch.nn.init.normal_(classifier.weight, std=tokens.shape[-1] ** -0.5, generator=generator)
    read = classifier_input(tokens.float(), pooling)
    fit_classifier(classifier, read, labels, steps=steps, generator=generator, pooling=pooling)
    return classifier.weight.detach()


@torch.no_grad()
def best_miou(views, weight, source, size: int, steps: int) -> dict:
    """mIoU in percent at the best threshold, of a CAM that is carried `steps` times along attention."""
    counts = CAMCounts(source.n_classes)
    for i in range(len(source)):
        maps = []
        for tokens, affinity, mirrored in views:
            grid = (int(tokens.shape[1] ** 0.5),) * 2
            cam = class_activation(tokens[i : i + 1].float().transpose(1, 2).unflatten(2, grid), weight)
            cam = carried(cam, affinity[i : i + 1], steps) if steps else cam
            maps.append(cam.flip(-1) if mirrored else cam)
        cam = F.interpolate(torch.maximum(*maps), size=(size, size), mode="bilinear", align_corners=False).relu()
        mask, labels = source.mask(i), torch.from_numpy(source.image_labels[i : i + 1])
        counts.update(mask, *strongest(normalise_cam(cam[0])[None], labels, mask.shape))
    return {"miou": round(100 * float(counts.scores(counts.best_beta).miou), 1), "beta": counts.best_beta}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weights", required=True, help="file of vit_tiny_patch16_224's ImageNet weights")
    parser.add_argument("--name", required=True, help="of the data set, in the record's name")
    parser.add_argument("--precision", default="auto", help="as in the config; bf16 halves the time on many CPUs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    use_threads(args.threads)
    config = override(photographs(args.dataset), weights=args.weights, precision=args.precision)
    whole = open_source(args.dataset, "train")
    train, tune = (whole.subset(part) for part in holdout(whole.names, 1 / 6))
    model = build_model(config, whole.n_classes).eval()
    labels = torch.as_tensor(train.image_labels, dtype=torch.float32)
    tokens, _ = seen(model, train, config)
    attended = config.labels.attended()
    views = [(*seen(model, tune, config, mirrored=m, attended=attended), m) for m in (False, True)]
    record = {"fitted on": len(train), "scored on": len(tune), "rows": []}
    for block, pooling in [(10, pooling) for pooling in POOLINGS[:-1]] + [(block, "cam_topk") for block in BLOCKS]:
        weight = fitted(tokens[block], labels, pooling, config.schedule.warm_start_steps)
        of_block = [(found[block], token_affinity(attention), mirrored) for found, attention, mirrored in views]
        row = {"block": block, "pooling": pooling}
        for name, steps in (("as it is", 0), ("carried once", 1)):
            row[name] = best_miou(of_block, weight, tune, config.data.crop_size, steps)
        record["rows"].append(row)
        print(row, flush=True)
    write_whole(RECORDS / f"photographs_frozen_{args.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
