"""Photographs of apple leaves, healthy or ill. MLE-bench's split of Kaggle's labelled images.

Images are renamed Train_i and Test_i in the (random) order of the split, in one folder.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from tasks import split
from tasks.raw import copy, expect, folder, table

COLUMNS = ["image_id", "healthy", "multiple_diseases", "rust", "scab"]


def divide(rows):
    """(train, test) in random order: 1,821 -> 1,638 + 183."""
    train, test = split.random(len(rows), 0.1)
    return rows.iloc[train], rows.iloc[test]


def prepare(raw, public, private):
    labels = table(raw, "train.csv", COLUMNS)[COLUMNS]
    expect(len(labels), 1_821, "labelled images")
    train, test = divide(labels)
    old = [*train["image_id"], *test["image_id"]]
    train = train.assign(image_id=[f"Train_{i}" for i in range(len(train))])
    test = test.assign(image_id=[f"Test_{i}" for i in range(len(test))])
    new = [*train["image_id"], *test["image_id"]]
    (public / "images").mkdir()
    with TemporaryDirectory(dir=public.parent) as scratch:
        found = folder(raw, "images", Path(scratch))
        pairs = ((found / f"{a}.jpg", public / "images" / f"{b}.jpg") for a, b in zip(old, new))
        copy(pairs, "images")
    train.to_csv(public / "train.csv", index=False)
    test[["image_id"]].to_csv(public / "test.csv", index=False)
    sample = test.assign(**dict.fromkeys(COLUMNS[1:], 0.25))
    sample.to_csv(public / "sample_submission.csv", index=False)
    illness = test[COLUMNS[1:]]
    key = illness.to_numpy().argmax(axis=1)  # exactly one of the four is 1
    split.write_answers(private, test["image_id"], dict(illness), key=key)
