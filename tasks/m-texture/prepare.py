"""Patches of photographs of brick, grass and gravel, turned, relit and made noisy.

Training patches come from the left half of each photograph and test patches from the right half,
so that no pixel is in both.
"""

import numpy as np
import pandas as pd
from PIL import Image

from tasks import build

TEXTURES = ("brick", "grass", "gravel")
SIDE = 24  # pixels
TRAIN, TEST = 250, 300  # patches per texture


def patch(photo, rng):
    """One patch [SIDE, SIDE] uint8 of a photograph [height, width]."""
    reach = SIDE  # half-width of the crop that is turned: more than SIDE / sqrt(2)
    row = rng.integers(reach, photo.shape[0] - reach)
    column = rng.integers(reach, photo.shape[1] - reach)
    crop = Image.fromarray(photo[row - reach : row + reach, column - reach : column + reach])
    crop = crop.rotate(float(rng.uniform(0, 360)), resample=Image.Resampling.BILINEAR)
    inner = slice(reach - SIDE // 2, reach + SIDE // 2)
    pixels = np.asarray(crop, dtype=float)[inner, inner]
    pixels = (pixels - pixels.mean()) * rng.uniform(0.6, 1.0) + rng.uniform(90, 160)
    pixels += rng.normal(0, 6, pixels.shape)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def prepare(raw, public, private):
    rng = np.random.default_rng(0)
    parts = {"train": ([], []), "test": ([], [])}
    for number, name in enumerate(TEXTURES):
        photo = np.asarray(Image.open(raw / "skimage/data" / f"{name}.png").convert("L"))
        middle = photo.shape[1] // 2
        for part, half, count in (
            ("train", photo[:, :middle], TRAIN),
            ("test", photo[:, middle:], TEST),
        ):
            parts[part][0].extend(patch(half, rng) for _ in range(count))
            parts[part][1].extend([number] * count)
    images, tables = [], []
    for part in ("train", "test"):
        order = rng.permutation(len(parts[part][1]))
        images.append(np.array(parts[part][0])[order])
        tables.append(pd.DataFrame({"texture": np.array(parts[part][1])[order]}))
    build.write(
        public,
        private,
        train=tables[0],
        test=tables[1],
        target="texture",
        metric="accuracy",
        images=tuple(images),
    )
