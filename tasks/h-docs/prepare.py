"""Pages of text, clean and dirtied: the text is of real reviews, the dirt of real photographs.

Pages are drawn with Pillow's bundled font, then shaded and stained by crops of photographs,
blurred and made noisy. Test pages also meet photographs that no training page has.
"""

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tasks import build

HEIGHT, WIDTH = 32, 96  # pixels of a page
TRAIN_PAGES, TEST_PAGES = 16, 16
SIZES = (9, 10, 11, 12)  # of the font, in pixels
PHOTOS = {"train": ("gravel", "grass", "brick"), "test": ("gravel", "grass", "coffee", "moon")}


def clean_page(text, size):
    """A page [HEIGHT, WIDTH] uint8: black letters on white."""
    page = Image.new("L", (WIDTH, HEIGHT), 255)
    font, draw = ImageFont.load_default(size), ImageDraw.Draw(page)
    lines = [""]
    for word in text.split():
        wider = f"{lines[-1]} {word}".strip()
        if draw.textlength(wider, font=font) <= WIDTH - 8:
            lines[-1] = wider
        else:
            lines.append(word)
    for number, line in enumerate(lines):
        draw.text((4, 2 + number * (size + 2)), line, fill=0, font=font)
    return np.asarray(page)


def dirty_page(page, photo, rng):
    """The page as a bad scan [HEIGHT, WIDTH] uint8."""
    row = rng.integers(0, photo.shape[0] - HEIGHT // 2)
    column = rng.integers(0, photo.shape[1] - WIDTH // 2)
    crop = Image.fromarray(photo[row : row + HEIGHT // 2, column : column + WIDTH // 2])
    stain = np.asarray(crop.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)) / 255
    stain = (stain - stain.min()) / (np.ptp(stain) + 1e-6)
    shade = np.linspace(rng.uniform(0.45, 1), rng.uniform(0.45, 1), WIDTH)
    paper = (1 - rng.uniform(0.15, 0.35) * (1 - stain)) * shade
    ink = rng.uniform(0.05, 0.3) * shade
    blurred = Image.fromarray(page).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.6))))
    letters = np.asarray(blurred) / 255
    scan = paper * letters + ink * (1 - letters) + rng.normal(0, 0.02, page.shape)
    return np.round(np.clip(scan, 0, 1) * 255).astype(np.uint8)


def prepare(raw, public, private):
    rng = np.random.default_rng(0)
    texts = build.read_table(raw, "modeldata/tate_text")["title"].str.encode("ascii", "ignore")
    texts = texts.str.decode("ascii").sample(400, random_state=0).tolist()
    tables, images = {}, {}
    for part, count in (("train", TRAIN_PAGES), ("test", TEST_PAGES)):
        clean, dirty = [], []
        for number in range(count):
            text = " ".join(texts.pop() for _ in range(8))
            name = PHOTOS[part][number % len(PHOTOS[part])]
            photo = Image.open(raw / "skimage/data" / f"{name}.png").convert("L")
            clean.append(clean_page(text, SIZES[number % len(SIZES)]))
            dirty.append(dirty_page(clean[-1], np.asarray(photo), rng))
        tables[part] = pd.DataFrame({"white": (np.array(clean).ravel() / 255).round(3)})
        images[part] = np.array(dirty)
    clean = tables["test"]["white"].to_numpy().reshape(TEST_PAGES, -1)
    dirt = ((images["test"].reshape(TEST_PAGES, -1) / 255 - clean) ** 2).mean(axis=1)
    page = np.repeat(np.arange(TEST_PAGES), HEIGHT * WIDTH)
    build.write(
        public,
        private,
        train=tables["train"],
        test=tables["test"],
        target="white",
        metric="rmse",
        images=(images["train"], images["test"]),
        part=build.halves(dirt)[page],  # whole pages, equally dirty in both halves
        group=page,
        ordered=True,
        rows=len(tables["train"]),
    )
