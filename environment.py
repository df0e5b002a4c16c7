"""What happens when an agent acts: experiments in the sandbox, the transition of the MDP, episodes.

An edit (or its undo) is always followed by running the script in the sandbox and scoring its submission:
that is m_{t+1}. The same `transition` serves collection, RL and evaluation.

A workspace is plain text, {file name: contents}. Every experiment starts from these sources in a fresh
directory, which makes states cheap to store, instant to restore, and experiments cacheable by
(task, sources, limits). What a script leaves behind does not reach the next run.

No torch in here: models appear only as functions that turn states into replies.
"""

import difflib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import sandbox
import tasks
from agent import (
    ACTIONS,
    MAX_FILE_CHARS,
    Action,
    AgentConfig,
    EditFailed,
    InvalidAction,
    InvalidFormat,
    State,
    apply_edit,
    parse_reply,
    problem_text,
)
from reward import Outcome

MAX_FILES = 20  # sources an agent may have at once
INSPECT_LINES = 100  # MLAgentBench's limit for one look at a file

# ------------------------------------------------------------------------ experiments and transitions


@dataclass(frozen=True)
class SandboxConfig:
    tier: Literal["auto", "ns", "landlock", "bare"] = "auto"  # auto: the strongest this machine gives
    allow_weak: bool = False  # accept a tier without secrecy: only for scripts you trust
    workers: int = 0  # experiments at once; 0 = one per core
    preload: tuple[str, ...] = tasks.PRELOAD  # imported once by the warm-start server


@dataclass(frozen=True)
class Experiment:
    """What running one script gave. `scores` has a value per part of the answers when it was valid."""

    outcome: Outcome  # ok_edit when it ran and scored, else the error or corner case
    output: str
    scores: dict = field(default_factory=dict)
    seconds: float = 0.0


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
MAX_SUBMISSION_BYTES = 64 << 20


class Environment:
    """Runs experiments: a sandbox pool, the hidden answers' part that counts, and the result cache.

    One object per process, shared by many threads. `part` is `reward` in collection and RL, `eval`
    in evaluation, so that held-in results are not trained on their own test labels.
    """

    def __init__(self, cfg: AgentConfig, box: SandboxConfig, cache_dir: Path | None, part="reward"):
        self.cfg, self.part = cfg, part
        self.cache_dir = Path(cache_dir) if cache_dir else None
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of torchrun that share this machine
        self.workers = box.workers or max(1, len(os.sched_getaffinity(0)) // ranks)
        self.pool = sandbox.Pool(
            self.workers,
            preload=box.preload,
            tier=None if box.tier == "auto" else box.tier,
            allow_weak=box.allow_weak,
        )
        self.threads = ThreadPoolExecutor(4 * self.workers, thread_name_prefix="transition")
        self.running: dict[str, Future] = {}
        self.lock = threading.Lock()
        self.counts = {"experiments": 0, "cache_hits": 0}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.pool.close()

    def experiment(self, task: "tasks.Task", files: dict, script: str) -> Experiment:
        """Run `script` from `files` in a fresh sandbox and score its submission. Blocks; thread-safe.

        Results are shared through the cache directory between collect, RL and evaluate, and equal
        experiments that are asked for at the same time run once.
        """
        task.require_prepared()
        parts = [task.name, task.manifest()["fingerprint"], script, files, task.helpers(), task.limits]
        parts += [task.metric, task.columns, task.classes, self.pool.tier, self.cfg.max_output_chars]
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
        return Experiment(Outcome(row["outcome"]), row["output"], row["scores"], row["seconds"])

    def _store(self, key: str, result: Experiment) -> None:
        # Our own failures are never stored, nor timeouts, which a busy machine can cause: they are tried again.
        if not self.cache_dir or result.outcome in (Outcome.INTERNAL, Outcome.TIMEOUT):
            return
        path = self.cache_dir / key[:2] / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps({**asdict(result), "outcome": result.outcome.value}))
        temporary.replace(path)  # atomic: a killed run leaves no half entry

    def _run(self, task: "tasks.Task", files: dict, script: str) -> Experiment:
        workspace = sandbox.new_workspace()
        try:
            for name, text in {**files, **task.helpers()}.items():
                path = workspace / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            limits = sandbox.Limits(**task.limits)
            result = self.pool.submit(
                ["python", script],
                workspace,
                limits=limits,
                read_only=((task.public, "data"),),
                hidden=(task.private,),
            ).result()
            output = cut_middle(clean_output(result, workspace), self.cfg.max_output_chars)
            if result.reason in ("setup_error", "internal"):
                return Experiment(Outcome.INTERNAL, output, {}, result.wall_s)
            if result.reason != "ok":
                stopped = STOPPED.get(result.reason, "").format(**asdict(limits))
                output = "\n".join(filter(None, (output, stopped and f"The script was {stopped}.")))
                return Experiment(REASONS[result.reason], output, {}, result.wall_s)
            try:
                data = sandbox.safe_read(workspace, "submission.csv", MAX_SUBMISSION_BYTES)
                scores = {part: task.score(data, part) for part in ("reward", "eval", "all")}
            except (sandbox.SubmissionError, tasks.InvalidSubmission) as error:
                output = f"{output}\nsubmission.csv was not accepted: {error}".strip()
                return Experiment(Outcome.BAD_SUBMISSION, output, {}, result.wall_s)
            return Experiment(Outcome.OK_EDIT, output, scores, result.wall_s)
        finally:
            sandbox.remove(workspace)

    def submit(self, state: State, reply: str, truncated: bool = False) -> "Future[Transition]":
        """`transition` on a thread, so that experiments overlap each other and generation."""
        return self.threads.submit(transition, state, reply, self, truncated)


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


def diff(old: str, new: str, name: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, name, "", "", 2, "")
    return "\n".join(lines)


@dataclass(frozen=True)
class Transition:
    """One step of the MDP. `before`/`after` are m_t and m_{t+1}; after is None unless it was scored."""

    state: State  # s_{t+1}
    action: Action | None  # None when the reply could not be parsed
    outcome: Outcome
    feedback: str
    before: float
    after: float | None
    seconds: float = 0.0
    truncated: bool = False  # the reply was cut off


def transition(state: State, reply: str, env: Environment, truncated: bool = False) -> Transition:
    """Carry out one reply. The only place that decides outcomes; the same for every script.

    Args:
        truncated: the reply was cut off at max_new_tokens: invalid_format, whatever it contains.
    """
    task, cfg = tasks.load(state.task), env.cfg
    action, after, seconds, changed = None, None, 0.0, {}
    try:
        if truncated:
            raise InvalidFormat(f"the reply was cut off at {cfg.max_new_tokens} tokens: be shorter")
        action = parse_reply(reply, cfg)
        handler = HANDLERS[action.name]
        outcome, feedback, after, seconds, changed = handler(state, action, task, env)
    except InvalidFormat as error:
        outcome, feedback = Outcome.INVALID_FORMAT, f"Your reply could not be read: {error}."
    except InvalidAction as error:
        outcome, feedback = Outcome.INVALID_ACTION, f"The action failed: {error}."
    except EditFailed as error:
        outcome, feedback = Outcome.EDIT_FAILED, f"The edit failed: {error}."
    messages = [
        *state.messages,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": feedback},
    ]
    score = state.score if after is None else after
    new = replace(state, messages=messages, score=score, step=state.step + 1, **changed)
    return Transition(new, action, outcome, feedback, state.score, after, seconds, truncated)


def _check_name(name: str) -> str:
    path = os.path.normpath(name)
    if path.startswith(("/", "..")) or not re.fullmatch(r"[ -~]{1,200}", name):
        raise InvalidAction(f"{name[:60]!r} is outside the working directory")
    return path


def _readable(name: str, state: State, task: "tasks.Task") -> str:
    """Text of a source, a helper or a data file; data is read up to a bound."""
    path = _check_name(name)
    text = {**task.helpers(), **state.files}.get(path)
    if text is not None:
        return text
    if path.startswith("data/"):
        target = (task.public / path[5:]).resolve()
        if target.is_relative_to(task.public.resolve()) and target.is_file():
            with open(target, errors="replace") as file:
                return file.read(MAX_FILE_CHARS)
    raise InvalidAction(f"there is no file {name[:60]!r}")


def _editable(name: str, state: State, task: "tasks.Task") -> str:
    path = _check_name(name)
    if path in task.helpers() or path.split("/")[0] == "data":
        raise InvalidAction(f"{path} is read-only")
    if path not in state.files:
        raise InvalidAction(f"there is no script {name[:60]!r}")
    if not path.endswith(".py"):
        raise InvalidAction(f"{path} is not a Python script")
    return path


def _list_files(state, action, task, env):
    path = _check_name(action.args["dir_path"])
    if path == ".":
        names = sorted([*state.files, *task.helpers(), "data/"])
    elif path == "data" or path.startswith("data/"):
        target = (task.public / path[5:]).resolve()
        if not target.is_relative_to(task.public.resolve()) or not target.is_dir():
            raise InvalidAction(f"there is no directory {path!r}")
        names = sorted(p.name + "/" * p.is_dir() for p in target.iterdir())
    else:
        names = sorted(n[len(path) + 1 :] for n in state.files if n.startswith(f"{path}/"))
        if not names:
            raise InvalidAction(f"there is no directory {path!r}")
    return Outcome.OK_ACTION, cut_middle("\n".join(names), env.cfg.max_output_chars), None, 0.0, {}


def _copy_file(state, action, task, env):
    text = _readable(action.args["source"], state, task)
    target = _check_name(action.args["destination"])
    if target in (*task.helpers(), ".", "submission.csv") or target.split("/")[0] == "data":
        raise InvalidAction(f"{target} is read-only")
    if len(state.files) >= MAX_FILES and target not in state.files:
        raise InvalidAction(f"there are {MAX_FILES} files already")
    if any(f.startswith(f"{target}/") or target.startswith(f"{f}/") for f in state.files):
        raise InvalidAction(f"{target} is both a file and a directory")
    undo = state.undo
    if target in state.files:
        undo = {**undo, target: [*undo.get(target, []), state.files[target]]}
    files = {**state.files, target: text}
    feedback = f"Copied {action.args['source']} to {target}."
    return Outcome.OK_ACTION, feedback, None, 0.0, {"files": files, "undo": undo}


def _inspect(state, action, task, env):
    lines = _readable(action.args["script_name"], state, task).splitlines()
    first = max(1, action.args["start_line_number"])
    last = min(len(lines), action.args["end_line_number"], first + INSPECT_LINES - 1)
    if first > last:
        raise InvalidAction(f"lines {first}-{last} do not exist: the file has {len(lines)} lines")
    text = "\n".join(f"{i} {lines[i - 1][:500]}" for i in range(first, last + 1))
    return Outcome.OK_ACTION, text, None, 0.0, {}


def _run_and_score(state, task, env, path, files, edit: bool):
    run = env.experiment(task, files, path)
    good = run.outcome is Outcome.OK_EDIT
    outcome = Outcome.OK_ACTION if good and not edit else run.outcome
    return outcome, run.output, run.scores[env.part] if good else None, run.seconds


def _execute(state, action, task, env):
    path = _check_name(action.args["script_name"])
    if path not in state.files or not path.endswith(".py"):
        raise InvalidAction(f"there is no script {path[:60]!r}")
    return *_run_and_score(state, task, env, path, state.files, edit=False), {}


def _edit_and_run(state, path, new, undo, task, env):
    files = {**state.files, path: new}
    outcome, output, after, seconds = _run_and_score(state, task, env, path, files, edit=True)
    feedback = diff(state.files[path], new, path)
    if env.cfg.edit_feedback == "run":
        feedback += f"\n\nThe script prints:\n{output}"
    return outcome, feedback, after, seconds, {"files": files, "undo": undo}


def _edit(state, action, task, env):
    path = _editable(action.args["script_name"], state, task)
    new = apply_edit(state.files[path], action, env.cfg)
    undo = {**state.undo, path: [*state.undo.get(path, []), state.files[path]]}
    return _edit_and_run(state, path, new, undo, task, env)


def _undo(state, action, task, env):
    path = _editable(action.args["script_name"], state, task)
    versions = state.undo.get(path, [])
    if not versions:
        raise InvalidAction(f"{path} has no edit to undo")
    undo = {**state.undo, path: versions[:-1]}
    return _edit_and_run(state, path, versions[-1], undo, task, env)


def _final(state, action, task, env):
    return Outcome.FINAL, "The episode has ended.", None, 0.0, {}


HANDLERS: dict[str, Callable] = {
    "List Files": _list_files,
    "Copy File": _copy_file,
    "Inspect Script Lines": _inspect,
    "Execute Script": _execute,
    "Edit Script": _edit,
    "Undo Edit Script": _undo,
    "Final Answer": _final,
}
assert set(HANDLERS) == set(ACTIONS)


# ----------------------------------------------------------------------------------------- episodes


def initial_state(task: "tasks.Task", env: "Environment", ideas: Iterable[str] = ()) -> State:
    """The task, its starter and the starter's output (so that the first edit has something to beat)."""
    files = task.sources()
    run = env.experiment(task, files, env.cfg.script)
    if run.outcome is not Outcome.OK_EDIT:
        raise RuntimeError(f"the starter of {task.name} does not run here ({run.outcome}): {run.output}")
    text = f"{problem_text(task, ideas)}\n\nThe starting script prints:\n{run.output}"
    message = {"role": "user", "content": text}
    return State(task.name, [message], files, run.scores[env.part], 0, {}, "start", task.name)


@dataclass
class Episode:
    """A trajectory in the making: where it stands, what was done, and why it ended."""

    state: State
    steps: list[Transition] = field(default_factory=list)
    end: str = ""  # final | truncated | steps | minutes | overflow | internal ; empty while it runs

    def add(self, step: Transition, max_steps: int, max_minutes: float) -> None:
        self.steps.append(step)
        self.state = step.state
        if step.outcome in (Outcome.FINAL, Outcome.INTERNAL):
            self.end = step.outcome.value
        elif step.truncated:  # terminal: a policy that does not stop must not profit from going on
            self.end = "truncated"
        elif len(self.steps) >= max_steps:
            self.end = "steps"
        elif sum(s.seconds for s in self.steps) > 60 * max_minutes:  # its own experiments, cached or not
            self.end = "minutes"


Act = Callable[[list[Episode]], Iterator[tuple[int, str, bool]]]


def run_episodes(
    episodes: list[Episode], act: Act, env: Environment, max_steps: int, max_minutes: float
) -> Iterator[Episode]:
    """Play episodes together, step by step; yields each as it ends.

    `act(active)` yields (position in active, reply, truncated) in any order: while later replies are
    still being written, the experiments of earlier ones already run.
    """
    active = [e for e in episodes if not e.end]
    while active:
        futures = {i: env.submit(active[i].state, text, cut) for i, text, cut in act(active)}
        for i, episode in enumerate(active):
            if i in futures:
                episode.add(futures[i].result(), max_steps, max_minutes)
            else:
                episode.end = "overflow"  # no reply: the prompt no longer fits
        yield from (e for e in active if e.end)
        active = [e for e in active if not e.end]
