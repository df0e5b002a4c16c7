"""Experiments: a script runs in the sandbox, what it submits is scored, and results are remembered.

A workspace is plain text, {file name: contents}. Every experiment starts from these sources in a fresh
directory, which makes states cheap to store, instant to restore, and experiments cacheable by
(task, sources, limits). What a script leaves behind does not reach the next run.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import sandbox
import tasks
from reward import Outcome


@dataclass(frozen=True)
class SandboxConfig:
    tier: Literal["auto", "ns", "landlock", "bare"] = "auto"  # auto: the strongest this machine gives
    allow_weak: bool = False  # accept a tier without secrecy: only for scripts you trust
    workers: int = 0  # threads of experiments at once (limits.threads: micro tasks 1, paper's 4 to 8); 0 = one per core
    cpu_s: float | None = None  # CPU seconds that an experiment may use, where its task allows more; null = the task's
    gpus: tuple[int, ...] = ()  # numbers N of the /dev/nvidiaN that every experiment may use; none by default
    preload: tuple[str, ...] = tasks.PRELOAD  # imported once by the warm-start server

    def __post_init__(self):
        if self.cpu_s is not None and self.cpu_s <= 0:
            raise ValueError(f"sandbox.cpu_s = {self.cpu_s} must be positive, or null for the tasks' limits")


# Of a sandbox, what may differ between a run and its continuation: where and how many, not what a script is allowed.
SANDBOX_MAY_CHANGE = tuple(f"sandbox.{key.name}" for key in fields(SandboxConfig) if key.name != "cpu_s")


@dataclass(frozen=True)
class Experiment:
    """What running one script gave. `scores` has a value per part of the answers when it was valid."""

    outcome: Outcome  # ok_edit when it ran and scored, else the error or corner case
    output: str
    scores: dict = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""  # how the run ended (sandbox.Result.reason)


REASONS = {
    "exit": Outcome.SCRIPT_ERROR,
    "signal": Outcome.SCRIPT_ERROR,
    "wall": Outcome.TIMEOUT,
    "cpu": Outcome.TIMEOUT,
    "memory": Outcome.OUT_OF_MEMORY,
    "processes": Outcome.RESOURCE_LIMIT,
    "disk": Outcome.RESOURCE_LIMIT,
    "output": Outcome.RESOURCE_LIMIT,
}
STOPPED = {
    "wall": "stopped: it ran longer than {wall_s:g} s",
    "cpu": "stopped: it used more than {cpu_s:g} s of CPU time",
    "memory": "stopped: it used more than {memory_mb} MB of memory",
    "processes": "stopped: it started more than {processes} processes or threads",
    "disk": "stopped: it wrote more than {disk_mb} MB",
    "output": "stopped: it printed too much",
}


class Experiments:
    """A sandbox pool and the result cache. One object per process, shared by many threads."""

    def __init__(self, box: SandboxConfig, cache_dir: Path | None, max_output_chars: int):
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.max_output_chars, self.gpus, self.cpu_s = max_output_chars, box.gpus, box.cpu_s
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun that share this machine
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = self.free = box.workers or max(1, cores // ranks)
        self.changed = threading.Condition()  # guards `free`
        self.pool = sandbox.Pool(
            self.workers,
            preload=box.preload,
            tier=None if box.tier == "auto" else box.tier,
            allow_weak=box.allow_weak,
        )
        self.running: dict[str, Future] = {}
        self.lock = threading.Lock()
        self.counts = {"experiments": 0, "cache_hits": 0}

    def experiment(self, task: "tasks.Task", files: dict, script: str) -> Experiment:
        """Run `script` from `files` in a fresh sandbox and score its submission. Blocks; thread-safe.

        Results are shared through the cache directory between collect, RL and evaluate, and equal
        experiments that are asked for at the same time run once.
        """
        task.require_prepared()
        parts = [task.name, task.manifest()["fingerprint"], script, files, task.helpers(), task.limits]
        parts += [task.metric, task.columns, task.classes, self.pool.tier, self.max_output_chars]
        parts += ["gpu"] if self.gpus else []  # other numbers, other timeouts
        parts += [self.cpu_s] if self.cpu_s else []
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        with self.lock:
            future = self.running.get(key)
            mine = future is None
            if mine:
                future = self.running[key] = Future()
            self.counts["experiments"] += 1
            self.counts["cache_hits"] += not mine
        if not mine:
            return future.result()
        try:
            result = self._cached(key)
            if result is None:
                result = self._run(task, files, script)
                self._store(key, result)
            future.set_result(result)
            return result
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self.lock:
                del self.running[key]

    def _cached(self, key: str) -> Experiment | None:
        path = self.cache_dir and self.cache_dir / key[:2] / f"{key}.json"
        if not path or not path.exists():
            return None
        with self.lock:
            self.counts["cache_hits"] += 1
        row = json.loads(path.read_text())
        return Experiment(**{**row, "outcome": Outcome(row["outcome"])})  # entries of old have no reason

    def _store(self, key: str, result: Experiment) -> None:
        # Our own failures are never stored, nor wall-clock timeouts, which a busy machine can cause: they are
        # tried again. CPU time is a property of the script.
        busy = result.outcome is Outcome.TIMEOUT and result.reason != "cpu"
        if not self.cache_dir or busy or result.outcome is Outcome.INTERNAL:
            return
        path = self.cache_dir / key[:2] / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps({**asdict(result), "outcome": result.outcome.value}))
        temporary.replace(path)  # atomic: a killed run leaves no half entry

    @contextmanager
    def threads_of(self, limits: "sandbox.Limits") -> Iterator[None]:
        """Wait for, and hold, as many workers as an experiment has threads: with more of them than cores, experiments
        would run into time-outs, which are rewards."""
        count = min(limits.threads, self.workers)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()

    def limits_of(self, task: "tasks.Task") -> "sandbox.Limits":
        """The task's limits, with less CPU time where the run allows less."""
        limits = sandbox.Limits(**task.limits)
        cpu_s = limits.cpu_s or limits.wall_s * limits.threads
        return replace(limits, cpu_s=min(cpu_s, self.cpu_s or cpu_s))

    def _run(self, task: "tasks.Task", files: dict, script: str) -> Experiment:
        workspace = sandbox.new_workspace()
        try:
            for name, text in {**files, **task.helpers()}.items():
                path = workspace / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            limits = self.limits_of(task)
            with self.threads_of(limits):
                result = self.pool.submit(
                    ["python", script],
                    workspace,
                    limits=limits,
                    read_only=((task.public, "data"),),
                    hidden=(task.private,),
                    gpus=self.gpus,
                ).result()
            output = cut_middle(clean_output(result, workspace), self.max_output_chars)
            run = Experiment(Outcome.INTERNAL, output, {}, result.wall_s, result.reason)
            if result.reason in ("setup_error", "internal"):
                return run
            if result.reason != "ok":
                stopped = STOPPED.get(result.reason, "").format(**asdict(limits))
                output = "\n".join(filter(None, (output, stopped and f"The script was {stopped}.")))
                return replace(run, outcome=REASONS[result.reason], output=output)
            try:
                data = sandbox.safe_read(workspace, "submission.csv", task.max_submission_bytes())
                scores = task.scores(data)
            except (sandbox.SubmissionError, tasks.InvalidSubmission) as error:
                output = f"{output}\nsubmission.csv was not accepted: {error}".strip()
                return replace(run, outcome=Outcome.BAD_SUBMISSION, output=output)
            return replace(run, outcome=Outcome.OK_EDIT, scores=scores)
        finally:
            sandbox.remove(workspace)


def clean_output(result: "sandbox.Result", workspace: Path) -> str:
    """What the agent reads of a run: its stdout, and stderr when it failed; no control characters."""
    failed = result.reason != "ok"
    text = result.stdout.rstrip() + ("\n" + result.stderr.rstrip() if failed else "")
    text = text.replace(f"{workspace}/", "").replace(f"{sandbox.BOX}/", "").replace("\r", "\n").strip() or "(no output)"
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", "?", text)


def cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 3]}\n[...]\n{text[-(limit - limit // 3) :]}"
