"""What the tests of the paper's tasks share. No Kaggle data in here: every test makes a miniature of
its competition's download, with the same names, columns, encodings and nested archives.

    from paper_kit import pool, prepare, run_starter, assert_hidden, split_rows, zipped   # fixtures too

    def test_it(tmp_path, monkeypatch, pool):
        archive = zipped(tmp_path / "NAME.zip", {"train.csv": table, "test.csv.zip": {"test.csv": table}})
        task = prepare("NAME", archive, tmp_path, monkeypatch)     # into tmp_path/data, as the command would
        assert split_rows(task) == (80, 20)
        assert_hidden(task, secrets=["12345.678"])                 # answers of test rows: nowhere in public/
        run = run_starter(task, pool)                              # in the sandbox, with the task's limits
        assert run.scores["all"] > 0.5
"""

import csv
import io
import math
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest

import sandbox
import tasks
from tasks import measure

PRELOAD = ("numpy", "pandas", "sklearn.linear_model", "sklearn.model_selection", "sklearn.feature_extraction.text")


@pytest.fixture(scope="module")
def pool():
    """One sandbox worker of the strongest tier that this machine gives."""
    try:
        found = sandbox.Pool(1, preload=PRELOAD)
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    with found:
        yield found


def zipped(path: Path, members: dict) -> Path:
    """A zip at `path`. Members: name -> str | bytes | DataFrame | dict of members (a zip in the zip)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_zip_bytes(members))
    return path


def unzipped(path: Path, members: dict) -> Path:
    """The same members in a folder, as a person who has unpacked the outer archive has them."""
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(_bytes(content))
    return path


def _zip_bytes(members: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, _bytes(content))
    return buffer.getvalue()


def _bytes(content) -> bytes:
    if isinstance(content, dict):
        return _zip_bytes(content)
    if isinstance(content, pd.DataFrame):
        return content.to_csv(index=False).encode()
    return content.encode() if isinstance(content, str) else content


def prepare(name: str, raw: Path, tmp_path: Path, monkeypatch) -> tasks.Task:
    """The task, prepared from `raw` into tmp_path/data; nothing else is left there."""
    monkeypatch.setattr(tasks, "DATA", tmp_path / "data")
    manifest = tasks.prepare(name, raw)
    assert [path.name for path in tasks.DATA.iterdir()] == [name]
    task = tasks.load(name)
    task.require_data()
    assert "private/answers.csv" in manifest["files"]
    return task


def answers(task: tasks.Task) -> pd.DataFrame:
    """private/answers.csv, all cells as text."""
    return pd.read_csv(task.private / "answers.csv", dtype=str, keep_default_na=False)


def split_rows(task: tasks.Task, train: str = "train.csv") -> tuple[int, int]:
    """Rows (of public/train.csv, of the hidden answers)."""
    return len(pd.read_csv(task.public / train)), len(answers(task))


def assert_hidden(task: tasks.Task, secrets=(), renumbered=()) -> None:
    """The answers are nowhere that a script can see.

    No table in public/ has a test id in a row with an answer column; no long answer (a number with
    five characters or more) occurs in any file; and none of `secrets` (str or bytes) does.
    A sample submission may repeat ids beside constant values. `renumbered`: files whose ids are those
    of other rows, where the benchmark numbers train and test alike.
    """
    table = answers(task)
    columns = [c for c in table.columns if c not in ("id", "part", "group")]
    ids = set(table["id"])
    long = {v for c in columns for v in table[c] if len(v) >= 5 and re.fullmatch(r"-?\d*\.?\d+", v)}
    needles = [s.encode() if isinstance(s, str) else s for s in (*secrets, *sorted(long))]
    files = [path for path in task.public.rglob("*") if path.is_file()]
    assert files
    assert not any(path.is_symlink() for path in task.public.rglob("*"))
    for path in files:
        data = path.read_bytes()
        found = [needle for needle in needles if needle in data]
        assert not found, f"{path} has the answer {found[0]!r}"
        if path.suffix != ".csv" or path.name in renumbered:
            continue
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        shown = [c for c in (*columns, *task.columns) if c in (rows.fieldnames or [])]
        if not shown or task.id_column not in rows.fieldnames:
            continue
        told = {tuple(row[c] for c in shown) for row in rows if row[task.id_column] in ids}
        assert len(told) <= 1, f"{path} tells answers: {sorted(told)[:3]}"
    for text in (task.sources() | task.helpers()).values():
        assert not any(needle in text.encode() for needle in needles)


def run_starter(task: tasks.Task, pool) -> measure.Run:
    """The starter's run in the sandbox: it ended well, printed its validation score last, and was scored."""
    run = measure.run(task, task.sources()["train.py"], pool)
    assert run.reason == "ok", run.output
    last = run.output.strip().splitlines()[-1]
    assert re.fullmatch(r"validation [a-z_0-9]+:? -?\d+(\.\d+)?(e-?\d+)?", last), run.output
    assert set(run.scores) == set(tasks.PARTS) and all(map(math.isfinite, run.scores.values()))
    return run
