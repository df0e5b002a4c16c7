"""Tasks: load, prepare, score. Without torch, and without a word about agents.

A task is a folder `tasks/<name>/`: task.yaml (what it is), prepare.py (raw files -> public and
private files), train.py (the script that an agent improves) and ideas.yaml (edits of it).

    python -m tasks list
    python -m tasks prepare m-ames m-digits
    task = tasks.load("m-ames"); task.score(open("submission.csv", "rb").read(), part="eval")

Prepared data lie in DATA/<name>/: `public` is all that a script may see (as `data/`), `private`
holds the answers, `manifest.json` the fingerprint of both. The answers are split by id into a
`reward` half, which training may use, and an `eval` half, which only evaluation looks at; `all`
is the two together.
"""

import copy
import csv
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from tasks.metrics import METRICS

ROOT = Path(__file__).resolve().parent
DATA = Path(os.environ.get("ML_AGENT_DATA", ROOT.parent / "data"))
PARTS = ("reward", "eval", "all")
AXES = ("data", "model", "learning")  # the three axes of ideas, and the blocks of a micro script
BLOCKS_END = "submission"
MAX_SUBMISSION_BYTES = 64 * 2**20
SUM_TOLERANCE = 1e-4  # rows of class probabilities: float32 in text must pass, half a row must not
# What micro scripts import, for a sandbox that forks its runs from a server with warm imports.
PRELOAD = (
    "numpy",
    "pandas",
    "scipy.ndimage",
    "sklearn.calibration",
    "sklearn.compose",
    "sklearn.decomposition",
    "sklearn.ensemble",
    "sklearn.feature_extraction.text",
    "sklearn.linear_model",
    "sklearn.naive_bayes",
    "sklearn.neighbors",
    "sklearn.neural_network",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "sklearn.svm",
)


class TaskError(ValueError):
    """The task or its data are not in order; the message says what to do, in one line."""


class InvalidSubmission(Exception):
    """The submission cannot be scored; `reason` is one line that may be shown to an agent."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Idea:
    """An edit of the starter: replace the body of `block` by `code`."""

    axis: str  # data | model | learning
    text: str  # at most six words in micro tasks, unique within the task
    block: str  # the block of train.py that the code replaces
    code: str
    note: str | None  # measured alone: improves | hurts | neutral | crashes | times_out


@dataclass(frozen=True)
class Scale:
    """What turns a task's scores into gains (duck-typed by the reward functions)."""

    initial: float
    best: float
    noise: float
    lower_is_better: bool


@dataclass(frozen=True)
class Task:
    """One task, as its task.yaml says it. `initial_score` holds a number per part."""

    name: str
    suite: str  # micro | paper
    split: str  # train | heldout
    modality: str  # image | tabular | text | graph | series
    kind: str  # classification | regression | ordinal | denoising
    metric: str  # a key of metrics.METRICS
    description: str  # the research problem, for the agent
    brief: str  # the same in at most 15 words, for small models
    id_column: str
    columns: tuple[str, ...]  # of the submission, beside the id
    classes: tuple[str, ...]  # allowed labels, as text; empty when the metric takes numbers
    initial_score: dict  # part -> score of the unchanged train.py
    best_score: float  # on all answers
    best_source: str
    noise: float  # bootstrap standard error of the best score
    limits: dict  # keys of sandbox.Limits
    source: dict  # command: how to get the raw files; files: path in raw -> sha256 or None
    dir: Path

    @property
    def lower_is_better(self) -> bool:
        return METRICS[self.metric].lower_is_better

    # --- the script and the ideas ---

    def sources(self) -> dict[str, str]:
        """The files that an agent edits: name -> text."""
        return {"train.py": (self.dir / "train.py").read_text()}

    def helpers(self) -> dict[str, str]:
        """Files that stand beside the script and that an agent cannot change: name -> text."""
        helper = ROOT / "helper.py" if self.suite == "micro" else self.dir / "helper.py"
        return {"helper.py": helper.read_text()} if helper.exists() else {}

    def ideas(self) -> list[Idea]:
        """The task's own ideas, then those of the pools that its ideas.yaml names."""
        spec = _read_yaml(self.dir / "ideas.yaml")
        entries = list(spec.get("ideas") or [])
        for pool in spec.get("pools") or []:
            entries += _read_yaml(ROOT / "pools" / f"{pool}.yaml")
        without, notes = set(spec.get("without") or []), spec.get("notes") or {}
        unknown = (without | set(notes)) - {entry["text"] for entry in entries}
        if unknown:
            raise TaskError(f"{self.name}/ideas.yaml: no idea has the text {min(unknown)!r}")
        ideas = [
            Idea(e["axis"], e["text"], e.get("block", e["axis"]), e["code"], notes.get(e["text"]))
            for e in entries
            if e["text"] not in without
        ]
        texts = [idea.text for idea in ideas]
        twice = {text for text in texts if texts.count(text) > 1}
        if twice:
            raise TaskError(f"{self.name}/ideas.yaml: two ideas have the text {min(twice)!r}")
        return ideas

    # --- the data ---

    @property
    def public(self) -> Path:
        return DATA / self.name / "public"

    @property
    def private(self) -> Path:
        return DATA / self.name / "private"

    def manifest(self) -> dict | None:
        """What `prepare` wrote: recipe, fingerprint, files; None when there is nothing."""
        path = DATA / self.name / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def is_prepared(self) -> bool:
        """Whether data are there and were made by the prepare.py of today."""
        manifest = self.manifest()
        return manifest is not None and manifest["recipe"] == _recipe(self)

    def require_prepared(self) -> None:
        if not self.is_prepared():
            what = "are out of date" if self.manifest() else "are missing"
            raise TaskError(f"the data of {self.name} {what}; run: python -m tasks prepare {self.name}")

    # --- scores ---

    def score(self, submission: bytes, part: str = "all") -> float:
        """The metric of a submission on one part of the hidden answers.

        Raises InvalidSubmission when the file as a whole is not a complete, finite, well-formed
        answer to every id, whichever part is asked for.
        """
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
        truth, predictions, answers = aligned(self, submission)
        rows = answers.parts[part]
        with np.errstate(over="ignore"):  # of the square of 1e200, which is refused below
            score = METRICS[self.metric].function(truth[rows], predictions[rows])
        if not math.isfinite(score):
            raise InvalidSubmission(f"the {self.metric} of these values is not a finite number")
        return score

    def better(self, a: float | None, b: float | None) -> bool:
        """Whether score a beats score b; None (no score) is worse than any number."""
        if a is None or b is None:
            return a is not None and b is None
        return a < b if self.lower_is_better else a > b

    def gain(self, m: float, part: str = "all") -> float:
        """(m - initial) / (best - initial): 0 at the starter, 1 at the best known score."""
        scale = self.scale(part)
        return (m - scale.initial) / (scale.best - scale.initial)

    def delta(self, m: float, part: str = "all") -> float:
        """The paper's relative gain, beta (m - m_init) / m_init; beta = -1 where less is better."""
        beta, initial = -1 if self.lower_is_better else 1, self.scale(part).initial
        return beta * (m - initial) / initial

    def scale(self, part: str = "all") -> Scale:
        if self.best_score is None:
            raise TaskError(f"{self.name} is not measured; run: python -m tasks measure {self.name} --write")
        return Scale(self.initial_score[part], self.best_score, self.noise, self.lower_is_better)


# --- load ---


def names(suite: str | None = None, split: str | None = None) -> list[str]:
    """Names of the tasks, training tasks first; optionally of one suite or split only."""
    found = []
    for path in sorted(ROOT.glob("*/task.yaml")):
        spec = _read_yaml(path)
        if suite in (None, spec["suite"]) and split in (None, spec["split"]):
            found.append((spec["suite"], spec["split"] != "train", path.parent.name))
    return [name for _, _, name in sorted(found)]


def load(name: str) -> Task:
    """The task called `name`; TaskError names the tasks there are."""
    path = ROOT / name / "task.yaml"
    if "/" in name or not path.exists():
        raise TaskError(f"no task is called {name!r}; there are: {', '.join(names())}")
    spec = _read_yaml(path)
    submission = spec.pop("submission")
    spec |= {
        "id_column": submission["id"],
        "columns": tuple(str(c) for c in submission["columns"]),
        "classes": tuple(str(c) for c in submission.get("classes", ())),
        "dir": path.parent,
    }
    expected = {f.name for f in fields(Task)}
    wrong = expected.symmetric_difference(spec)
    if wrong:
        what = "unknown" if min(wrong) in spec else "missing"
        raise TaskError(f"{path}: {what} key {min(wrong)!r}")
    if spec["metric"] not in METRICS:
        raise TaskError(f"{path}: no metric is called {spec['metric']!r}")
    return Task(**spec)


def _read_yaml(path: Path):
    return copy.copy(_parse_yaml(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _parse_yaml(path: Path, mtime_ns: int):
    """Parsed once per version of the file: a training step loads its tasks hundreds of times."""
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


# --- prepare ---


def prepare(name: str, raw: Path | None = None) -> dict:
    """Make the task's public and private files from its raw ones; returns the manifest.

    `raw` is the folder of the raw files: by default DATA/packages for micro tasks and
    DATA/raw/<name> for the others. The work is done in a temporary folder that takes its place
    by a rename when it is complete, so that a killed run leaves nothing half done.
    """
    task = load(name)
    raw = Path(raw or (DATA / "packages" if task.suite == "micro" else DATA / "raw" / name))
    _check_raw(task, raw)
    DATA.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=DATA))
    try:
        (temporary / "public").mkdir()
        (temporary / "private").mkdir(mode=0o700)
        _module(task).prepare(raw, temporary / "public", temporary / "private")
        files = {
            str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        fingerprint = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        manifest = {"recipe": _recipe(task), "fingerprint": fingerprint, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        temporary.chmod(0o755)
        final = DATA / name
        if final.exists():  # a folder cannot be renamed over a full one: move the old one away
            old = Path(tempfile.mkdtemp(prefix=f".{name}.old.", dir=DATA))
            final.rename(old / name)
            temporary.rename(final)
            shutil.rmtree(old)
        else:
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _check_raw(task: Task, raw: Path) -> None:
    for file, digest in task.source["files"].items():
        path = raw / file
        if not path.exists():
            raise TaskError(f"{task.name} needs {path}; run: {task.source['command']}")
        if digest is not None and sha256(path) != digest:
            raise TaskError(
                f"{task.name}: {path} is not the file that the scores were measured on; "
                f"delete it and run: {task.source['command']}"
            )


def _module(task: Task):
    path = task.dir / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{task.name.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recipe(task: Task) -> str:
    """Changes whenever the code that makes the data changes."""
    shared = (ROOT / "build.py").read_bytes() if task.suite == "micro" else b""
    return hashlib.sha256((task.dir / "prepare.py").read_bytes() + shared).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- score ---


def aligned(task: Task, submission: bytes) -> tuple[np.ndarray, np.ndarray, SimpleNamespace]:
    """(truth, predictions, answers): both in the order of the answers; raises InvalidSubmission.

    Shapes [n] or [n, k], as the metric wants them. `answers` also has `parts` (part -> row
    numbers) and `groups` ([n] or None: rows whose errors are related, for the bootstrap).
    """
    task.require_prepared()
    path = task.private / "answers.csv"
    answers = _answers(path, path.stat().st_mtime_ns, task.metric, task.columns, task.classes)
    return answers.truth, _parse(task, submission, answers.ids), answers


@functools.lru_cache(maxsize=64)
def _answers(path: Path, mtime_ns: int, metric: str, columns: tuple, classes: tuple):
    """The answers file, parsed once per version of it: `mtime_ns` is part of the cache's key."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    table = dict(zip(header, zip(*rows)))
    takes = METRICS[metric].takes
    if takes == "distribution":  # one column of labels against one column per class
        truth = np.array([columns.index(label) for label in table["label"]])
    elif takes in ("label", "ranking"):
        truth = np.array(table[columns[0]])
    else:
        truth = np.column_stack([np.array(table[c], dtype=float) for c in columns])
        truth = truth[:, 0] if len(columns) == 1 else truth
    half = np.array(table["part"])
    parts = {part: np.flatnonzero(half == part) for part in ("reward", "eval")}
    parts["all"] = np.arange(len(half))
    groups = np.array(table["group"]) if "group" in table else None
    return SimpleNamespace(ids=table["id"], truth=truth, parts=parts, groups=groups)


def _parse(task: Task, submission: bytes, ids: tuple[str, ...]) -> np.ndarray:
    """Predictions in the order of `ids`; raises InvalidSubmission for anything but a full answer.

    The bytes come from a program that may be wrong in every way, so nothing is guessed: ids are
    matched as text, and a missing or doubled row, an empty cell or an infinite number ends it.
    """
    if len(submission) > MAX_SUBMISSION_BYTES:
        raise InvalidSubmission(f"submission.csv is larger than {MAX_SUBMISSION_BYTES >> 20} MB")
    try:
        text = submission.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidSubmission("submission.csv is not UTF-8 text") from None
    expected = [task.id_column, *task.columns]
    rows = []
    try:  # strict: a stray quote is an error, and a field of 128 KiB is one in any case
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        if sorted(header) != sorted(expected):
            raise InvalidSubmission(
                f"submission.csv must have the columns {_short(','.join(expected))}, not {_short(','.join(header))}"
            )
        for row in reader:
            if len(row) != len(header):
                raise InvalidSubmission(
                    f"line {reader.line_num} of submission.csv has {len(row)} fields, not {len(header)}"
                )
            rows.append(row)
            if len(rows) > len(ids):
                raise InvalidSubmission(f"submission.csv has more than {len(ids)} rows")
    except csv.Error as error:
        raise InvalidSubmission(f"submission.csv is not valid CSV: {error}") from None
    if len(rows) != len(ids):
        raise InvalidSubmission(f"submission.csv has {len(rows)} rows, not {len(ids)}")
    column = dict(zip(header, zip(*rows)))
    position = {id_: i for i, id_ in enumerate(column[task.id_column])}
    if len(position) != len(ids):
        raise InvalidSubmission(f"submission.csv has the same {task.id_column} twice")
    try:
        order = np.array([position[id_] for id_ in ids])
    except KeyError as error:
        raise InvalidSubmission(f"submission.csv lacks the {task.id_column} {_short(error.args[0])}") from None
    takes = METRICS[task.metric].takes
    if takes == "ranking":
        ranked = np.empty(len(ids), dtype=object)  # of lists, which may all be equally long
        ranked[:] = [cell.split() for cell in column[task.columns[0]]]
        return ranked[order]
    if takes == "label":
        return np.array([_label(task, cell) for cell in column[task.columns[0]]])[order]
    values = np.column_stack([_numbers(name, column[name]) for name in task.columns])[order]
    _check_range(takes, values)
    return values[:, 0] if len(task.columns) == 1 else values


def _numbers(name: str, cells) -> np.ndarray:
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


def _label(task: Task, cell: str) -> str:
    """The class that a cell names; "3.0" is the class "3", since pandas likes to write it so."""
    label = cell[:-2] if cell.endswith(".0") and cell not in task.classes else cell
    if label not in task.classes:
        raise InvalidSubmission(f"column {task.columns[0]} has {_short(cell)!r}, which is no class")
    return label


def _check_range(takes: str, values: np.ndarray) -> None:
    if takes in ("probability", "distribution") and (values.min() < 0 or values.max() > 1):
        raise InvalidSubmission("probabilities must lie between 0 and 1")
    if takes == "distribution":
        off = np.abs(values.sum(axis=1) - 1).max()
        if off > SUM_TOLERANCE:
            raise InvalidSubmission(f"each row's probabilities must sum to 1 (off by {off:.3g})")
    if takes == "above -1" and values.min() <= -1:
        raise InvalidSubmission("values must be greater than -1, since their log(1 + x) is scored")
    if takes == "whole" and (values != np.round(values)).any():
        raise InvalidSubmission("values must be whole numbers")
    if takes == "whole" and np.abs(values).max() > 1000:  # the metric lists every number between
        raise InvalidSubmission("values are far outside the range of the answers")


def _short(text: str, limit: int = 80) -> str:
    """At most `limit` printable characters: reasons are shown to an agent."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


# --- blocks of a micro script ---


def block_lines(script: str, block: str) -> tuple[int, int]:
    """First and last line (1-based) of a block's body; last = first - 1 when it is empty.

    A block starts after its comment line (`# data`, `# model`, `# learning`) and ends before the
    next such line or `# submission`. Raises ValueError when the script has no such block, or the
    comment twice.

    >>> block_lines("# data\\nX = 1\\n# model\\n# submission\\n", "data")
    (2, 2)
    """
    lines = [line.rstrip() for line in script.splitlines()]
    found = lines.count(f"# {block}")
    if block not in AXES or found != 1:
        raise ValueError(f"the script must have exactly one line '# {block}', not {found}")
    heads = {f"# {name}" for name in (*AXES, BLOCKS_END)}
    first = lines.index(f"# {block}") + 1  # 0-based index of the body's first line
    last = next((i for i in range(first, len(lines)) if lines[i] in heads), None)
    if last is None:
        raise ValueError(f"the block '# {block}' has no end: no '# {BLOCKS_END}' line follows")
    return first + 1, last


def apply_block(script: str, block: str, code: str) -> str:
    """The script with the block's body replaced by `code`; ValueError as in `block_lines`."""
    first, last = block_lines(script, block)
    lines = script.splitlines()
    return "\n".join(lines[: first - 1] + code.strip("\n").splitlines() + lines[last:]) + "\n"
