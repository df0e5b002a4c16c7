"""Radar images of ships and icebergs. MLE-bench's split of Kaggle's labelled images.

The images become arrays, which load a hundred times faster than the JSON text they come in.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from tasks import TaskError, split
from tasks.raw import expect, folder

SIDE = 75  # pixels


def records(path):
    """The objects of a JSON list, one by one: as Python numbers they would fill a gigabyte."""
    text, decoder = path.read_text(), json.JSONDecoder()
    place = text.find("[") + 1
    while (start := text.find("{", place)) != -1:
        record, place = decoder.raw_decode(text, start)
        yield record


def read(path):
    """(table, bands) of a JSON file.

    The table has id, inc_angle (degrees, NaN where the file has "na") and is_iceberg; the bands are
    [n, 2, 75, 75] float32 in dB.
    """
    rows, bands = [], []
    try:
        for record in records(path):
            images = np.array([record["band_1"], record["band_2"]], dtype=np.float32)
            bands.append(images.reshape(2, SIDE, SIDE))
            angle = np.nan if record["inc_angle"] == "na" else float(record["inc_angle"])
            rows.append((record["id"], angle, int(record["is_iceberg"])))
    except (KeyError, OSError, ValueError) as error:
        reason = f"{path} has no records of two bands of 75 x 75 pixels"
        raise TaskError(f"{reason} ({error!r})") from error
    if not rows:
        raise TaskError(f"{path} holds no records")
    return pd.DataFrame(rows, columns=["id", "inc_angle", "is_iceberg"]), np.stack(bands)


def divide(n):
    """Row numbers (train, test) in random order: 1,604 -> 1,283 + 321."""
    return split.random(n, 0.2)


def prepare(raw, public, private):
    with TemporaryDirectory(dir=public.parent) as scratch:
        inside = "data/processed/train.json"
        path = next((raw / name for name in ("train.json", inside) if (raw / name).is_file()), None)
        if path is None:  # the usual case: still in its archive
            path = folder(raw, "train.json", Path(scratch)) / inside
        rows, bands = read(path)
    expect(len(rows), 1_604, "labelled images")
    train, test = divide(len(rows))
    np.save(public / "train_bands.npy", bands[train])
    np.save(public / "test_bands.npy", bands[test])
    rows.iloc[train].to_csv(public / "train.csv", index=False)
    test = rows.iloc[test]
    test[["id", "inc_angle"]].to_csv(public / "test.csv", index=False)
    test[["id"]].assign(is_iceberg=0.5).to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, test["id"], {"is_iceberg": test["is_iceberg"]})
