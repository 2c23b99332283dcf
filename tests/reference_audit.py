"""Slow second versions of the audits of labels and crops: one pixel, one crop, one pair at a time."""

import math

NAN = float("nan")


def divided(a, b):
    return a / b if b else NAN


def quality(pixels, n_classes):
    """Of (truth, label) pairs, void and uncertain 255: every score of `LabelQuality` by sets of pixels."""
    pixels = [(t, l) for t, l in pixels if t != 255]
    decided = [(t, l) for t, l in pixels if l != 255]

    def mean_iou(among):
        ious = []
        for c in range(n_classes + 1):
            if any(t == c for t, _ in among):
                union = [1 for t, l in among if c in (t, l)]
                ious.append(sum(t == c == l for t, l in among) / len(union))
        return sum(ious) / len(ious) if ious else NAN

    said_background = [t for t, l in decided if l == 0]
    said_class = [t == l for t, l in decided if l > 0]
    uncertain = [t > 0 for t, l in pixels if l == 255]
    objects = [t == l for t, l in pixels if t > 0]
    background = [l == 0 for t, l in pixels if t == 0]
    return {
        "miou": mean_iou(decided),
        "strict_miou": mean_iou(pixels),
        "coverage": divided(len(decided), len(pixels)),
        "background_precision": divided(said_background.count(0), len(said_background)),
        "background_recall": divided(sum(background), len(background)),
        "foreground_precision": divided(sum(said_class), len(said_class)),
        "foreground_recall": divided(sum(objects), len(objects)),
        "uncertain_foreground": divided(sum(uncertain), len(uncertain)),
    }


def foreground_share(mask, top, left, size):
    """Of one crop: object pixels / pixels that are not void."""
    values = [int(mask[y, x]) for y in range(top, top + size) for x in range(left, left + size)]
    known = [v for v in values if v != 255]
    return divided(sum(v > 0 for v in known), len(known))


def crop_scores(ratios, shares, threshold, least):
    """Of nested lists, images of draws of crops."""
    draws = [
        [(r > threshold, s) for r, s in zip(rs, ss, strict=True)]
        for image_r, image_s in zip(ratios, shares, strict=True)
        for rs, ss in zip(image_r, image_s, strict=True)
    ]
    crops = [crop for draw in draws for crop in draw]
    known = [(flag, s > least) for flag, s in crops if not math.isnan(s)]
    positive, negative = [shown for flag, shown in known if flag], [shown for flag, shown in known if not flag]
    return {
        "positive": sum(flag for flag, _ in crops) / len(crops),
        "positive_right": divided(sum(positive), len(positive)),
        "negative_right": divided(negative.count(False), len(negative)),
        "shows_object": divided(sum(shown for _, shown in known), len(known)),
        "images_with_positive": sum(any(flag for flag, _ in draw) for draw in draws) / len(draws),
        "images_with_negative": sum(any(not flag for flag, _ in draw) for draw in draws) / len(draws),
    }


def separation(positive, negative):
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return divided(sum(wins), len(wins))
