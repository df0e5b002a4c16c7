"""Scanned pages with stains and folds, and the same pages clean. MLE-bench's split of Kaggle's.

The answers are one row a pixel: `<page>_<row>_<column>`, counted from 1, and its value from 0
(black) to 1 (white); 5,789,880 of them, written page by page. A page is in one half of the answers
as a whole, and both halves are about equally dirty.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from tqdm import tqdm

from tasks import TaskError, build, split
from tasks.raw import copy, expect, folder


def divide(names):
    """(train, test) of the pages' file names, sorted as text first: 144 -> 115 + 29."""
    names = sorted(names)
    train, test = split.random(len(names), 0.2)
    return [names[i] for i in train], [names[i] for i in test]


def read(path):
    """A page [rows, columns] uint8, 0 black to 255 white."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except OSError as error:
        raise TaskError(f"{path} is missing or damaged ({error})") from error


def dirt(dirty, clean):
    """Mean squared difference of the two pages in these files."""
    dirty, clean = read(dirty) / 255, read(clean) / 255
    if dirty.shape != clean.shape:
        raise TaskError(f"a page is {dirty.shape} pixels dirty and {clean.shape} clean")
    return np.mean((dirty - clean) ** 2)


def prepare(raw, public, private):
    with TemporaryDirectory(dir=public.parent) as scratch:
        dirty, clean = (folder(raw, name, Path(scratch)) for name in ("train", "train_cleaned"))
        names = [path.name for path in dirty.glob("*.png")]
        if sorted(names) != sorted(path.name for path in clean.glob("*.png")) or not names:
            raise TaskError(f"{dirty} and {clean} must hold the same pages")
        expect(len(names), 144, "pages")
        train, test = divide(names)
        shown = {"train": (dirty, train), "train_cleaned": (clean, train), "test": (dirty, test)}
        for target, (source, pages) in shown.items():
            (public / target).mkdir()
            copy(((source / name, public / target / name) for name in pages), f"{target} pages")
        test = sorted(test)
        parts = build.halves(np.array([dirt(dirty / name, clean / name) for name in test]))
        value = [repr(grey / 255) for grey in range(256)]
        with open(private / "answers.csv", "w") as file:
            file.write("id,part,group,value\n")
            for number, name in enumerate(tqdm(test, "answers", unit=" pages", disable=None)):
                page, end = name.removesuffix(".png"), f",{parts[number]},{number},"
                for row, line in enumerate(read(clean / name).tolist(), start=1):
                    head = f"{page}_{row}_"
                    for column, grey in enumerate(line, start=1):
                        file.write(f"{head}{column}{end}{value[grey]}\n")
