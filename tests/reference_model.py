"""Slow and obvious: the network and CAM from their equations, one image, head, class and kernel tap at a time."""

import math

import torch


def resize_matrix(n_in, n_out, kernel):
    """n_out x n_in weights of a 1-D resize: pixel centres at half-integers, taps beyond the border repeat the border
    pixel."""
    taps = {"bilinear": 1, "bicubic": 2}[kernel]
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        x = (i + 0.5) * n_in / n_out - 0.5
        if kernel == "bilinear":
            x = max(x, 0.0)
        for j in range(math.floor(x) - taps + 1, math.floor(x) + taps + 1):
            matrix[i, min(max(j, 0), n_in - 1)] += _weight(abs(x - j), kernel)
    return matrix


def _weight(t, kernel, a=-0.75):
    if kernel == "bilinear":
        return max(0.0, 1 - t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resize(maps, size, kernel):
    """... H W -> ... size"""
    rows, columns = resize_matrix(maps.shape[-2], size[0], kernel), resize_matrix(maps.shape[-1], size[1], kernel)
    return rows @ maps @ columns.T


def layer_norm(x, weight, bias, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def encode_one(w, image, *, patch, heads, depth, layer):
    """One 3 H W image, whole patches. `w`: state dict of the encoder. Returns class token, patch tokens, tokens of
    `layer`, grid."""
    h, wd = image.shape[1] // patch, image.shape[2] // patch
    tokens = [w["cls_token"][0, 0]]
    for i in range(h):
        for j in range(wd):
            piece = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append((w["patch_embed.proj.weight"] * piece).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    x = torch.stack(tokens)
    positions = w["pos_embed"][0]
    side = math.isqrt(len(positions) - 1)
    grid = positions[1:].reshape(side, side, -1).permute(2, 0, 1)
    grid = grid if (h, wd) == (side, side) else resize(grid, (h, wd), "bicubic")
    x = x + torch.cat([positions[:1], grid.permute(1, 2, 0).reshape(h * wd, -1)])
    for block in range(depth):
        b = {k.removeprefix(f"blocks.{block}."): v for k, v in w.items() if k.startswith(f"blocks.{block}.")}
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"])
        qkv = y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        width = x.shape[1]
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        parts = []
        for head in range(heads):
            s = slice(head * width // heads, (head + 1) * width // heads)
            weights = torch.exp(q[:, s] @ k[:, s].T / math.sqrt(width // heads))
            parts.append(weights / weights.sum(1, keepdim=True) @ v[:, s])
        x = x + torch.cat(parts, 1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"])
        x = x + gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        if block + 1 == layer:
            aux = x
    x = layer_norm(x, w["norm.weight"], w["norm.bias"])
    return x[0], x[1:], aux[1:], (h, wd)


def class_logits(tokens, weight):
    """N D, K D -> K"""
    highest = [tokens[:, d].max() for d in range(tokens.shape[1])]
    return torch.stack([sum(weight[k, d] * highest[d] for d in range(len(highest))) for k in range(len(weight))])


def pooled(tokens, k):
    """N D -> D: per channel the mean of the k largest values, found by crossing out the largest one k times."""
    result = []
    for d in range(tokens.shape[1]):
        left, chosen = list(tokens[:, d]), []
        for _ in range(k):
            best = max(range(len(left)), key=lambda n: left[n].item())
            chosen.append(left.pop(best))
        result.append(sum(chosen) / k)
    return torch.stack(result)


def scores_at_tokens(tokens, weight, k):
    """N D, K D -> K: per class the mean of the k largest values of its CAM."""
    cam = torch.stack([torch.stack([sum(w * x) for w in weight]) for x in tokens])
    return pooled(cam, k)


def project(w, token):
    """`w`: state dict of the projection head; D -> P."""
    x = gelu(w["mlp.0.weight"] @ token + w["mlp.0.bias"])
    x = gelu(w["mlp.2.weight"] @ x + w["mlp.2.bias"])
    x = w["mlp.4.weight"] @ x + w["mlp.4.bias"]
    x = x / torch.sqrt((x**2).sum())
    g, v = w["last_layer.weight_g"], w["last_layer.weight_v"]
    return torch.stack([g[p, 0] * (v[p] @ x) / torch.sqrt((v[p] ** 2).sum()) for p in range(len(v))])


def decode(w, tokens, grid):
    """`w`: state dict of the decoder; N D -> C h w."""
    x = tokens.T.reshape(-1, *grid)
    for name in ("conv6", "conv7"):
        x = torch.clamp(_dilated(x, w[f"{name}.weight"], 5), min=0)
    return torch.einsum("cdij,dhw->chw", w["conv8.weight"], x)


def _dilated(x, weight, dilation):
    h, w = x.shape[1:]
    rows = []
    for i in range(h):
        for j in range(w):
            total = torch.zeros(len(weight), dtype=x.dtype)
            for a in range(3):
                for b in range(3):
                    y, z = i + (a - 1) * dilation, j + (b - 1) * dilation
                    if 0 <= y < h and 0 <= z < w:
                        total = total + weight[:, :, a, b] @ x[:, y, z]
            rows.append(total)
    return torch.stack(rows, 1).reshape(-1, h, w)


def multi_scale_cam(encode, weight, images, scales, flip, sizes):
    """CAM by the book. `encode(image)`: 3 H W -> N D and grid. `sizes`: what an image is resized to, per scale."""
    cams = []
    for image in images:
        size = image.shape[1:]
        total = torch.zeros(len(weight), *size, dtype=image.dtype)
        for scale in scales:
            view = image if scale == 1 else resize(image, sizes[scale], "bilinear")
            maps = []
            for mirrored in (False, True) if flip else (False,):
                tokens, grid = encode(view.flip(-1) if mirrored else view)
                raw = torch.stack([(tokens @ weight[k]).reshape(grid) for k in range(len(weight))])
                raw = resize(raw, size, "bilinear")
                maps.append(raw.flip(-1) if mirrored else raw)
            highest = maps[0] if not flip else torch.maximum(*maps)
            total = total + torch.clamp(highest, min=0)
        for k in range(len(weight)):
            total[k] -= total[k].min()
            total[k] /= total[k].max() + 1e-5
        cams.append(total)
    return torch.stack(cams)
