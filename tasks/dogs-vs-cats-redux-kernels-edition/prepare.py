"""Photographs of cats and dogs. MLE-bench's split of Kaggle's labelled images.

Files are renumbered within cats, dogs and test images, in the (random) order of the split.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from tasks import TaskError, split
from tasks.raw import copy, expect, folder


def divide(names):
    """(train, test) of the file names, sorted as text first: 25,000 -> 22,500 + 2,500."""
    names = sorted(names)
    train, test = split.random(len(names), 0.1)
    return [names[i] for i in train], [names[i] for i in test]


def renumber(names):
    """New names of the training images: cat.0.jpg, cat.1.jpg, ... and dog.0.jpg, dog.1.jpg, ..."""
    counts = {"cat": 0, "dog": 0}
    new = []
    for name in names:
        animal = name[:3]
        new.append(f"{animal}.{counts[animal]}.jpg")
        counts[animal] += 1
    return new


def prepare(raw, public, private):
    with TemporaryDirectory(dir=public.parent) as scratch:
        images = folder(raw, "train", Path(scratch))
        names = [path.name for path in images.glob("*.jpg")]
        strange = [name for name in names if not re.fullmatch(r"(cat|dog)\.\d+\.jpg", name)]
        if strange or not names:
            what = strange[0] if strange else "nothing"
            raise TaskError(f"{images} must hold cat.N.jpg and dog.N.jpg, not {what}")
        expect(len(names), 25_000, "labelled images")
        train, test = divide(names)
        (public / "train").mkdir()
        pairs = zip(train, renumber(train))
        copy(((images / old, public / "train" / new) for old, new in pairs), "train images")
        (public / "test").mkdir()
        pairs = enumerate(test, start=1)
        copy(((images / old, public / "test" / f"{new}.jpg") for new, old in pairs), "test images")
    ids = range(1, len(test) + 1)
    pd.DataFrame({"id": ids, "label": 0.5}).to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, ids, {"label": [int(name[:3] == "dog") for name in test]})
