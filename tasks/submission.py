"""From submission.csv and answers.csv to arrays: the only place that reads what scripts wrote.

Both files are read by the csv module in its strict mode, a chunk of rows at a time, so that millions
of rows (every pixel of a set of scanned pages) take seconds and no more memory than their numbers.
Rows are matched by id, in whatever order they come.
"""

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.metrics import METRICS

CHUNK = 512  # rows that exist as Python strings at one time; more would wake the garbage collector
CELL_BYTES = 32  # of a submission's cell: a float64 takes at most 24 characters, then quotes and a comma
SLACK_BYTES = 1 << 20
SUM_TOLERANCE = 1e-4  # rows of class probabilities, MLE-bench: 1e-6; here float32 in short text passes, too


class InvalidSubmission(Exception):
    """The submission cannot be scored; `reason` is one line that may be shown to an agent."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Answers:
    """The hidden answers of n rows, in the order of their file."""

    ids: np.ndarray  # [n] UTF-8 bytes
    truth: np.ndarray  # [n] or [n, k], as the metric wants them
    parts: dict  # reward | eval | all -> row numbers
    groups: np.ndarray | None  # [n], where rows have related errors (for the bootstrap)
    max_bytes: int  # that a submission may have


def read_answers(path: Path, metric: str, columns: tuple[str, ...], classes: tuple[str, ...]) -> Answers:
    """answers.csv: id, part (reward | eval), perhaps group, then the answers.

    These are one column per value, or `label` where a submission has a column per class.
    """
    takes = METRICS[metric].takes
    answer_columns = ("label",) if takes == "distribution" else columns
    ids, halves, groups, truth = [], [], [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader)
        for chunk in _chunks(reader, len(header)):
            table = dict(zip(header, zip(*chunk)))
            ids.append(_ids(table["id"]))
            halves.append(np.array(table["part"], dtype="U6") == "reward")
            cells = [table[c] for c in answer_columns]
            if takes == "distribution":
                numbers = {label: number for number, label in enumerate(columns)}
                if unknown := set(cells[0]) - set(numbers):
                    raise ValueError(f"{min(unknown)!r} is no class of the task")
                truth.append(np.array([numbers[label] for label in cells[0]]))
            elif takes in ("label", "ranking"):
                truth.append(np.array(cells[0]))
            else:
                truth.append(np.column_stack([np.array(c, dtype=float) for c in cells]))
            if "group" in table:
                groups.append(np.array(table["group"]))
    ids, truth, reward = map(np.concatenate, (ids, truth, halves))
    if truth.ndim == 2 and len(columns) == 1:
        truth = truth[:, 0]
    parts = {"reward": np.flatnonzero(reward), "eval": np.flatnonzero(~reward), "all": np.arange(len(ids))}
    cell = max(CELL_BYTES, 2 + max(map(len, classes), default=0))
    if takes == "ranking":  # five labels, and spaces
        cell = 5 * (max(map(len, truth)) + CELL_BYTES)
    max_bytes = SLACK_BYTES + len(ids) * (ids.itemsize + 4 + cell * len(columns))
    return Answers(ids, truth, parts, np.concatenate(groups) if groups else None, max_bytes)


def parse(
    submission: bytes,
    answers: Answers,
    metric: str,
    id_column: str,
    columns: tuple[str, ...],
    classes: tuple[str, ...],
) -> np.ndarray:
    """Predictions [n] or [n, k] in the order of the answers; InvalidSubmission unless it is a full answer.

    The bytes come from a program that may be wrong in every way, so nothing is guessed: ids are
    matched as text, and a missing or doubled row, an empty cell or an infinite number ends it.
    """
    if len(submission) > answers.max_bytes:
        raise InvalidSubmission(f"submission.csv is larger than {answers.max_bytes >> 20} MB")
    if b"\0" in submission:  # numpy drops them at the end of an id
        raise InvalidSubmission("submission.csv is not UTF-8 text: it has NUL bytes")
    takes, expected = METRICS[metric].takes, [id_column, *columns]
    ids, predictions, rows = [], [], 0
    try:
        # strict: a stray quote is an error, and a field of 128 KiB is one in any case
        text = io.TextIOWrapper(io.BytesIO(submission), encoding="utf-8-sig", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        if sorted(header) != sorted(expected):
            raise InvalidSubmission(
                f"submission.csv must have the columns {_short(','.join(expected))}, not {_short(','.join(header))}"
            )
        for chunk in _chunks(reader, len(header), len(answers.ids)):
            table = dict(zip(header, zip(*chunk)))
            rows += len(chunk)
            ids.append(_ids(table[id_column]))
            predictions.append(_values(takes, classes, [(name, table[name]) for name in columns]))
    except csv.Error as error:
        raise InvalidSubmission(f"submission.csv is not valid CSV: {error}") from None
    except UnicodeDecodeError:
        raise InvalidSubmission("submission.csv is not UTF-8 text") from None
    if rows != len(answers.ids):
        raise InvalidSubmission(f"submission.csv has {rows} rows, not {len(answers.ids)}")
    order = _order(np.concatenate(ids), answers.ids, id_column)
    values = np.concatenate(predictions)[order]
    _check_range(takes, values, classes, columns)
    return values[:, 0] if values.ndim == 2 and len(columns) == 1 else values


def _chunks(reader, width: int, limit: int | None = None) -> Iterator[list[list[str]]]:
    """Rows of `width` fields, at most CHUNK at a time and at most `limit` in all."""
    rows = 0
    while chunk := list(itertools.islice(reader, CHUNK)):
        if set(map(len, chunk)) != {width}:
            bad = next(i for i, row in enumerate(chunk) if len(row) != width)
            number, found = rows + bad + 1, len(chunk[bad])
            raise InvalidSubmission(f"row {number} of submission.csv has {found} fields, not {width}")
        rows += len(chunk)
        if limit is not None and rows > limit:
            raise InvalidSubmission(f"submission.csv has more than {limit} rows")
        yield chunk


def _ids(cells) -> np.ndarray:
    return np.array([cell.encode() for cell in cells])


def _order(given: np.ndarray, wanted: np.ndarray, id_column: str) -> np.ndarray | slice:
    """The rows of `given` in the order of `wanted`; both are ids, equally many."""
    if np.array_equal(given, wanted):  # as most scripts write them
        return slice(None)
    order = np.argsort(given)
    ordered = given[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise InvalidSubmission(f"submission.csv has the same {id_column} twice")
    place = np.minimum(np.searchsorted(ordered, wanted), len(given) - 1)
    lacking = np.flatnonzero(ordered[place] != wanted)
    if lacking.size:
        name = wanted[lacking[0]].decode()
        raise InvalidSubmission(f"submission.csv lacks the {id_column} {_short(name)}")
    return order[place]


def _values(takes: str, classes: tuple[str, ...], cells: list[tuple[str, tuple[str, ...]]]) -> np.ndarray:
    """One chunk's predictions: [rows] labels or lists of labels, or [rows, k] numbers."""
    name, first = cells[0]
    if takes == "ranking":
        ranked = np.empty(len(first), dtype=object)  # of lists, which may all be equally long
        ranked[:] = [cell.split() for cell in first]
        return ranked
    if takes == "label":  # "3.0" is the class "3", since pandas likes to write it so
        known = {f"{label}.0": label for label in classes} | {label: label for label in classes}
        try:
            return np.array([known[cell] for cell in first])
        except KeyError as error:
            raise InvalidSubmission(f"column {name} has {_short(error.args[0])!r}, which is no class") from None
    return np.column_stack([_numbers(name, column) for name, column in cells])


def _numbers(name: str, cells: tuple[str, ...]) -> np.ndarray:
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        bad = next(cell for cell in cells if not _is_number(cell))
        raise InvalidSubmission(f"column {name} has {_short(bad)!r}, not a number") from None
    if not np.isfinite(values).all():
        raise InvalidSubmission(f"column {name} has NaN or infinite values")
    return values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _check_range(takes: str, values: np.ndarray, classes: tuple[str, ...], columns: tuple[str, ...]) -> None:
    if takes in ("probability", "distribution") and (values.min() < 0 or values.max() > 1):
        raise InvalidSubmission("probabilities must lie between 0 and 1")
    if takes == "distribution":
        off = np.abs(values.sum(axis=1) - 1).max()
        if off > SUM_TOLERANCE:
            raise InvalidSubmission(f"each row's probabilities must sum to 1 (off by {off:.3g})")
    if takes == "above -1" and values.min() <= -1:
        raise InvalidSubmission("values must be greater than -1, since their log(1 + x) is scored")
    if takes == "whole":
        if (values != np.round(values)).any():
            raise InvalidSubmission("values must be whole numbers")
        if classes and not np.isin(values, np.array(classes, dtype=float)).all():
            raise InvalidSubmission(f"column {columns[0]} may have only {_short(', '.join(classes))}")
        if np.abs(values).max() > 1000:  # the metric lists every number between
            raise InvalidSubmission("values are far outside the range of the answers")


def _short(text: str, limit: int = 80) -> str:
    """At most `limit` printable characters: reasons are shown to an agent."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."
