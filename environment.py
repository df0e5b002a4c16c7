"""What happens when an agent acts: the transition of the MDP, and episodes.

An edit (or its undo) is always followed by running the script in the sandbox and scoring its submission
(experiments.py): that is m_{t+1}. The same `transition` serves collection, RL and evaluation.

In instruct mode a coder (coder.py) writes the edits. Its replies are not remembered; the experiments on them are.

No torch in here: models appear only as functions that turn states into replies.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import coder
import config
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
from client import BudgetSpent, ChatError, Client
from experiments import Experiment, Experiments, SandboxConfig, cut_middle
from reward import Outcome

MAX_FILES = 20  # sources an agent may have at once
INSPECT_LINES = 100  # MLAgentBench's limit for one look at a file

# --------------------------------------------------------------------------------------- transitions


class Environment(Experiments):
    """All that an agent acts upon: experiments, the hidden answers' part that counts, and the coder.

    One object per process, shared by many threads. `part` is `reward` in collection and RL, `eval`
    in evaluation, so that held-in results are not trained on their own test labels. `coder`: a client
    of the caller's, which stays open; without one, instruct mode connects to cfg.coder.

    Raises config.UserError: instruct mode without a coder, or with one that does not answer.
    """

    def __init__(
        self,
        cfg: AgentConfig,
        box: SandboxConfig,
        cache_dir: Path | None,
        part: str = "reward",
        coder: Client | None = None,
    ):
        self.cfg, self.part = cfg, part
        self.coder, self.own_coder = coder, None
        if cfg.edit_mode == "instruct" and coder is None:
            self.coder = self.own_coder = connect_coder(cfg)
        super().__init__(box, cache_dir, cfg.max_output_chars)
        # Threads that wait for the coder must not keep experiments from the sandbox.
        waiting = self.coder.endpoint.in_flight if self.coder else 0
        self.threads = ThreadPoolExecutor(4 * self.workers + waiting, thread_name_prefix="transition")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.threads.shutdown(wait=False, cancel_futures=True)
        if self.own_coder:
            self.own_coder.close()
        self.pool.close()

    def submit(self, state: State, reply: str, truncated: bool = False) -> "Future[Transition]":
        """`transition` on a thread, so that experiments overlap each other and generation."""
        return self.threads.submit(transition, state, reply, self, truncated)


def counted(task: "tasks.Task", part: str) -> str:
    """The part of the hidden answers that a score is of: `part`, but all of them when the paper's held-out tasks
    are evaluated. That is the benchmarks' protocol, and no training has seen those answers."""
    return "all" if part == "eval" and (task.suite, task.split) == ("paper", "heldout") else part


def connect_coder(cfg: AgentConfig) -> Client:
    """A client of cfg.coder that has answered. Raises config.UserError naming what to set."""
    if cfg.coder is None:
        raise config.UserError(
            "agent.edit_mode = instruct needs a coder: set agent.coder.base_url and agent.coder.model"
        )
    client = Client(cfg.coder)
    try:
        client.check()
    except ChatError as error:
        raise config.UserError(f"agent.coder: {error}") from None
    return client


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
    coder: list[dict] = field(default_factory=list)  # instruct mode: what the coder was asked and replied


def transition(state: State, reply: str, env: Environment, truncated: bool = False) -> Transition:
    """Carry out one reply. The only place that decides outcomes; the same for every script.

    Args:
        truncated: the reply was cut off at max_new_tokens: invalid_format, whatever it contains.

    Raises config.UserError when the coder's budget is spent.
    """
    task, cfg = tasks.load(state.task), env.cfg
    action, after, seconds, changed, log = None, None, 0.0, {}, []
    try:
        if truncated:
            raise InvalidFormat(f"the reply was cut off at {cfg.max_new_tokens} tokens: be shorter")
        action = parse_reply(reply, cfg)
        handler = HANDLERS[action.name]
        outcome, feedback, after, seconds, changed = handler(state, action, task, env, log)
    except InvalidFormat as error:
        outcome, feedback = Outcome.INVALID_FORMAT, f"Your reply could not be read: {error}."
    except InvalidAction as error:
        outcome, feedback = Outcome.INVALID_ACTION, f"The action failed: {error}."
    except EditFailed as error:
        outcome, feedback = Outcome.EDIT_FAILED, f"The edit failed: {error}."
    except coder.CoderFailed as error:
        outcome, feedback = Outcome.CODER_FAILED, f"Nothing was done: {error}."
    except BudgetSpent as error:
        raise config.UserError(f"agent.coder: {error}; the same command goes on, with the same budget again") from None
    messages = [
        *state.messages,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": feedback},
    ]
    score = state.score if after is None else after
    new = replace(state, messages=messages, score=score, step=state.step + 1, **changed)
    return Transition(new, action, outcome, feedback, state.score, after, seconds, truncated, log)


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


def _writable(name: str, state: State, task: "tasks.Task") -> str:
    """The path of a file, there already or not, that may be written."""
    path = _check_name(name)
    if path in (*task.helpers(), ".", "submission.csv") or path.split("/")[0] == "data":
        raise InvalidAction(f"{path} is read-only")
    if len(state.files) >= MAX_FILES and path not in state.files:
        raise InvalidAction(f"there are {MAX_FILES} files already")
    others = (*state.files, *task.helpers(), "submission.csv")
    if any(f.startswith(f"{path}/") or path.startswith(f"{f}/") for f in others):
        raise InvalidAction(f"{path} is both a file and a directory")
    return path


def _list_files(state, action, task, env, log):
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


def _copy_file(state, action, task, env, log):
    text = _readable(action.args["source"], state, task)
    if len(text) >= MAX_FILE_CHARS:  # of data, only the start was read
        raise InvalidAction(f"{action.args['source'][:60]} is longer than {MAX_FILE_CHARS} characters")
    target = _writable(action.args["destination"], state, task)
    undo = state.undo
    if target in state.files:
        undo = {**undo, target: [*undo.get(target, []), state.files[target]]}
    files = {**state.files, target: text}
    feedback = f"Copied {action.args['source']} to {target}."
    return Outcome.OK_ACTION, feedback, None, 0.0, {"files": files, "undo": undo}


def _inspect(state, action, task, env, log):
    lines = _readable(action.args["script_name"], state, task).splitlines()
    first = max(1, action.args["start_line_number"])
    last = min(len(lines), action.args["end_line_number"], first + INSPECT_LINES - 1)
    if first > last:
        raise InvalidAction(f"lines {first}-{last} do not exist: the file has {len(lines)} lines")
    text = "\n".join(f"{i} {lines[i - 1][:500]}" for i in range(first, last + 1))
    return Outcome.OK_ACTION, cut_middle(text, env.cfg.max_output_chars), None, 0.0, {}


def _run_and_score(state, task, env, path, files, edit: bool):
    run: Experiment = env.experiment(task, files, path)
    good = run.outcome is Outcome.OK_EDIT
    outcome = Outcome.OK_ACTION if good and not edit else run.outcome
    return outcome, run.output, run.scores[counted(task, env.part)] if good else None, run.seconds


def _execute(state, action, task, env, log):
    path = _check_name(action.args["script_name"])
    if path not in state.files or not path.endswith(".py"):
        raise InvalidAction(f"there is no script {path[:60]!r}")
    return *_run_and_score(state, task, env, path, state.files, edit=False), {}


def _edit_and_run(state, path, old, new, undo, task, env):
    """Put `new` into the file `path`, run it, and show how it differs from `old`."""
    files = {**state.files, path: new}
    outcome, output, after, seconds = _run_and_score(state, task, env, path, files, edit=True)
    feedback = cut_middle(diff(old, new, path), env.cfg.max_output_chars)
    if env.cfg.edit_feedback == "run":
        feedback += f"\n\nThe script prints:\n{output}"
    return outcome, feedback, after, seconds, {"files": files, "undo": undo}


def _edit(state, action, task, env, log):
    path = target = _editable(action.args["script_name"], state, task)
    if env.cfg.edit_mode == "direct":
        new = apply_edit(state.files[path], action, env.cfg)
    else:
        target = _writable(action.args["save_name"], state, task)
        if not target.endswith(".py"):
            raise InvalidAction(f"save_name must be a Python script, not {target}")
        if not action.args["edit_instruction"].strip():
            raise InvalidAction("edit_instruction is empty")
        new = coder.write_edit(env.coder, path, state.files[path], action.args["edit_instruction"], log)
        if new.rstrip() == state.files[path].rstrip():
            raise coder.CoderFailed("the coder changed nothing")
        if len(new) > MAX_FILE_CHARS:
            raise coder.CoderFailed(f"the coder's script is longer than {MAX_FILE_CHARS} characters")
    # Under a new name: as if the script had been copied there and edited, so that an undo leaves the copy.
    earlier = state.files.get(target, state.files[path])
    undo = {**state.undo, target: [*state.undo.get(target, []), earlier]}
    return _edit_and_run(state, target, state.files[path], new, undo, task, env)


def _undo(state, action, task, env, log):
    path = _editable(action.args["script_name"], state, task)
    versions = state.undo.get(path, [])
    if not versions:
        raise InvalidAction(f"{path} has no edit to undo")
    undo = {**state.undo, path: versions[:-1]}
    return _edit_and_run(state, path, state.files[path], versions[-1], undo, task, env)


def _understand(state, action, task, env, log):
    name, question = action.args["file_name"], action.args["things_to_look_for"]
    text = _readable(name, state, task)
    if not question.strip():
        raise InvalidAction("things_to_look_for is empty")
    answer = coder.read_file(env.coder, _check_name(name), text, question, log)
    return Outcome.OK_ACTION, cut_middle(answer, env.cfg.max_output_chars), None, 0.0, {}


def _final(state, action, task, env, log):
    return Outcome.FINAL, "The episode has ended.", None, 0.0, {}


HANDLERS: dict[str, Callable] = {
    "List Files": _list_files,
    "Copy File": _copy_file,
    "Inspect Script Lines": _inspect,
    "Execute Script": _execute,
    "Edit Script": _edit,
    "Undo Edit Script": _undo,
    "Understand File": _understand,
    "Final Answer": _final,
}
assert set(HANDLERS) == set(ACTIONS)


# ----------------------------------------------------------------------------------------- episodes


def initial_state(task: "tasks.Task", env: "Environment", ideas: Iterable[str] = ()) -> State:
    """The task, its starter and the starter's output (so that the first edit has something to beat)."""
    files = task.sources()
    run = env.experiment(task, files, env.cfg.script)
    if run.outcome is not Outcome.OK_EDIT:
        output = " ".join(run.output.split())[-300:]
        raise tasks.TaskError(f"the starter of {task.name} does not run here ({run.outcome}): {output}")
    text = f"{problem_text(task, ideas)}\n\nThe starting script prints:\n{run.output}"
    message = {"role": "user", "content": text}
    return State(task.name, [message], files, run.scores[counted(task, env.part)], 0, {}, "start", task.name)


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
