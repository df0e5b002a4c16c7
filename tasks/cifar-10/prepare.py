"""CIFAR-10: small photographs of ten kinds of things. The official split, as in MLAgentBench.

Read from the binary version, which is plain bytes: the Python version is pickles, which are
programs. The benchmark asks for ten columns of class scores and takes each row's greatest; here a
submission names that class itself, in a column beside the image's number.
"""

import tarfile
import zlib

import numpy as np
import pandas as pd

from tasks import TaskError, split
from tasks.raw import expect

ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = ["test_batch.bin"]
RECORD = 1 + 3 * 32 * 32  # bytes: the class, then red, green and blue planes, row by row


def read(archive, names):
    """(images [n, 32, 32, 3] uint8, labels [n] uint8) of some batches."""
    images, labels = [], []
    for name in names:
        data = np.frombuffer(archive.extractfile(f"{FOLDER}/{name}").read(), dtype=np.uint8)
        if not len(data) or len(data) % RECORD:
            raise TaskError(f"{ARCHIVE}: {name} is not whole records of {RECORD} bytes")
        records = data.reshape(-1, RECORD)
        labels.append(records[:, 0])
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = np.concatenate(labels)
    if labels.max() > 9:
        raise TaskError(f"{ARCHIVE} has the class {labels.max()}: it is not CIFAR-10")
    return np.concatenate(images), labels


def prepare(raw, public, private):
    try:
        with tarfile.open(raw / ARCHIVE) as archive:
            train_images, train_labels = read(archive, TRAIN)
            images, labels = read(archive, TEST)
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError) as error:
        raise TaskError(f"{raw / ARCHIVE} is not the binary version, or damaged") from error
    expect(len(train_images), 50_000, "training images")
    expect(len(images), 10_000, "test images")
    np.save(public / "train_images.npy", train_images)
    np.save(public / "train_labels.npy", train_labels)
    np.save(public / "test_images.npy", images)
    sample = pd.DataFrame({"id": np.arange(len(labels)), "label": 0})
    sample.to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, sample["id"], {"label": labels})
