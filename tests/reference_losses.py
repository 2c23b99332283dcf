"""Slow second versions of the losses, written from the equations: one loop per sum, one branch per case."""

import math

import torch
from torch import Tensor

IGNORE = 255


def classification_loss(logits: Tensor, image_labels: Tensor) -> Tensor:
    cost = 0
    for b in range(logits.shape[0]):
        for k in range(logits.shape[1]):
            p = 1 / (1 + torch.exp(-logits[b, k]))
            cost = cost - (torch.log(p) if image_labels[b, k] == 1 else torch.log(1 - p))
    return cost / logits.numel()


def affinity_of(label: Tensor) -> Tensor:
    """B h w -> B N N: 1 same class, 0 different class, 255 where a token is ignored and on the diagonal."""
    label = label.flatten(1)
    B, N = label.shape
    affinity = torch.full((B, N, N), IGNORE)
    for b in range(B):
        for i in range(N):
            for j in range(N):
                if i != j and label[b, i] != IGNORE and label[b, j] != IGNORE:
                    affinity[b, i, j] = int(label[b, i] == label[b, j])
    return affinity


def ptc_loss(patch_map: Tensor, affinity: Tensor, keep_constant: bool = False) -> Tensor:
    """From the whole affinity mask, as the release does it: the full N x N similarity is held."""
    tokens = patch_map.flatten(2)
    length = tokens.pow(2).sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt()
    tokens = tokens / length.clamp(min=1e-8)
    cosine = torch.einsum("bdi,bdj->bij", tokens, tokens).abs()
    same, different = affinity == 1, affinity == 0
    half_same = 1 - cosine[same].sum() / (same.sum() + 1)
    if not same.any() and not keep_constant:
        half_same = half_same * 0
    half_different = cosine[different].sum() / (different.sum() + 1)
    return half_same / 2 + half_different / 2


def ctc_loss(
    student: Tensor,
    teacher: Tensor,
    is_positive: Tensor,
    temperature: float,
    negatives_only_term: bool = True,
    cosine: bool = False,
    classes: list[set] | None = None,
) -> Tensor:
    """`classes` of each image: where given, every view of an image without a common one is a negative, too."""
    B, V, _ = student.shape
    G = teacher.shape[1]

    def p(b, v, i, g):
        one, other = student[b, v], teacher[i, g]
        dot = (one * other).sum()
        if cosine:
            dot = dot / ((one**2).sum() * (other**2).sum()).sqrt()
        return torch.exp(dot / temperature)

    loss = student.sum() * 0
    for b in range(B):
        positives = [v for v in range(V) if is_positive[b, v]]
        negatives = [v for v in range(V) if not is_positive[b, v]]
        if not positives:
            continue
        for g in range(G):
            n = torch.zeros((), dtype=student.dtype)
            for v in negatives:
                n = n + p(b, v, b, g)
            for j in range(B):
                if classes is not None and j != b and not classes[b] & classes[j]:
                    for v in range(V):
                        n = n + p(j, v, b, g)
            cost = 0
            for v in positives:
                cost = cost - torch.log(p(b, v, b, g) / (p(b, v, b, g) + n + 1e-4))
            if negatives_only_term:
                cost = cost - torch.log(1 / (1 + n + 1e-4))
            loss = loss + cost / (len(positives) + 1e-4)
    return loss / (B * G)


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    background, foreground = [], []
    for b in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                cls = int(label[b, y, x])
                if cls == IGNORE:
                    continue
                scores = logits[b, :, y, x]
                cost = torch.log(torch.exp(scores).sum()) - scores[cls]
                (background if cls == 0 else foreground).append(cost)
    zero = logits.sum() * 0
    halves = [torch.stack(part).mean() if part else zero for part in (background, foreground)]
    return (halves[0] + halves[1]) / 2


def gaussian_kernel(features: Tensor) -> Tensor:
    """exp(-|f_i - f_j|^2 / 2) for all pairs of rows, held as a matrix."""
    return torch.exp(-0.5 * (features[:, None] - features[None]).pow(2).sum(-1))


def bilateral_features(levels: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """3 H W in 0..255 -> P 5: x, y in pixels over sigma_xy, then red, green, blue over sigma_rgb."""
    _, H, W = levels.shape
    rows = []
    for y in range(H):
        for x in range(W):
            rows.append([x / sigma_xy, y / sigma_xy, *(float(levels[c, y, x]) / sigma_rgb for c in range(3))])
    return torch.tensor(rows, dtype=levels.dtype)


def lattice_filter(features: Tensor, values: Tensor) -> Tensor:
    """Splat, blur, slice on the permutohedral lattice (Adams et al., 2010) with a dictionary, one point at a time."""
    P, d = features.shape
    scale = [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    corners = []  # per point: list of (key, weight)
    for f in features.tolist():
        s = [a * b for a, b in zip(f, scale, strict=True)]
        y = [sum(s[j:]) - (j * s[j - 1] if j > 0 else 0) for j in range(d + 1)]  # sums to 0
        origin = [round(a / (d + 1)) * (d + 1) for a in y]
        excess = sum(origin) // (d + 1)
        by_distance = sorted(range(d + 1), key=lambda j: origin[j] - y[j])  # the most under-rounded coordinate first
        if excess > 0:  # take back what was rounded up too far
            for j in by_distance[d + 1 - excess :]:
                origin[j] -= d + 1
        elif excess < 0:
            for j in by_distance[:-excess]:
                origin[j] += d + 1
        assert sum(origin) == 0
        order = sorted(range(d + 1), key=lambda j: origin[j] - y[j])
        z = [(y[j] - origin[j]) / (d + 1) for j in order]  # descending, z[0] - z[d] <= 1
        weights = [1 + z[d] - z[0]] + [z[d - k] - z[d - k + 1] for k in range(1, d + 1)]
        vertex = []
        for k, weight in enumerate(weights):  # corner k: the k smallest remainders step by k - (d + 1), the others by k
            key = list(origin)
            for rank, j in enumerate(order):
                key[j] += k if rank <= d - k else k - (d + 1)
            vertex.append((tuple(key), weight))
        corners.append(vertex)
    table = {}
    for p in range(P):
        for key, weight in corners[p]:
            table[key] = table.get(key, 0) + weight * values[p]
    for j in range(d + 1):
        blurred = {}
        for key, value in table.items():
            ahead = tuple(c + (d if i == j else -1) for i, c in enumerate(key))
            behind = tuple(c - (d if i == j else -1) for i, c in enumerate(key))
            blurred[key] = value + (table.get(ahead, 0) + table.get(behind, 0)) / 2
        table = blurred
    gain = 1 / (1 + 2.0**-d)
    return torch.stack([gain * sum(weight * table[key] for key, weight in corners[p]) for p in range(P)])


def filter_matrix(features: Tensor) -> Tensor:
    """The lattice filter as a P P matrix."""
    return lattice_filter(features, torch.eye(len(features), dtype=features.dtype))


def reduced_bilinearly(x: Tensor, h: int, w: int) -> Tensor:
    """C H W -> C h w, sampling points at the centres of the small pixels, clamped at the border."""
    C, H, W = x.shape
    rows = []
    for i in range(h):
        y = max((i + 0.5) * H / h - 0.5, 0)
        y0 = int(y)
        y1 = min(y0 + 1, H - 1)
        for j in range(w):
            s = max((j + 0.5) * W / w - 0.5, 0)
            x0 = int(s)
            x1 = min(x0 + 1, W - 1)
            top = x[:, y0, x0] * (1 - (s - x0)) + x[:, y0, x1] * (s - x0)
            bottom = x[:, y1, x0] * (1 - (s - x0)) + x[:, y1, x1] * (s - x0)
            rows.append(top * (1 - (y - y0)) + bottom * (y - y0))
    return torch.stack(rows, dim=1).view(C, h, w)


def dense_energy(
    logits: Tensor, images: Tensor, label: Tensor, boxes, weight: float, sigma_rgb: float, sigma_xy: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The energy, and a second number whose gradient with respect to the logits is the release's."""
    B, C, H, W = logits.shape
    h, w = int(H * scale), int(W * scale)
    energy, for_gradient = 0, 0
    for b in range(B):
        top, bottom, left, right = boxes[b]
        probs = reduced_bilinearly(logits[b].softmax(0), h, w)
        small = torch.zeros(3, h, w, dtype=images.dtype)
        inside, gate = torch.zeros(h, w, dtype=logits.dtype), torch.zeros(h, w, dtype=logits.dtype)
        for i in range(h):
            for j in range(w):
                y, x = i * H // h, j * W // w
                small[:, i, j] = 255 * images[b, :, y, x]
                inside[i, j] = float(top <= y < bottom and left <= x < right)
                gate[i, j] = max(inside[i, j] - probs[:, i, j].max().item(), 0)
                if label[b, y, x] == IGNORE:
                    gate[i, j] = 1
        matrix = filter_matrix(bilateral_features(small, sigma_xy * scale, sigma_rgb))
        for c in range(C):
            segment = (probs[c] * inside).flatten()
            heard = (gate.flatten() * (matrix @ segment)).detach()
            energy = energy - weight / B * segment.detach().dot(heard)
            for_gradient = for_gradient - 2 * weight / B * segment.dot(heard)
    return energy, for_gradient


def mean_field(probs: Tensor, kernels: list[tuple[float, Tensor]], iterations: int) -> Tensor:
    """P C, kernels as full P P matrices. One pixel and one class at a time."""
    P = len(probs)
    belief = probs / probs.sum(1, keepdim=True)
    for _ in range(iterations):
        new = torch.empty_like(belief)
        for p in range(P):
            score = probs[p].log().clone()
            for weight, kernel in kernels:
                total = kernel.sum(dim=1)
                for q in range(P):
                    score = score + weight * kernel[p, q] / (total[p] * total[q]).sqrt() * belief[q]
            new[p] = torch.exp(score - score.max())
            new[p] = new[p] / new[p].sum()
        belief = new
    return belief
