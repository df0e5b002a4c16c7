"""Aerial photographs with and without a cactus. MLE-bench's split of Kaggle's labelled images."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tasks import split
from tasks.raw import copy, expect, folder, table


def divide(rows):
    """(train, test) in random order: 17,500 -> 14,175 + 3,325."""
    train, test = split.random(len(rows), 0.19)
    return rows.iloc[train], rows.iloc[test]


def prepare(raw, public, private):
    labels = table(raw, "train.csv", ["id", "has_cactus"])[["id", "has_cactus"]]
    expect(len(labels), 17_500, "labelled images")
    train, test = divide(labels)
    with TemporaryDirectory(dir=public.parent) as scratch:
        images = folder(raw, "train", Path(scratch))
        for part, rows in (("train", train), ("test", test)):
            (public / part).mkdir()
            copy(((images / name, public / part / name) for name in rows["id"]), f"{part} images")
    train.to_csv(public / "train.csv", index=False)
    test.assign(has_cactus=0.5).to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, test["id"], {"has_cactus": test["has_cactus"]})
