"""Slow second implementations of PAR, labels, crops and scores: one pixel, one pair, one crop at a time."""

import math

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = 255


def at(image, y, x):
    """image[..., y, x], the border continued outwards."""
    height, width = image.shape[-2:]
    return image[..., min(max(y, 0), height - 1), min(max(x, 0), width - 1)]


def neighbours(dilations):
    return [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def softmax(values):
    values = np.asarray(values, dtype=np.float64)
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def std(values):
    """With n - 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def refine(images, masks, iterations, dilations):
    """PAR pixel by pixel, in float64."""
    masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
    return torch.stack([_refine_one(i, m, iterations, dilations) for i, m in zip(images, masks, strict=True)])


def _refine_one(image, mask, iterations, dilations):
    image, mask = image.double().numpy(), mask.double().numpy()
    height, width = image.shape[1:]
    offsets = neighbours(dilations)
    distances = [math.hypot(dy, dx) for dy, dx in offsets]
    position = softmax([-((d / (0.3 * (std(distances) + 1e-8))) ** 2) for d in distances])
    weights = {}
    for y in range(height):
        for x in range(width):
            colours = [at(image, y + dy, x + dx) for dy, dx in offsets]
            spread = [std([c[channel] for c in colours]) for channel in range(3)]
            colour = softmax(
                [
                    -sum(((c[i] - image[i, y, x]) / (0.3 * (spread[i] + 1e-8))) ** 2 for i in range(3)) / 3
                    for c in colours
                ]
            )
            weights[y, x] = colour + 0.01 * position
    for _ in range(iterations):
        new = np.zeros_like(mask)
        for (y, x), weight in weights.items():
            for w, (dy, dx) in zip(weight, offsets, strict=True):
                new[:, y, x] += w * at(mask, y + dy, x + dx)
        mask = new
    return torch.from_numpy(mask)


def refine_with_unfold(images, masks, iterations=10, dilations=(1, 2, 4, 8, 12, 24)):
    """The usual way, vectorised: all neighbours are copied in each iteration. For pictures too large for `refine`."""

    def gather(values):
        batch, channels, height, width = values.shape
        parts = []
        for d in dilations:
            columns = F.unfold(F.pad(values, (d,) * 4, mode="replicate"), kernel_size=3, dilation=d)
            columns = columns.view(batch, channels, 9, height, width)
            parts.append(torch.cat([columns[:, :, :4], columns[:, :, 5:]], dim=2))
        return torch.cat(parts, dim=2)  # B C O H W

    masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
    around = gather(images)
    spread = around.std(dim=2, keepdim=True)
    colour = -(((around - images[:, :, None]) / (spread + 1e-8) / 0.3) ** 2).mean(1, keepdim=True)
    distance = torch.tensor(neighbours(dilations), dtype=images.dtype).norm(dim=1)
    position = (-((distance / (distance.std() + 1e-8) / 0.3) ** 2)).softmax(0)
    weights = colour.softmax(2) + 0.01 * position[:, None, None]
    for _ in range(iterations):
        masks = (gather(masks) * weights).sum(2)
    return masks


def inside(box, y, x):
    top, bottom, left, right = (int(v) for v in box)
    return top <= y < bottom and left <= x < right


def largest(cam, image_labels, y, x):
    """Value and label (1..K) of the strongest class of the image, the first of equals; (0, 0) if there is none."""
    best, label = 0.0, 0
    for k in range(len(image_labels)):
        if image_labels[k] and float(cam[k, y, x]) > best:
            best, label = float(cam[k, y, x]), k + 1
    return best, label


def seed_label(cam, image_labels, beta_l, beta_h, boxes):
    batch, _, height, width = cam.shape
    out = torch.zeros(batch, height, width, dtype=torch.long)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                value, label = largest(cam[b], image_labels[b], y, x)
                if boxes is not None and not inside(boxes[b], y, x):
                    out[b, y, x] = IGNORE
                elif value <= beta_l:
                    out[b, y, x] = 0
                elif value >= beta_h:
                    out[b, y, x] = label
                else:
                    out[b, y, x] = IGNORE
    return out


def region_mask(cam, image_labels, beta_l, beta_h, boxes):
    label = seed_label(cam, image_labels, beta_l, beta_h, None)
    out = torch.where(label == 0, 0, torch.where(label == IGNORE, 1, 2))
    for b, y, x in np.ndindex(*out.shape):
        if boxes is not None and not inside(boxes[b], y, x):
            out[b, y, x] = 0
    return out


def pseudo_label(images, cam, image_labels, beta_l, beta_h, boxes, iterations, dilations, scale):
    """Both background scores refined one after the other, with background as a channel of its own."""
    size = images.shape[2:]
    small = [int(length * scale) for length in size]
    out = torch.full((len(images), *size), IGNORE)
    for b in range(len(images)):
        classes = [k for k in range(cam.shape[1]) if image_labels[b, k]]
        image = F.interpolate(images[b : b + 1], size=small, mode="bilinear", align_corners=False)
        won = {}
        for beta in (beta_l, beta_h):
            scores = torch.cat([torch.full_like(cam[b, :1], beta), cam[b, classes]])[None]
            scores = F.interpolate(scores, size=small, mode="bilinear", align_corners=False).softmax(1)
            refined = refine_with_unfold(image, scores, iterations, dilations)
            refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)[0]
            won[beta] = torch.tensor([0] + [k + 1 for k in classes])[refined.argmax(0)]
        for y in range(size[0]):
            for x in range(size[1]):
                if boxes is not None and not inside(boxes[b], y, x):
                    continue
                if won[beta_h][y, x] > 0:
                    out[b, y, x] = won[beta_h][y, x]
                elif won[beta_l][y, x] == 0:
                    out[b, y, x] = 0
    return out


def affinity_mask(label):
    batch, height, width = label.shape
    n = height * width
    out = torch.zeros(batch, n, n, dtype=torch.long)
    for b, i, j in np.ndindex(batch, n, n):
        first, second = label[b, i // width, i % width], label[b, j // width, j % width]
        if i == j or first == IGNORE or second == IGNORE:
            out[b, i, j] = IGNORE
        else:
            out[b, i, j] = int(first == second)
    return out


def ratio_of_crop(region, top, left, size):
    """Mean of the region values of one crop."""
    return sum(int(region[y, x]) for y in range(top, top + size) for x in range(left, left + size)) / size**2


def cut_crops(images, top, left, size):
    rows = [
        torch.stack([image[:, y : y + size, x : x + size] for y, x in zip(ys.tolist(), xs.tolist(), strict=True)])
        for image, ys, xs in zip(images, top, left, strict=True)
    ]
    return torch.stack(rows)


def confusion(truth, prediction, n_classes):
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    for t, p in zip(np.ravel(truth).tolist(), np.ravel(prediction).tolist(), strict=True):
        if t != IGNORE:
            counts[t, p] += 1
    return counts


def scores(counts):
    """IoU, precision, recall per class by sets of pixels, and the means over the classes of the ground truth."""
    n = len(counts)
    nan = float("nan")
    iou, precision, recall = [], [], []
    for c in range(n):
        right = int(counts[c, c])
        truth, predicted = sum(int(v) for v in counts[c]), sum(int(counts[r, c]) for r in range(n))
        union = truth + predicted - right
        iou.append(right / union if union else nan)
        precision.append(right / predicted if predicted else nan)
        recall.append(right / truth if truth else nan)
    shown = [c for c in range(n) if counts[c].sum() > 0]
    total = int(counts.sum())
    return {
        "iou": iou,
        "precision": precision,
        "recall": recall,
        "miou": sum(iou[c] for c in shown) / len(shown) if shown else nan,
        "mean_accuracy": sum(recall[c] for c in shown) / len(shown) if shown else nan,
        "pixel_accuracy": sum(int(counts[c, c]) for c in range(n)) / total if total else nan,
    }


def average_precision(scores, wanted):
    """Area under precision over recall: one step for each threshold that lets further images in."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = [w for s, w in zip(scores, wanted, strict=True) if s >= threshold]
        area += (sum(found) / sum(wanted) - recall) * sum(found) / len(found)
        recall = sum(found) / sum(wanted)
    return area
