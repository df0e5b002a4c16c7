"""Four million invented patches of forest; only the labelled train.csv is used.

MLE-bench: a random tenth of the rows is the test. Rows are copied as text, line by line, so that no
more than the answers is ever held in memory; so they stay in file order, which the benchmark's files
do not: the sets of rows are the same.
"""

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tasks import TaskError, split
from tasks import raw as files

CLASSES = {str(label) for label in range(1, 8)}


def prepare(raw, public, private):
    with tempfile.TemporaryDirectory(dir=public.parent) as scratch:
        path = raw / "train.csv"
        if not path.is_file():
            files.unpack(raw / "train.csv.zip", Path(scratch))
            path = Path(scratch) / "train.csv"
        ids, answers = _split(path, public / "train.csv", public / "test.csv")
    split.write_answers(private, ids, {"Cover_Type": np.array(answers, dtype=np.int8)})


def _split(path, train_path, test_path):
    """Writes the two public tables; returns the ids and the classes of the test rows."""
    with _lines(path) as file:
        n = sum(1 for _ in tqdm(file, "count rows", unit=" rows", disable=None)) - 1
    if n < 1:
        raise TaskError(f"{path} has no rows")
    files.expect(n, 4_000_000, "rows")
    is_test = np.zeros(n, dtype=bool)
    is_test[split.random(n, 0.1)[1]] = True
    ids, answers = [], []
    with _lines(path) as file, open(train_path, "w") as train, open(test_path, "w") as test:
        header = file.readline().rstrip("\n")
        names = header.split(",")
        if names[0] != "Id" or names[-1] != "Cover_Type" or len(names) != 56:
            raise TaskError(f"{path} must have the columns Id, 54 features, Cover_Type")
        train.write(header + "\n")
        test.write(header.rpartition(",")[0] + "\n")
        for line, hidden in zip(tqdm(file, "split rows", total=n, unit=" rows", disable=None), is_test):
            line = line.rstrip("\n")
            features, _, answer = line.rpartition(",")
            if answer not in CLASSES or features.count(",") != 54:
                raise TaskError(f"{path} has a damaged row: {line[:60]!r}")
            if hidden:
                test.write(features + "\n")
                ids.append(int(features.partition(",")[0]))
                answers.append(int(answer))
            else:
                train.write(line + "\n")
    return ids, answers


def _lines(path):
    return open(path, encoding="ascii", errors="replace")
