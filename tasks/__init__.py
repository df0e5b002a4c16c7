"""Tasks: load, prepare, score. Without torch, and without a word about agents.

A task is a folder `tasks/<name>/`: task.yaml (what it is), prepare.py (raw files -> public and
private files), train.py (the script that an agent improves) and ideas.yaml (edits of it).
The micro suite runs on data of Python packages; the paper suite on the paper's own data, which its
user downloads. Where benchmarks define a paper task differently, its folder holds a second file
task@<variant>.yaml with the keys that differ, and `<name>@<variant>` is a task of its own.

    python -m tasks list
    python -m tasks prepare m-ames m-digits
    python -m tasks prepare spaceship-titanic --raw spaceship-titanic.zip
    task = tasks.load("m-ames"); task.score(open("submission.csv", "rb").read(), part="eval")

Prepared data lie in DATA/<name>/: `public` is all that a script may see (as `data/`), `private`
holds the answers, `manifest.json` the fingerprint of both. The answers are split by id into a
`reward` half, which training may use, and an `eval` half, which only evaluation looks at; `all`
is the two together.
"""

import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import yaml

from reward import Scale
from tasks.metrics import METRICS
from tasks.submission import Answers, InvalidSubmission, parse, read_answers

ROOT = Path(__file__).resolve().parent
DATA = Path(os.environ.get("ML_AGENT_DATA", ROOT.parent / "data"))
PARTS = ("reward", "eval", "all")
AXES = ("data", "model", "learning")  # the three axes of ideas, and the blocks of a micro script
BLOCKS_END = "submission"
# Keys of task.yaml that may be left out, and what they are then.
DEFAULTS = {"initial_source": "measured", "requires": {}, "starter": "train.py"}
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


@dataclass(frozen=True)
class Idea:
    """Something to try. In micro tasks it is an edit, too: replace the body of `block` by `code`."""

    axis: str  # data | model | learning
    text: str  # at most six words in micro tasks, unique within the task
    block: str | None  # the block of train.py that the code replaces; None: a text without code
    code: str | None
    note: str | None  # measured alone: improves | hurts | neutral | crashes | times_out


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
    initial_score: dict | None  # part -> score of the unchanged starter; None: not known yet
    initial_source: str  # "measured", or where else the initial score is from
    best_score: float  # on all answers
    best_source: str
    noise: float  # bootstrap standard error of the best score on all answers
    limits: dict  # keys of sandbox.Limits
    source: dict  # command: how to get the raw files; files: path in raw -> sha256 or None; unpacked: see _raw_file
    requires: dict  # import name -> pip name of packages that this task alone needs
    starter: str  # the file that an agent gets as train.py
    dir: Path

    @property
    def lower_is_better(self) -> bool:
        return METRICS[self.metric].lower_is_better

    # --- the script and the ideas ---

    def sources(self) -> dict[str, str]:
        """The files that an agent edits: name -> text."""
        return {"train.py": (self.dir / self.starter).read_text()}

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
        ideas = []
        for entry in entries:
            axis, text, code = entry["axis"], entry["text"], entry.get("code")
            block = None if code is None else entry.get("block", axis)
            if text not in without:
                ideas.append(Idea(axis, text, block, code, notes.get(text)))
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
        return _parse_manifest(path, path.stat().st_mtime_ns) if path.exists() else None

    def download(self) -> str:
        """The command that gets the raw files to where `prepare` looks for them."""
        return self.source["command"].replace("data/raw", os.path.relpath(DATA / "raw"))

    def is_prepared(self) -> bool:
        """Whether data are there and were made by the prepare.py of today."""
        manifest = self.manifest()
        return manifest is not None and manifest["recipe"] == _recipe(self)

    def require_prepared(self) -> None:
        """TaskError unless an agent can work on the task: data, packages, and the score of its own starter.

        A score from elsewhere, another script's, would make every gain and every reward wrong.
        """
        self.require_data()
        self.require_packages()
        self.scale()
        if self.initial_source != "measured":
            raise TaskError(
                f"{self.name}: the initial score is another script's ({self.initial_source}); "
                f"run: python -m tasks measure {self.name} --write"
            )

    def require_data(self) -> None:
        if not self.is_prepared():
            what = "are out of date" if self.manifest() else "are missing"
            raise TaskError(f"the data of {self.name} {what}; run: python -m tasks prepare {self.name}")

    def require_packages(self) -> None:
        absent = [pip for module, pip in self.requires.items() if importlib.util.find_spec(module) is None]
        if absent:
            raise TaskError(f"{self.name} needs more packages; run: pip install {' '.join(absent)}")

    # --- scores ---

    def score(self, submission: bytes, part: str = "all") -> float:
        """The metric of a submission on one part of the hidden answers.

        Raises InvalidSubmission when the file as a whole is not a complete, finite, well-formed
        answer to every id, whichever part is asked for.
        """
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
        return self.scores(submission, (part,))[part]

    def scores(self, submission: bytes, parts: tuple[str, ...] = PARTS) -> dict[str, float]:
        """`score` on several parts, for one reading of the submission."""
        truth, predictions, answers = self.aligned(submission)
        found = {}
        for part in parts:
            rows = answers.parts[part]
            with np.errstate(over="ignore"):  # of the square of 1e200, which is refused below
                found[part] = METRICS[self.metric].function(truth[rows], predictions[rows])
            if not math.isfinite(found[part]):
                raise InvalidSubmission(f"the {self.metric} of these values is not a finite number")
        return found

    def aligned(self, submission: bytes) -> tuple[np.ndarray, np.ndarray, Answers]:
        """(truth, predictions, answers): both in the order of the answers; raises InvalidSubmission."""
        answers = self._answers()
        args = self.metric, self.id_column, self.columns, self.classes
        return answers.truth, parse(submission, answers, *args), answers

    def max_submission_bytes(self) -> int:
        """A bound on submission.csv that no full answer exceeds."""
        return self._answers().max_bytes

    def _answers(self) -> Answers:
        self.require_data()
        path = self.private / "answers.csv"
        return _read_answers(path, path.stat().st_mtime_ns, self.metric, self.columns, self.classes)

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
        if self.initial_score is None or self.best_score is None:
            raise TaskError(f"{self.name} is not measured; run: python -m tasks measure {self.name} --write")
        initial = self.initial_score[part]
        if not self.better(self.best_score, initial):
            raise TaskError(f"{self.name}: the best score must beat the initial one ({initial}); correct its task.yaml")
        noise = self.noise * (1 if part == "all" else math.sqrt(2))  # half the answers
        return Scale(initial, self.best_score, noise, self.lower_is_better)


# --- load ---


def names(suite: str | None = None, split: str | None = None) -> list[str]:
    """Names of the tasks, training tasks first; optionally of one suite or split only."""
    found = []
    for path in sorted(ROOT.glob("*/task.yaml")):
        spec = _read_yaml(path)
        if suite in (None, spec["suite"]) and split in (None, spec["split"]):
            found.append((spec["suite"], spec["split"] != "train", path.parent.name))
    return [name for _, _, name in sorted(found)]


def variants(name: str) -> list[str]:
    """Names of the other definitions of a task, `name@variant`."""
    return [f"{name}@{path.stem.split('@')[1]}" for path in sorted((ROOT / name).glob("task@*.yaml"))]


def load(name: str) -> Task:
    """The task called `name`, or `name@variant`; TaskError names the tasks there are."""
    path = spec_path(name)
    if "/" in name or not path.exists():
        there = [known for task in names() for known in (task, *variants(task))]
        raise TaskError(f"no task is called {name!r}; there are: {', '.join(there)}")
    spec = DEFAULTS | _read_yaml(path.parent / "task.yaml")
    if path.name != "task.yaml":
        spec |= _read_yaml(path) | {"name": name}
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


def spec_path(name: str) -> Path:
    """The file that holds the task's own keys, which `measure` may change."""
    folder, at, variant = name.partition("@")
    return ROOT / folder / f"task{at}{variant}.yaml"


def _read_yaml(path: Path):
    return copy.copy(_parse_yaml(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _parse_yaml(path: Path, mtime_ns: int):
    """Parsed once per version of the file: a training step loads its tasks hundreds of times."""
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=64)
def _parse_manifest(path: Path, mtime_ns: int) -> dict:
    """Parsed once per version of the file, which lists every image of some tasks."""
    return json.loads(path.read_text())


# --- prepare ---


def prepare(name: str, raw: Path | None = None) -> dict:
    """Make the task's public and private files from its raw ones; returns the manifest.

    `raw` is a folder with the raw files, or the archive that the download command leaves: by default
    DATA/packages for micro tasks, and for the others DATA/raw/<name> or DATA/raw/<name>.zip. The work
    is done in a temporary folder that takes its place by a rename when it is complete, so that a
    killed run leaves nothing half done.
    """
    task = load(name)
    task.require_packages()
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=DATA) as folder:
        new = Path(folder) / "new"
        (new / "public").mkdir(parents=True)
        (new / "private").mkdir(mode=0o700)
        try:
            raw = _raw_folder(task, raw and Path(raw), Path(folder) / "raw")
            _prepare_function(task)(raw, new / "public", new / "private")
            _check_answers(task, new / "private" / "answers.csv")
        except TaskError as error:  # of the raw files, whatever it is
            raise TaskError(f"{name}: {error}; run: {task.download()}") from error
        files = {str(path.relative_to(new)): sha256(path) for path in sorted(new.rglob("*")) if path.is_file()}
        fingerprint = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        manifest = {"recipe": _recipe(task), "fingerprint": fingerprint, "files": files}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        new.chmod(0o755)
        final = DATA / name
        if final.exists():  # a folder cannot be renamed over a full one: move the old one away
            final.rename(Path(folder) / "old")
        new.rename(final)
    return manifest


def _raw_folder(task: Task, raw: Path | None, scratch: Path) -> Path:
    """The folder of the raw files, complete; an archive is unpacked into `scratch` (those in it are not)."""
    if raw is None:
        raw = DATA / "packages" if task.suite == "micro" else DATA / "raw" / task.dir.name
    archives = [raw, raw / f"{task.dir.name}.zip", Path(f"{raw}.zip")]
    files, unpacked = task.source["files"], task.source.get("unpacked", {})
    if not any(_raw_file(raw, file, unpacked) for file in files):
        archive = next((path for path in archives if path.is_file()), None)
        if archive and archive.name in files:
            raw = archive.parent
        elif archive:
            from tasks import raw as reading  # needs pandas and this module

            reading.unpack(archive, scratch)
            raw = scratch
    for file, digest in files.items():
        path = _raw_file(raw, file, unpacked)
        if path is None:
            raise TaskError(f"needs {(archive if raw == scratch else raw) / file}")
        if digest is not None and sha256(path) != digest:
            raise TaskError(f"{path} is not the file that the scores were measured on, delete it")
    return raw


def _raw_file(raw: Path, file: str, unpacked: dict[str, str]) -> Path | None:
    """raw/file, packed or unpacked: `train.csv` stands for train.csv.zip, and the other way round. `unpacked` names
    what an archive leaves in raw when that is not called like it."""
    bare = file.removesuffix(".zip").removesuffix(".7z")
    names = (file, f"{file}.zip", bare, unpacked.get(file, file))
    return next((raw / name for name in names if (raw / name).exists()), None)


def _check_answers(task: Task, path: Path) -> None:
    """TaskError unless the right answers, taken for predictions, can be scored on every part."""
    metric = METRICS[task.metric]
    try:
        answers = read_answers(path, task.metric, task.columns, task.classes)
    except ValueError as error:
        raise TaskError(f"an answer cannot be read: {error}") from error
    if len(np.unique(answers.ids)) != len(answers.ids):
        raise TaskError("two rows of the answers have the same id")
    right = answers.truth
    if metric.takes == "label" and (strange := set(map(str, np.unique(right))) - set(task.classes)):
        raise TaskError(f"{min(strange)!r} is among the answers, but no class of the task")
    if metric.takes == "distribution":
        right = np.eye(len(task.columns))[right]
    elif metric.takes == "ranking":
        right = np.array([[label, ""] for label in right], dtype=object)
    for part, rows in answers.parts.items():
        try:
            score = metric.function(answers.truth[rows], right[rows]) if len(rows) else math.nan
        except ValueError as error:
            raise TaskError(f"the answers ({part}) cannot be scored: {error}") from error
        if not math.isfinite(score):
            raise TaskError(f"there are no answers ({part}) that could be scored")


def _prepare_function(task: Task):
    """`prepare` of prepare.py; for name@some-variant `prepare_some_variant`, where there is one."""
    path = task.dir / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{task.dir.name.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    variant = task.name.partition("@")[2].replace("-", "_")
    return getattr(module, f"prepare_{variant}", module.prepare)


def _recipe(task: Task) -> str:
    """Changes whenever the code that makes the data changes, or a pin of the packages that hold the raw files."""
    shared = ("build.py", "../requirements-data.txt")
    if task.suite != "micro":
        shared = ("build.py", "raw.py", "split.py")
    code = [task.dir / "prepare.py", *(ROOT / name for name in shared)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in code if path.exists())).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=64)
def _read_answers(path: Path, mtime_ns: int, *how) -> Answers:
    """The answers file, parsed once per version of it: `mtime_ns` is part of the cache's key."""
    return read_answers(path, *how)


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


def apply_block(script: str, block: str | None, code: str | None) -> str:
    """The script with the block's body replaced by `code`; ValueError as in `block_lines`.

    TaskError when there is no code: the ideas of the paper suite are texts, for experts that write code.
    """
    if code is None:
        raise TaskError("this task's ideas are texts without code, so only an LLM expert can try them")
    first, last = block_lines(script, block)
    lines = script.splitlines()
    return "\n".join(lines[: first - 1] + code.strip("\n").splitlines() + lines[last:]) + "\n"
