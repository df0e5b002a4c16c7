"""What the prepare.py files of the paper suite share: the benchmarks' splits, and the hidden answers.

A prepared task shows scripts (`public`) the same rows as the benchmark, mostly under the same names. What differs:
- archives are unpacked to folders, and statoil's JSON, ogbn-arxiv's tables and cifar-10's batches are arrays;
- cifar-10 wants one label an image, not ten columns; ogbn-arxiv and insults have ids, which the benchmarks lack;
- tabular-playground's rows stay in file order; jigsaw's test comments are the scored ones alone;
- the tabular and text tasks and denoising have no sample submission: their descriptions say what is wanted.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from tasks import TaskError
from tasks.build import halves


def random(n: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test) of n rows: the split of MLE-bench, ceil(n share) rows to the test.

    These are the rows, in the order, that scikit-learn's train_test_split(test_size=share,
    random_state=seed) gives. Written out, so that it stays what it is.
    """
    order = np.random.RandomState(seed).permutation(n)
    test = math.ceil(n * share)
    return order[test:], order[:test]


def head(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test): the first int(n share) rows and the rest, as MLAgentBench does it."""
    return np.arange(int(n * share)), np.arange(int(n * share), n)


def numbers(column: pd.Series) -> np.ndarray:
    """Cells as float64; TaskError names the first that is no finite number."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise TaskError(f"column {column.name} has {column.iloc[bad[0]]!r}, not a number")
    return values


def write_answers(
    private: Path,
    ids: Iterable,
    answers: dict[str, Iterable],
    key: Iterable | None = None,
    group: Iterable | None = None,
) -> None:
    """Write private/answers.csv: id, part, perhaps group, then the columns of `answers`.

    The benchmarks score all rows together. The two halves, `reward` and `eval`, are ours: rows that
    are neighbours by `key` (anything that sorts; by default the first column) are parted by a coin,
    so that both halves have nearly the same answers. Rows of one `group` (the pixels of an image)
    are kept together, and so is their key: the one of the group's first row.
    """
    table = pd.DataFrame({"id": np.asarray(ids)} | {name: np.asarray(v) for name, v in answers.items()})
    key = np.asarray(table.iloc[:, 1] if key is None else key)
    if key.dtype == object:
        key = key.astype(str)
    if group is None:
        table.insert(1, "part", halves(key))
    else:
        number, _ = pd.factorize(np.asarray(group))
        first = np.unique(number, return_index=True)[1]
        table.insert(1, "part", halves(key[first])[number])
        table.insert(2, "group", np.asarray(group))
    table.to_csv(private / "answers.csv", index=False)
