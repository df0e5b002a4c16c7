"""What runs leave on disk: run directories, JSONL files, and the states of a trajectory row.

A directory belongs to one configuration (`claim`). JSONL files are append-only, one object a line; a killed
run leaves at most one half line, at the end, which `read_jsonl(repair=True)` cuts off.
"""

import json
import os
from pathlib import Path

import yaml

import config
from agent import State


def claim(folder: Path, cfg, ignore: tuple[str, ...] = ()) -> None:
    """Make `folder` this configuration's (config.yaml in it), or check that it is already.

    Keys in `ignore` (how long, how fast) may differ between a run and its continuation.

    Raises config.UserError naming the first key that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    if path.exists():
        old, new = yaml.safe_load(path.read_text()), config.to_dict(cfg)
        for key in new:
            if key not in ignore and old.get(key) != new[key]:
                raise config.UserError(
                    f"{folder} belongs to another run: {key} is {old.get(key)!r} there and {new[key]!r} now; "
                    f"choose another run name, or remove {folder}"
                )
    config.save(cfg, path)
    print(f"configuration: {path}", flush=True)


def read_jsonl(path: Path, repair: bool = False) -> list[dict]:
    """The objects of a JSONL file. With `repair`, a half line left at the end by a kill is cut off.

    Raises config.UserError naming the line when the file is empty or a line is not JSON.
    """
    if not path.exists():
        raise config.UserError(f"{path} does not exist: run the step that writes it first")
    rows, good = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line does not end")
                rows.append(json.loads(line))
                good += len(line)
            except ValueError as error:
                last = file.tell() == path.stat().st_size and not line.endswith(b"\n")
                if repair and last:
                    os.truncate(path, good)
                    break
                raise config.UserError(f"{path}: line {number} is not valid JSON ({error}): remove it") from None
    return rows


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
