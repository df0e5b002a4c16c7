"""Leaves of 99 species, as images and as 192 measured numbers. MLE-bench's split, not stratified.

About ten leaves of a species are labelled; the test part may have none of it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import tasks
from tasks import split
from tasks.raw import copy, expect, folder, table

FEATURES = [f"{kind}{i}" for kind in ("margin", "shape", "texture") for i in range(1, 65)]


def divide(rows):
    """(train, test) in random order: 990 -> 891 + 99."""
    train, test = split.random(len(rows), 0.1)
    return rows.iloc[train], rows.iloc[test]


def prepare(raw, public, private):
    leaves = table(raw, "train.csv", ["id", "species", *FEATURES])[["id", "species", *FEATURES]]
    expect(len(leaves), 990, "labelled leaves")
    species = list(tasks.load("leaf-classification").columns)
    if unknown := set(leaves["species"]) - set(species):
        raise tasks.TaskError(f"train.csv has a species that is none of the 99: {min(unknown)!r}")
    train, test = divide(leaves)
    (public / "images").mkdir()
    with TemporaryDirectory(dir=public.parent) as scratch:
        images = folder(raw, "images", Path(scratch))
        names = [f"{number}.jpg" for part in (train, test) for number in part["id"]]
        copy(((images / name, public / "images" / name) for name in names), "images")
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns="species").to_csv(public / "test.csv", index=False)
    sample = test[["id"]].assign(**dict.fromkeys(species, 1 / len(species)))
    sample.to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, test["id"], {"label": test["species"]})
