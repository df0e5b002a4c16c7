"""Experiments and transitions, on a real task in a real sandbox."""

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import environment
import sandbox
import tasks
from agent import Action, AgentConfig, State, format_reply
from environment import Environment, Episode, Experiment, SandboxConfig, initial_state, run_episodes, transition
from expert import ScriptedExpert, draw_ideas, edit_action
from reward import Outcome

CFG = AgentConfig(thought="short", edit_format="lines", prompt="brief")
BOX = SandboxConfig(allow_weak=True, workers=2)
NAME = "m-concrete"

pytestmark = pytest.mark.skipif(
    not tasks.load(NAME).is_prepared(), reason="the micro tasks are not prepared: run `make data`"
)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    with Environment(CFG, BOX, tmp_path_factory.mktemp("cache")) as env:
        yield env


@pytest.fixture
def start(env) -> State:
    return initial_state(tasks.load(NAME), env)


def say(name: str, **args) -> str:
    return format_reply(Action(name, args, {"Thought": "try"}), CFG)


def lines(first: int, last: int, code: str) -> str:
    args = {"script_name": "train.py", "start_line_number": first, "end_line_number": last}
    return format_reply(Action("Edit Script", args, {"Thought": "try"}, code), CFG)


def test_the_start_has_the_measured_score(start):
    assert start.score == pytest.approx(tasks.load(NAME).initial_score["reward"], rel=1e-3)
    assert start.messages[0]["content"].splitlines()[-1].startswith("validation ")


def improving(state: State) -> str:
    idea = next(i for i in tasks.load(NAME).ideas() if i.text == "use a random forest")
    return format_reply(edit_action(state.files["train.py"], "train.py", idea, CFG), CFG)


def test_an_edit_runs_and_scores_and_its_undo_restores(env, start):
    edited = transition(start, improving(start), env)
    assert edited.outcome is Outcome.OK_EDIT
    assert tasks.load(NAME).better(edited.after, edited.before)
    assert edited.state.score == edited.after and edited.before == start.score
    undone = transition(edited.state, say("Undo Edit Script", script_name="train.py"), env)
    assert undone.outcome is Outcome.OK_EDIT
    assert undone.state.files == start.files
    assert (undone.before, undone.after) == (edited.after, start.score)
    again = transition(undone.state, say("Undo Edit Script", script_name="train.py"), env)
    assert again.outcome is Outcome.INVALID_ACTION


def test_what_is_long_is_cut_for_the_prompt_and_not_copied_in_part(env, start, monkeypatch):
    wide = replace(start, files={**start.files, "wide.py": "\n".join(f"{i} = '{'x' * 400}'" for i in range(90))})
    look = say("Inspect Script Lines", script_name="wide.py", start_line_number=1, end_line_number=90)
    seen = transition(wide, look, env)
    assert seen.outcome is Outcome.OK_ACTION and "[...]" in seen.feedback
    assert len(seen.feedback) < CFG.max_output_chars + 20
    data = min((path for path in tasks.load(NAME).public.iterdir()), key=lambda path: path.stat().st_size)
    copying = say("Copy File", source=f"data/{data.name}", destination="d.csv")
    assert transition(start, copying, env).outcome is Outcome.OK_ACTION
    monkeypatch.setattr(environment, "MAX_FILE_CHARS", 50)
    refused = transition(start, copying, env)
    assert refused.outcome is Outcome.INVALID_ACTION and "longer than 50" in refused.feedback


def test_an_experiment_takes_as_many_workers_as_it_has_threads(env):
    """Beside each other never more threads than workers, whatever mix asks; one with too many runs alone."""
    pool = Environment.__new__(Environment)
    pool.workers = pool.free = 4
    pool.changed, busy, most, lock = threading.Condition(), [0], [0], threading.Lock()

    def work(threads: int):
        with pool.threads_of(sandbox.Limits(threads=threads)):
            with lock:
                busy[0] += min(threads, 4)
                most[0] = max(most[0], busy[0])
            time.sleep(0.005)
            with lock:
                busy[0] -= min(threads, 4)

    with ThreadPoolExecutor(16) as many:
        list(many.map(work, [1, 2, 3, 4, 8] * 8))
    assert most[0] == 4 and pool.free == 4


def test_a_run_may_allow_less_cpu_time_than_the_task(env, start, tmp_path):
    loop = lines(1, 1, "while True: pass")
    with Environment(CFG, replace(BOX, cpu_s=1.0), tmp_path) as hasty:
        stopped = transition(start, loop, hasty)
        assert stopped.outcome is Outcome.TIMEOUT and "more than 1 s of CPU time" in stopped.feedback
        assert hasty.limits_of(replace(tasks.load(NAME), limits={"cpu_s": 0.5})).cpu_s == 0.5, "never more than the task"
        assert hasty.limits_of(replace(tasks.load(NAME), limits={"wall_s": 9})).cpu_s == 1
        hasty.cpu_s = 2.0
        assert "more than 2 s" in transition(start, loop, hasty).feedback, "not the remembered time-out of 1 s"
        hasty.cpu_s = None
        assert hasty.limits_of(tasks.load(NAME)).cpu_s == tasks.load(NAME).limits["cpu_s"]
    with pytest.raises(ValueError, match="cpu_s"):
        SandboxConfig(cpu_s=0)


def test_a_starter_that_does_not_run_is_one_line(env, monkeypatch):
    monkeypatch.setattr(tasks.Task, "sources", lambda task: {"train.py": "1 / 0"})
    with pytest.raises(tasks.TaskError, match=r"starter of m-concrete does not run here \(script_error\).*ZeroDivision"):
        initial_state(tasks.load(NAME), env)


def test_states_survive_json(env, start):
    edited = transition(start, improving(start), env).state
    row = json.loads(json.dumps(edited.to_row()))
    assert State(**row) == edited


def test_a_submission_left_by_an_earlier_run_does_not_count(env, start):
    count = len(start.files["train.py"].splitlines())
    step = transition(start, lines(1, count, "print('nothing')"), env)
    assert step.outcome is Outcome.BAD_SUBMISSION
    assert step.after is None and step.state.score == start.score


CASES = [
    (lambda n: "hello", Outcome.INVALID_FORMAT),
    (lambda n: say("Execute Script", script_name="../x.py"), Outcome.INVALID_ACTION),
    (lambda n: say("Execute Script", script_name="missing.py"), Outcome.INVALID_ACTION),
    (lambda n: say("Copy File", source="/etc/passwd", destination="a.py"), Outcome.INVALID_ACTION),
    (lambda n: say("Copy File", source="train.py", destination="helper.py"), Outcome.INVALID_ACTION),
    (lambda n: say("Copy File", source="train.py", destination="helper.py/x.py"), Outcome.INVALID_ACTION),
    (lambda n: say("Copy File", source="train.py", destination="submission.csv/x.py"), Outcome.INVALID_ACTION),
    (lambda n: say("List Files", dir_path="../private"), Outcome.INVALID_ACTION),
    (lambda n: say("List Files", dir_path="data/../../private"), Outcome.INVALID_ACTION),
    (lambda n: lines(n, n + 1, "x"), Outcome.EDIT_FAILED),
    (lambda n: lines(1, 1, "1 / 0"), Outcome.SCRIPT_ERROR),
    (lambda n: lines(1, 1, "def (:"), Outcome.SCRIPT_ERROR),
    (lambda n: lines(1, 1, "while True: pass"), Outcome.TIMEOUT),
    (lambda n: lines(1, 1, "x = bytearray(4 << 30)"), Outcome.OUT_OF_MEMORY),
    (lambda n: say("List Files", dir_path="."), Outcome.OK_ACTION),
    (lambda n: say("List Files", dir_path="data"), Outcome.OK_ACTION),
    (lambda n: say("Copy File", source="train.py", destination="b.py"), Outcome.OK_ACTION),
    (lambda n: say("Execute Script", script_name="train.py"), Outcome.OK_ACTION),
    (lambda n: say("Final Answer", final_answer="done"), Outcome.FINAL),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_outcome_is_decided_here(env, start, case, monkeypatch):
    task = replace(tasks.load(NAME), limits=tasks.load(NAME).limits | {"wall_s": 600, "cpu_s": 3})  # a busy machine
    monkeypatch.setattr(tasks, "load", lambda name: task)
    reply, outcome = CASES[case]
    step = transition(start, reply(len(start.files["train.py"].splitlines())), env)
    if outcome is Outcome.OUT_OF_MEMORY and step.outcome is Outcome.SCRIPT_ERROR:
        assert "MemoryError" in step.feedback  # refused by the limit before it was used
    else:
        assert step.outcome is outcome, step.feedback
    assert step.feedback and step.state.messages[-1]["content"] == step.feedback


def test_a_cut_off_reply_is_invalid_whatever_it_says(env, start):
    step = transition(start, say("Final Answer", final_answer="x"), env, truncated=True)
    assert step.outcome is Outcome.INVALID_FORMAT and "cut off" in step.feedback


def test_equal_experiments_run_once(env, start, monkeypatch):
    calls = []
    real = env._run
    monkeypatch.setattr(env, "_run", lambda *args: calls.append(1) or real(*args))
    reply = lines(1, 1, "import numpy as np  # once")
    steps = [f.result() for f in [env.submit(start, reply) for _ in range(6)]]
    assert len({s.after for s in steps}) == 1 and len(calls) == 1
    with Environment(CFG, BOX, env.cache_dir, part="eval") as other:
        again = transition(start, reply, other)
    assert again.outcome is Outcome.OK_EDIT and again.after != steps[0].after  # the other half of the answers
    assert len(calls) == 1


def answer_with(result: sandbox.Result):
    """A stand-in for Pool.submit."""
    future = Future()
    future.set_result(result)
    return lambda *args, **keys: future


def test_our_own_failures_are_neither_scored_nor_cached(env, start, monkeypatch):
    broken = sandbox.Result("internal", -1, "", "the monitor was lost", 0.0, 0.0, 0.0, env.pool.tier)
    task = tasks.load(NAME)
    files = {"train.py": task.sources()["train.py"] + "# internal\n"}
    with monkeypatch.context() as patch:
        patch.setattr(env.pool, "submit", answer_with(broken))
        assert env.experiment(task, files, "train.py").outcome is Outcome.INTERNAL
    assert env.experiment(task, files, "train.py").outcome is Outcome.OK_EDIT


def test_a_cpu_limit_that_follows_from_the_wall_limit_is_named(env, monkeypatch):
    slow = sandbox.Result("cpu", None, "epoch 1", "", 9.0, 60.0, 100.0, env.pool.tier)
    monkeypatch.setattr(env.pool, "submit", answer_with(slow))
    task = replace(tasks.load(NAME), limits={"wall_s": 30, "threads": 2})
    run = env.experiment(task, {"train.py": "# slow\n"}, "train.py")
    assert run.output.splitlines()[-1] == "The script was stopped: it used more than 60 s of CPU time."


def outcomes_and_runs(env, limits: dict, name: str, monkeypatch) -> tuple[list[Experiment], int]:
    """The same endless script twice, under these limits: both results, and how often it ran."""
    task = replace(tasks.load(NAME), limits=tasks.load(NAME).limits | limits)
    runs, real = [], env._run
    with monkeypatch.context() as patch:
        patch.setattr(env, "_run", lambda *args: runs.append(1) or real(*args))
        files = {"train.py": f"print('{name}', flush=True)\nwhile True: pass\n"}
        return [env.experiment(task, files, "train.py") for _ in range(2)], len(runs)


def test_timeouts_by_cpu_time_are_kept_and_by_the_clock_tried_again(env, monkeypatch):
    (first, second), runs = outcomes_and_runs(env, {"wall_s": 600, "cpu_s": 1}, "cpu", monkeypatch)
    assert first == second and runs == 1
    assert (first.outcome, first.reason) == (Outcome.TIMEOUT, "cpu")
    assert first.output.endswith("The script was stopped: it used more than 1 s of CPU time.")
    (first, second), runs = outcomes_and_runs(env, {"wall_s": 1, "cpu_s": 60}, "wall", monkeypatch)
    assert (first.outcome, first.reason, runs) == (Outcome.TIMEOUT, "wall", 2)


def test_results_cached_before_they_had_a_reason_are_still_read(env, start):
    task, files = tasks.load(NAME), {"train.py": start.files["train.py"] + "# old\n"}
    new = env.experiment(task, files, "train.py")
    assert new.reason == "ok"
    path = max(env.cache_dir.rglob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    row = json.loads(path.read_text())
    assert row.pop("reason") == "ok"
    path.write_text(json.dumps(row))
    assert env.experiment(task, files, "train.py") == replace(new, reason="")


def test_an_episode_of_the_scripted_expert(env):
    task = tasks.load(NAME)
    experts = [ScriptedExpert(task, draw_ideas(task, np.random.default_rng(i)), CFG) for i in range(3)]
    episodes = [Episode(initial_state(task, env)) for _ in experts]
    last = {}

    def act(active):
        for i, episode in enumerate(active):
            expert = experts[episodes.index(episode)]
            outcome = episode.steps[-1].outcome if episode.steps else None
            yield i, expert.reply(episode.state, outcome), False

    for episode in run_episodes(episodes, act, env, max_steps=8, max_minutes=5):
        last[id(episode)] = episode.end
    assert set(last.values()) == {"final"}
    for episode in episodes:
        assert episode.state.step == len(episode.steps) <= 7
        printed = [s.state.score for s in episode.steps]
        assert printed[-1] is not None


def test_episodes_end_at_the_step_limit(env, start):
    def act(active):
        for i in range(len(active)):
            yield i, say("List Files", dir_path="."), False

    episodes = [Episode(start), Episode(start)]
    assert [e.end for e in run_episodes(episodes, act, env, 3, 5)] == ["steps", "steps"]
    assert all(len(e.steps) == 3 for e in episodes)
