"""The slow baseline of the benchmarks: one training step and one evaluation, written down as one naturally would.

Ours, from the equations; where they leave a choice it spends its time where the published release does: every picture
goes through the encoder on its own for each purpose, CAM passes make the maps of all classes and run the decoder, PAR
starts anew for each image and each background score and copies all neighbours in each iteration, pairs of tokens are
N x N masks, crops are cut in a Python loop. It shares the weights and the blocks of a `toco_core` model, so that losses
and gradients can be compared (tests/test_benchmarks.py), and nothing else but the dense energy: the release filters
with a compiled extension, for which there is no slow version that ends in reasonable time.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from toco_core.backbone import resize_positions
from toco_core.losses import dense_energy_loss

IGNORE = 255
DILATIONS = (1, 2, 4, 8, 12, 24)


# ---- network


class Said(NamedTuple):
    """What one pass says about B images."""

    class_logits: torch.Tensor
    aux_class_logits: torch.Tensor
    seg_logits: torch.Tensor
    patch_map: torch.Tensor
    class_token: torch.Tensor
    cam: torch.Tensor  # of all classes, at the patch grid
    aux_cam: torch.Tensor


def network(model, images):
    """Everything at once: encoder, both classifiers, both CAMs, decoder."""
    encoder = model.encoder
    patches = encoder.patch_embed(images)  # B h w D
    grid = tuple(patches.shape[1:3])
    trained_at = tuple(encoder.patch_embed.grid_size)
    positions = resize_positions(encoder.pos_embed, trained_at, grid, 1, antialias=False)
    x = torch.cat([encoder.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], dim=1) + positions
    for number, block in enumerate(encoder.blocks, 1):
        x = block(x)
        if number == model.layer:
            aux_map = _as_map(x, grid)
    x = encoder.norm(x)
    patch_map = _as_map(x, grid)
    weight, aux_weight = (head.weight[:, :, None, None] for head in (model.classifier, model.aux_classifier))
    return Said(
        class_logits=F.conv2d(F.adaptive_max_pool2d(patch_map, 1), weight).flatten(1),
        aux_class_logits=F.conv2d(F.adaptive_max_pool2d(aux_map, 1), aux_weight).flatten(1),
        seg_logits=model.decoder(patch_map),
        patch_map=patch_map,
        class_token=x[:, 0],
        cam=F.conv2d(patch_map, weight).detach(),
        aux_cam=F.conv2d(aux_map, aux_weight).detach(),
    )


def _as_map(x, grid):
    return x[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid)


@torch.no_grad()
def multi_scale_cam(model, images, scales):
    """B K H W twice: CAM and auxiliary CAM of all classes, each scale with its mirrored image."""
    B, size = len(images), images.shape[2:]
    total, aux_total = 0, 0
    for scale in scales:
        views = images
        if scale != 1:
            views = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        said = network(model, torch.cat([views, views.flip(-1)]))
        cam, aux_cam = (F.interpolate(c, size=size, mode="bilinear") for c in (said.cam, said.aux_cam))
        total = total + F.relu(torch.max(cam[:B], cam[B:].flip(-1)))
        aux_total = aux_total + F.relu(torch.max(aux_cam[:B], aux_cam[B:].flip(-1)))
    return _to_unit(total), _to_unit(aux_total)


def _to_unit(cam):
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)


# ---- labels


def seed_label(cam, image_labels, beta_l, beta_h):
    """B H W: 0 background, 1..K, 255 between the thresholds."""
    value, label = (cam * image_labels[:, :, None, None]).max(dim=1)
    label = label + 1
    label[value < beta_h] = IGNORE
    label[value <= beta_l] = 0
    return label


def inside_only(label, boxes):
    """255 outside each image's box."""
    out = torch.full_like(label, IGNORE)
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        out[b, top:bottom, left:right] = label[b, top:bottom, left:right]
    return out


def boxes_on_tokens(boxes, size, grid):
    """The tokens whose centre is inside, for boxes in pixels."""
    (H, W), (h, w) = size, grid
    per = torch.tensor([H / h, H / h, W / w, W / w])
    return (boxes / per - 0.5).ceil().long()


def affinity_mask(label):
    """B N N: 1 same class, 0 different, 255 ignored."""
    label = label.flatten(1)
    masks = []
    for one in label:
        N = len(one)
        columns = one[None].repeat(N, 1)
        rows = one[:, None].repeat(1, N)
        mask = (rows == columns).long()
        mask[rows == IGNORE] = IGNORE
        mask[columns == IGNORE] = IGNORE
        mask[range(N), range(N)] = IGNORE
        masks.append(mask)
    return torch.stack(masks)


def gather_neighbours(values, dilations):
    """B C O H W: all neighbours, copied."""
    B, C, H, W = values.shape
    parts = []
    for d in dilations:
        columns = F.unfold(F.pad(values, (d,) * 4, mode="replicate"), kernel_size=3, dilation=d).view(B, C, 9, H, W)
        parts.append(torch.cat([columns[:, :, :4], columns[:, :, 5:]], dim=2))
    return torch.cat(parts, dim=2)


def par(images, masks, iterations=10, dilations=DILATIONS):
    """Pixel-adaptive refinement: see `toco_core.par` for the equation."""
    around = gather_neighbours(images, dilations)
    deviation = around.std(dim=2, keepdim=True)
    colour = -(((around - images[:, :, None]).abs() / (deviation + 1e-8) / 0.3) ** 2).mean(dim=1, keepdim=True)
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    distance = torch.tensor([d * math.hypot(y, x) for d in dilations for y, x in steps], dtype=images.dtype)
    position = -((distance / (distance.std() + 1e-8) / 0.3) ** 2)
    weights = colour.softmax(dim=2) + 0.01 * position.softmax(dim=0)[:, None, None]
    for _ in range(iterations):
        masks = (gather_neighbours(masks, dilations) * weights).sum(dim=2)
    return masks


@torch.no_grad()
def pseudo_label(images, cam, image_labels, boxes, *, beta_l, beta_h, iterations=10, dilations=DILATIONS, scale=0.5):
    """B H W after PAR, one image after the other, once for each background score."""
    size = images.shape[2:]
    small = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    labels = []
    for b in range(len(images)):
        classes = torch.nonzero(image_labels[b])[:, 0]
        names = torch.cat([torch.zeros(1, dtype=torch.long), classes + 1])
        won = []
        for beta in (beta_h, beta_l):
            scores = torch.cat([torch.full_like(cam[b, :1], beta), cam[b, classes]])[None]
            scores = F.interpolate(scores, size=small.shape[2:], mode="bilinear", align_corners=False).softmax(dim=1)
            refined = par(small[b : b + 1], scores, iterations, dilations)
            refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
            won.append(names[refined.argmax(dim=1)[0]])
        high, low = won
        label = high.clone()
        label[high == 0] = IGNORE
        label[(high == 0) & (low == 0)] = 0
        labels.append(label)
    return inside_only(torch.stack(labels), boxes)


# ---- crops


def region_of(aux_cam, image_labels, beta_l, beta_h):
    """B H W: 0 background, 1 uncertain, 2 foreground."""
    label = seed_label(aux_cam, image_labels, beta_l, beta_h)
    region = torch.full_like(label, 2)
    region[label == IGNORE] = 1
    region[label == 0] = 0
    return region


def draw_boxes(region, boxes, n_crops, size):
    """Top and left corners, B V: centres on background or uncertain pixels of the real image."""
    H, W = region.shape[1:]
    half = size // 2
    corners = []
    for b, (top, bottom, left, right) in enumerate(boxes.tolist()):
        wanted = torch.zeros(H, W, dtype=torch.bool)
        wanted[top:bottom, left:right] = region[b, top:bottom, left:right] <= 1
        places = torch.nonzero(wanted[half : half + H - size + 1, half : half + W - size + 1])
        corners.append(places[torch.randperm(len(places))[:n_crops]])
    return torch.stack(corners).unbind(-1)


def cut_and_flag(images, region, top, left, size, threshold):
    """The crops, B V 3 s s, and whether each shows an object, B V, one crop after the other."""
    views, flags = [], []
    for b in range(len(images)):
        for y, x in zip(top[b].tolist(), left[b].tolist(), strict=True):
            views.append(images[b, :, y : y + size, x : x + size])
            flags.append(region[b, y : y + size, x : x + size].float().mean() > threshold)
    shape = top.shape
    return torch.stack(views).unflatten(0, shape), torch.stack(flags).unflatten(0, shape)


# ---- losses


def ptc_loss(patch_map, mask):
    """Patch token contrast from the N x N mask of pairs."""
    tokens = F.normalize(patch_map.flatten(2), dim=1, eps=1e-8)
    cosine = torch.bmm(tokens.transpose(1, 2), tokens).abs()
    same, different = (mask == 1).to(cosine.dtype), (mask == 0).to(cosine.dtype)
    alike = 1 - (cosine * same).sum() / (same.sum() + 1) if same.any() else (cosine * same).sum()
    return 0.5 * alike + 0.5 * (cosine * different).sum() / (different.sum() + 1)


def ctc_loss(student, teacher, is_positive, temperature):
    """Class token contrast, image by image and view by view."""
    cost = 0
    B, V, _ = student.shape
    for b in range(B):
        for seen in teacher[b]:
            positives = [student[b, v] for v in range(V) if is_positive[b, v]]
            negatives = [student[b, v] for v in range(V) if not is_positive[b, v]]
            away = sum((torch.exp(torch.dot(n, seen) / temperature) for n in negatives), torch.zeros(()))
            terms = [-torch.log(1 / (1 + away + 1e-4))]
            for positive in positives:
                near = torch.exp(torch.dot(positive, seen) / temperature)
                terms.append(-torch.log(near / (near + away + 1e-4)))
            cost = cost + torch.stack(terms).sum() / (len(positives) + 1e-4)
    return cost / (B * teacher.shape[1])


def segmentation_loss(logits, label):
    """Half the mean over background, half the mean over foreground: one cross-entropy for each."""
    background, foreground = label.clone(), label.clone()
    background[label != 0] = IGNORE
    foreground[label == 0] = IGNORE
    halves = [F.cross_entropy(logits, part, ignore_index=IGNORE) for part in (background, foreground)]
    return 0.5 * (halves[0] + halves[1])


# ---- a step


class Step(NamedTuple):
    """Losses of a step, and the labels behind them."""

    total: torch.Tensor
    terms: dict
    token_label: torch.Tensor
    is_positive: torch.Tensor
    pseudo_label: torch.Tensor


def step_losses(model, batch, config, weights, boxes=None):
    """All terms of the total loss, nothing shared between their passes. `boxes`: (top, left) of the local views."""
    images, global_view, local_image, image_labels, valid_box = batch
    betas = config.labels.beta_l, config.labels.beta_h
    size, crops = images.shape[2:], config.crops

    cam, aux_cam = multi_scale_cam(model, images, config.labels.cam_scales)
    region = region_of(aux_cam, image_labels, *betas)
    top, left = boxes or draw_boxes(region, valid_box, crops.n_local, crops.local_size)
    views, flags = cut_and_flag(local_image, region, top, left, crops.local_size, crops.positive_threshold)
    is_positive = torch.cat([torch.ones(len(images), 2, dtype=torch.bool), flags], dim=1)

    said = network(model, images)
    global_views = torch.cat([images, global_view])
    student = [model.proj_head(network(model, global_views).class_token)]
    student.append(model.proj_head(network(model, views.transpose(0, 1).flatten(0, 1)).class_token))
    with torch.no_grad():
        teacher = model.proj_head_ema(network(model, global_views).class_token)
    B = len(images)
    student = torch.cat(student).unflatten(0, (-1, B)).transpose(0, 1)  # views first -> B V P
    teacher = teacher.unflatten(0, (-1, B)).transpose(0, 1)

    grid = tuple(said.patch_map.shape[2:])
    small_cam = F.interpolate(aux_cam, size=grid, mode="bilinear", align_corners=False)
    token_label = seed_label(small_cam, image_labels, *betas)
    token_label = inside_only(token_label, boxes_on_tokens(valid_box, size, grid))

    unit = (images * model.std + model.mean).clamp(0, 1)
    refined = pseudo_label(
        unit,
        cam,
        image_labels,
        valid_box,
        beta_l=betas[0],
        beta_h=betas[1],
        iterations=config.labels.par_iterations,
        dilations=config.labels.par_dilations,
        scale=config.labels.par_scale,
    )
    seg_logits = F.interpolate(said.seg_logits, size=size, mode="bilinear", align_corners=False)
    terms = {
        "cls": F.multilabel_soft_margin_loss(said.class_logits, image_labels),
        "aux_cls": F.multilabel_soft_margin_loss(said.aux_class_logits, image_labels),
        "ptc": ptc_loss(said.patch_map, affinity_mask(token_label)),
        "ctc": ctc_loss(student, teacher, is_positive, config.loss.temperature),
        "seg": segmentation_loss(seg_logits, refined),
        "energy": dense_energy_loss(seg_logits, unit, refined, valid_box),
    }
    total = sum(weights[name] * term for name, term in terms.items())
    return Step(total, terms, token_label, is_positive, refined)


def optimizer_of(groups, betas):
    """AdamW, one parameter after the other."""
    return torch.optim.AdamW(groups, betas=betas, foreach=False, fused=False)


def average_head(model, momentum):
    """The teacher's head follows the student's."""
    with torch.no_grad():
        for teacher, student in zip(model.proj_head_ema.parameters(), model.proj_head.parameters(), strict=True):
            teacher.data = momentum * teacher.data + (1 - momentum) * student.data


# ---- evaluation


def confusion(truth, prediction, n_classes):
    """The usual histogram of n * truth + prediction."""
    valid = (truth >= 0) & (truth < n_classes)
    pairs = n_classes * truth[valid].astype(int) + prediction[valid]
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def label_counts(cam, image_labels, truth, beta):
    """Confusion matrix of one image's CAM (1 K H W) at one threshold, at the size of the mask."""
    cam = F.interpolate(cam, size=truth.shape, mode="bilinear", align_corners=False)
    value, label = (cam * image_labels[:, :, None, None]).max(dim=1)
    label = label + 1
    label[value <= beta] = 0
    return confusion(truth, label[0].numpy(), cam.shape[1] + 1)


@torch.no_grad()
def evaluate(model, items, scales, betas):
    """Confusion matrices of CAM and auxiliary CAM at each of `betas`, and of the segmentation.

    `items` are (image 1 3 H W, normalised; image_labels 1 K; mask h w), one after the other.
    """
    C = model.n_classes + 1
    counts, aux_counts, seg_counts = np.zeros((len(betas), C, C)), np.zeros((len(betas), C, C)), np.zeros((C, C))
    for image, image_labels, truth in items:
        said = network(model, image)
        seg = F.interpolate(said.seg_logits, size=truth.shape, mode="bilinear", align_corners=False)
        seg_counts += confusion(truth, seg.argmax(dim=1)[0].numpy(), C)
        cam, aux_cam = multi_scale_cam(model, image, scales)
        for i, beta in enumerate(betas):
            counts[i] += label_counts(cam, image_labels, truth, beta)
            aux_counts[i] += label_counts(aux_cam, image_labels, truth, beta)
    return counts, aux_counts, seg_counts
