"""Experiments and transitions, on a real task in a real sandbox."""

import json
from dataclasses import replace

import numpy as np
import pytest

import tasks
from agent import Action, AgentConfig, State, format_reply
from environment import Environment, Episode, SandboxConfig, initial_state, run_episodes, transition
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
    task = replace(tasks.load(NAME), limits=tasks.load(NAME).limits | {"wall_s": 4, "cpu_s": 3})
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


def test_our_own_failures_are_neither_scored_nor_cached(env, start, monkeypatch):
    import sandbox

    broken = sandbox.Result("internal", -1, "", "the monitor was lost", 0.0, 0.0, 0.0, env.pool.tier)
    task = tasks.load(NAME)
    files = {"train.py": task.sources()["train.py"] + "# internal\n"}
    with monkeypatch.context() as patch:
        patch.setattr(env.pool, "submit", lambda *a, **k: type("F", (), {"result": lambda self: broken})())
        assert env.experiment(task, files, "train.py").outcome is Outcome.INTERNAL
    assert env.experiment(task, files, "train.py").outcome is Outcome.OK_EDIT


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
