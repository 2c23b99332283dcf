"""Warm start: the classifiers are fitted to frozen tokens before anything is bent.

A classifier that begins at random sends random gradients into a pretrained encoder and distorts what it knows; fitted
first, it does not (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022). The tokens of all training
images are computed once, pooled where the pooling is one of channels, and both classifiers are fitted to them in
seconds.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.data import evaluation_items, to_unit
from toco_core.data.loader import in_batches
from toco_core.heads import class_scores, pooled
from toco_core.losses import classification_loss
from toco_core.model import ToCo

BATCH, RATE, DECAY = 64, 1e-2, 1e-2
ENCODED_AT_ONCE = 16


def warm_start(
    model: ToCo,
    source,
    config: TrainConfig,
    *,
    seed: int | None = None,
    autocast: Callable = contextlib.nullcontext,
    progress: bool = True,
) -> None:
    """Fit both classifiers to the frozen tokens of a split, `config.schedule.warm_start_steps` steps of 64 images.

    Every image is seen once, at `crop_size` square. AdamW at a rate that falls linearly from 0.01 to 0; what is drawn
    follows from `seed`, by default the config's.
    """
    final, aux = pooled_tokens(model, source, config, autocast=autocast, progress=progress)
    labels = torch.as_tensor(np.asarray(source.image_labels), dtype=torch.float32, device=final.device)
    fitted = ((final, model.classifier), (aux, model.aux_classifier))
    for (tokens, classifier), pooling in zip(fitted, model.config.poolings, strict=True):
        generator = torch.Generator().manual_seed(config.seed if seed is None else seed)
        options = {"steps": config.schedule.warm_start_steps, "pooling": pooling, "generator": generator}
        fit_classifier(classifier, tokens, labels, **options)


@torch.no_grad()
def pooled_tokens(
    model: ToCo, source, config: TrainConfig, *, autocast: Callable = contextlib.nullcontext, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """What the final and the auxiliary classifier read of every image of a split: two n D, float32; with the pooling
    `cam_topk`, which has no such vector, all tokens, n N D in bfloat16."""
    found, device = ([], []), model.classifier.weight.device
    items = evaluation_items(source, size=config.data.crop_size, workers=config.data.workers, masks=False)
    bar = tqdm(items, total=len(source), desc="warm start", unit="image", disable=not progress, leave=False)
    with model.evaluating():
        for batch in in_batches(bar, ENCODED_AT_ONCE):
            with autocast():
                tokens = model.encode(model.normalise(to_unit(torch.cat([item.image for item in batch]).to(device))))
            read = (tokens.patch_tokens, tokens.aux_patch_tokens)
            for kept, patches, pooling in zip(found, read, model.config.poolings, strict=True):
                kept.append(classifier_input(patches.float(), pooling))
    return torch.cat(found[0]), torch.cat(found[1])


def classifier_input(patch_tokens: Float[Tensor, "B N D"], pooling: str) -> Tensor:
    """What a classifier is fitted to: B D pooled tokens; with `cam_topk` all of them, B N D in bfloat16."""
    return patch_tokens.bfloat16() if pooling == "cam_topk" else pooled(patch_tokens, pooling)


def fit_classifier(
    classifier: nn.Linear, tokens: Tensor, labels: Tensor, *, steps: int, generator: torch.Generator, pooling: str = ""
) -> None:
    """Fit a linear layer to pooled tokens (n D), or with the pooling `cam_topk` to tokens (n N D), and image-level
    labels (n K) by the multi-label loss."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        pick = torch.randint(len(tokens), (BATCH,), generator=generator).to(tokens.device)
        optimizer.zero_grad(set_to_none=True)
        picked = tokens[pick].float()
        logits = class_scores(picked, classifier, pooling) if picked.ndim == 3 else classifier(picked)
        classification_loss(logits, labels[pick]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
