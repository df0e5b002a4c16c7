"""Papers and their citations: what is each one about? OGB's split by year of publication.

Train on papers up to 2017, validate on those of 2018, test on those since 2019; all of them are
nodes of the graph. OGB wants one unnamed column in the order of its test file; here a submission
has the node's number beside its class.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from tasks import TaskError, split
from tasks.raw import expect, folder

CLASSES = 40
PARTS = ("train", "valid", "test")


def read(path, dtype):
    """A csv.gz file without header as an array [rows, columns]."""
    if not path.is_file():
        raise TaskError(f"{path} is missing")
    try:
        return pd.read_csv(path, header=None, dtype=dtype).to_numpy()
    except (ValueError, EOFError, OSError) as error:  # pandas' own errors are ValueErrors
        raise TaskError(f"{path} is damaged") from error


def prepare(raw, public, private):
    with TemporaryDirectory(dir=public.parent) as scratch:
        found = folder(raw, "arxiv", Path(scratch))
        features = read(found / "raw/node-feat.csv.gz", np.float32)
        labels = read(found / "raw/node-label.csv.gz", np.int64)[:, 0]
        years = read(found / "raw/node_year.csv.gz", np.int16)[:, 0]
        edges = read(found / "raw/edge.csv.gz", np.int32)
        part = {p: read(found / f"split/time/{p}.csv.gz", np.int64)[:, 0] for p in PARTS}
    nodes, n = np.concatenate(list(part.values())), len(labels)
    fits = [
        len(features) == len(years) == n,
        edges.shape[1] == 2 and edges.min() >= 0 and edges.max() < n,
        labels.min() >= 0 and labels.max() < CLASSES,
        np.array_equal(np.sort(nodes), np.arange(n)),  # each node is in one part
    ]
    if not all(fits):
        raise TaskError(f"the files in {raw} do not fit together")
    expect(len(labels), 169_343, "nodes")
    np.save(public / "features.npy", features)
    np.save(public / "edges.npy", edges)
    np.save(public / "years.npy", years)
    for name in ("train", "valid"):
        known = pd.DataFrame({"node": part[name], "label": labels[part[name]]})
        known.to_csv(public / f"{name}.csv", index=False)
    sample = pd.DataFrame({"node": part["test"], "label": 0})
    sample[["node"]].to_csv(public / "test.csv", index=False)
    sample.to_csv(public / "sample_submission.csv", index=False)
    split.write_answers(private, part["test"], {"label": labels[part["test"]]})
