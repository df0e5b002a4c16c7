"""What runs leave on disk: run directories, JSONL files, and the states of a trajectory row.

A directory belongs to one configuration and, while it runs, to one process (`claim`). JSONL files are append-only, one
object a line; a killed run leaves at most one half line, at the end, which `read_jsonl(repair=True)` cuts off.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

import yaml

import config
from agent import State


def claim(folder: Path, cfg, ignore: tuple[str, ...] = ()) -> None:
    """Make `folder` this configuration's (config.yaml in it), or check that it is already.

    Keys in `ignore` (how long, how fast) may differ between a run and its continuation: "seed", or "endpoint.retries"
    of a mapping. A key that the folder does not know, since it is older, has its default there.

    A folder in which nothing was made yet is anybody's: a first start that failed may be corrected.

    Raises config.UserError naming the first key that differs, or that another process works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    path = folder / "config.yaml"
    if path.exists() and {file.name for file in folder.iterdir()} - {".lock", path.name}:
        new = _flat(config.to_dict(cfg))
        old = _flat(_defaults(cfg)) | _flat(yaml.safe_load(path.read_text()))
        names = {key.split(".")[0] for key in new}  # a key that is gone from the script claims nothing
        for key in dict.fromkeys([*new, *(k for k in old if k.split(".")[0] in names)]):
            parts = key.split(".")
            ignored = any(".".join(parts[:n]) in ignore for n in range(1, len(parts) + 1))
            if not ignored and old.get(key) != new.get(key):
                raise config.UserError(
                    f"{folder} belongs to another run: {key} is {old.get(key)!r} there and {new.get(key)!r} now; "
                    f"choose another run name, or remove {folder}"
                )
    config.save(cfg, path)
    print(f"configuration: {path}", flush=True)


_locked: set[tuple[int, int]] = set()  # device and inode of what this process has locked


def _lock(folder: Path) -> None:
    """Two processes would do everything twice, and pay for it. Of torchrun's ranks the main one alone claims.

    The lock goes when the process does, whatever ends it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    stat = os.fstat(descriptor)
    if (stat.st_dev, stat.st_ino) in _locked:
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise config.UserError(f"another process works in {folder}: wait for it, or stop it") from None
    except OSError:  # a file system without locks
        pass
    _locked.add((stat.st_dev, stat.st_ino))


def _flat(values: dict, prefix: str = "") -> dict:
    """{"agent": {"thought": "full"}} -> {"agent.thought": "full"}"""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _defaults(cfg) -> dict:
    """The defaults of a configuration's keys, as config.to_dict gives values."""
    own = [f for f in fields(cfg) if not (f.default is MISSING and f.default_factory is MISSING)]
    pairs = [(f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in own]
    return json.loads(json.dumps({name: asdict(v) if is_dataclass(v) else v for name, v in pairs}))


def read_jsonl(path: Path, repair: bool = False) -> list[dict]:
    """The objects of a JSONL file. With `repair`, a half line left at the end by a kill is cut off.

    Raises config.UserError naming the file when it is not there, and the line that is not JSON.
    """
    return list(iterate_jsonl(path, repair))


def iterate_jsonl(path: Path, repair: bool = False) -> Iterator[dict]:
    """`read_jsonl`, one object in memory at a time."""
    if not path.exists():
        raise config.UserError(f"{path} does not exist: run the step that writes it first")
    good = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line does not end")
                row = json.loads(line)
            except ValueError as error:
                last = file.tell() == path.stat().st_size and not line.endswith(b"\n")
                if repair and last:
                    os.truncate(path, good)
                    return
                raise config.UserError(f"{path}: line {number} is not valid JSON ({error}): remove it") from None
            good += len(line)
            yield row


def append_rows(path: Path, rows: list[dict]) -> None:
    """Append in one write, so that a kill leaves at most one half line, at the end."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def states_of(row: dict) -> list[State]:
    """The states of a trajectory row, one before each action, with m_t the last valid score so far."""
    states, score = [], row["initial_score"]
    for t, step in enumerate(row["steps"]):
        name = f"{row['index']}.{row['copy']}.{t}"
        messages = row["messages"][: 1 + 2 * t]
        states.append(State(row["task"], messages, step["files"], score, t, step["undo"], "expert", name))
        score = score if step["score"] is None else step["score"]
    return states


def truncate_log(path: Path, step: int, key: str = "step") -> None:
    """Drop the rows of a log that lie behind `step`: a run that resumes there writes them again."""
    if path.exists():
        rows = [row for row in read_jsonl(path, repair=True) if row[key] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)


def require_checkpoint(path: str, fix: str) -> str:
    """`path` if it is a directory with a model, or may be a hub id.

    Raises config.UserError with the way to get one.
    """
    local = Path(path).exists() or str(path).startswith((".", "/", "~", "runs/")) or str(path).count("/") != 1
    if local and not (Path(path) / "config.json").is_file():
        raise config.UserError(f"{path} holds no model (no config.json): {fix}")
    return str(path)
