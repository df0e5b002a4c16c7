"""Ctrl-C, SIGTERM and SIGKILL in every long script: one line, the shell's exit code, and nothing lost."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

from run_kit import AGENT, NAME, RL, command, make_run, metrics, need, train, weights


def interrupt(words: dict, signum: int, ready, timeout: float = 200) -> tuple[int, str]:
    """Start a script, send it the signal once `ready()`; its exit code and stderr. Its children must end with it."""
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop it once full
        process = subprocess.Popen(**words, stdout=subprocess.DEVNULL, stderr=errors)
        limit = time.monotonic() + timeout
        while not ready() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        ended, there = process.poll(), ready()
        process.send_signal(signum)
        code = process.wait(timeout)
        errors.seek(0)
        assert ended is None, errors.read()
        assert there, "it never got there"
        return code, errors.read()


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def one_line(errors: str) -> str:
    kept = [line for line in errors.splitlines() if line.strip() and "%|" not in line]
    assert "Traceback" not in errors and len(kept) <= 2, errors
    return " ".join(kept)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with four steps of RL, uninterrupted."""
    folder = make_run(tmp_path_factory.mktemp("rl"))
    train(folder, "whole", steps=4)
    return folder


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_reinforcement_learning_goes_on_where_it_stopped(trained, signum):
    folder, out = trained, f"stopped_{int(signum)}"
    log = folder / "runs" / "t" / out / "metrics.jsonl"
    words = command(folder, "train_rl.py", run="t", out=out, steps=400, **RL)
    code, errors = interrupt(words, signum, lambda: lines_of(log) >= 1)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum), errors
    saved = [int(p.name[5:]) for p in log.parent.glob("step_*") if (p / "checkpoint.json").exists()]
    if signum != signal.SIGKILL:
        assert "stopping after this step" in one_line(errors)
        assert max(saved) == lines_of(log), "what was done is saved"
    steps = max(4, max(saved) + 1)  # it may have run far before the signal came
    whole = "whole" if steps == 4 else f"whole_{int(signum)}"
    for name in (whole, out):
        train(folder, name, steps=steps)
    assert metrics(folder, out) == metrics(folder, whole)
    one, two = weights(folder, whole, steps), weights(folder, out, steps)
    assert all(torch.equal(one[k], two[k]) for k in one)


def rows_of(folder: Path, run: str) -> list[dict]:
    """Trajectories in order, without the seconds that experiments took."""
    text = (folder / "runs" / run / "data" / "trajectories.jsonl").read_text()
    rows = [json.loads(re.sub(r'"seconds": [0-9.]+', '"seconds": 0', line)) for line in text.splitlines()]
    return sorted(rows, key=lambda r: (r["index"], r["copy"]))


COLLECT = {"tasks": f"[{NAME}]", "renamed_copies": 1, "max_steps": 6, **AGENT, "sandbox.workers": 2}
del COLLECT["sandbox.preload"]  # many experiments: worth a warm start


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with one uninterrupted collection; its cache is not used by the others."""
    need(NAME)
    folder = tmp_path_factory.mktemp("collect")
    words = command(folder, "collect.py", run="whole", trajectories=6, **COLLECT)
    done = subprocess.run(**words, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_collection_loses_no_trajectory_and_makes_none_twice(collected, tmp_path, signum):
    log = tmp_path / "runs" / "part" / "data" / "trajectories.jsonl"
    words = command(tmp_path, "collect.py", run="part", trajectories=300, **COLLECT)
    code, errors = interrupt(words, signum, lambda: lines_of(log) >= 2)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum), errors
    if signum != signal.SIGKILL:
        assert "the same command continues" in one_line(errors)
    before = lines_of(log)
    words = command(tmp_path, "collect.py", run="part", trajectories=6, **COLLECT)
    done = subprocess.run(**words, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows, whole = rows_of(tmp_path, "part"), rows_of(collected, "whole")
    assert len({(r["index"], r["copy"]) for r in rows}) == len(rows) >= before, "nothing twice"
    assert [r for r in rows if r["index"] < 6] == whole


def test_evaluation_keeps_the_models_that_are_done(tmp_path):
    folder = make_run(tmp_path)
    keys = {**AGENT, "agent.max_prompt_tokens": 900, "run": "t", "tasks": f"[{NAME}]", "heldout_tasks": "[]", "episodes": 2, "max_steps": 2,
            "expert": "false", "best_idea": "false", "draws": 0,
            "models": f"{{one: {folder}/runs/t/sft, two: {folder}/runs/t/sft}}"}  # fmt: skip
    first = folder / "runs" / "t" / "eval" / "one.json"
    words = command(folder, "evaluate.py", **keys)
    code, errors = interrupt(words, signal.SIGINT, first.exists)
    assert code == 130 and "the same command continues" in one_line(errors)
    stamp = first.stat().st_mtime_ns
    done = subprocess.run(**command(folder, "evaluate.py", **keys), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == stamp, "it was not played again"
    assert set(json.loads((first.parent / "results.json").read_text())["models"]) >= {"one", "two"}


def test_no_process_of_the_sandbox_outlives_its_script(collected, tmp_path):
    """After Ctrl-C and after SIGKILL alike: monitors notice that their script is gone."""
    mark = f"ML_AGENT_MARK={os.getpid()}_{time.monotonic_ns()}"
    for signum in (signal.SIGINT, signal.SIGKILL):
        words = command(tmp_path, "collect.py", run=f"s{int(signum)}", trajectories=300, **COLLECT)
        log = tmp_path / "runs" / f"s{int(signum)}" / "data" / "trajectories.jsonl"
        words["env"] = words["env"] | dict([mark.split("=")])
        interrupt(words, signum, lambda: lines_of(log) >= 1)
        limit = time.monotonic() + 20
        while (left := marked(mark)) and time.monotonic() < limit:
            time.sleep(0.2)
        assert not left, left


def marked(mark: str) -> list[str]:
    """Command lines of the living processes that have `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
