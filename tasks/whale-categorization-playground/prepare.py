"""Tails of whales: which whale is it? MLE-bench's split of Kaggle's labelled images, by whale."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tasks import split
from tasks.raw import copy, expect, folder, table

TEST_SHARE = 0.1


def divide(rows):
    """(train, test), both in the order of `rows`, a table with the columns Image and Id.

    9,850 images of 4,251 ids -> 7,240 + 2,610. A whale with two images or more has one in each
    part; the only image of a whale goes to the test part by chance; then what is left is split.
    The test part calls a whale that the training part does not have `new_whale`.
    """
    rng = np.random.default_rng(0)
    part = np.full(len(rows), "undecided", dtype=object)
    for places in rows.groupby("Id", sort=False).indices.values():  # whales as they first appear
        if len(places) >= 2:
            first, second = places[np.random.RandomState(0).permutation(len(places))[:2]]
            part[first], part[second] = "train", "test"
        else:
            part[places[0]] = "test" if rng.random() >= 1 - TEST_SHARE else "train"
    left = np.flatnonzero(part == "undecided")
    for name, chosen in zip(("train", "test"), split.random(len(left), TEST_SHARE)):
        part[left[chosen]] = name
    train, test = rows[part == "train"], rows[part == "test"]
    return train, test.assign(Id=test["Id"].where(test["Id"].isin(train["Id"]), "new_whale"))


def prepare(raw, public, private):
    labels = table(raw, "train.csv", ["Image", "Id"])[["Image", "Id"]]
    expect(len(labels), 9_850, "labelled images")
    train, test = divide(labels)
    with TemporaryDirectory(dir=public.parent) as scratch:
        images = folder(raw, "train", Path(scratch))
        for name, rows in (("train", train), ("test", test)):
            (public / name).mkdir()
            copy(((images / i, public / name / i) for i in rows["Image"]), f"{name} images")
    train.to_csv(public / "train.csv", index=False)
    test.assign(Id="new_whale").to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, test["Image"], {"Id": test["Id"]})
