"""Collection: the scripted expert, renamed copies, and the files that a run leaves."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

import collect
import config
import copies
import expert
import records
import tasks
from agent import Action, AgentConfig, State, apply_edit, format_reply, parse_reply
from client import Endpoint
from copies import rename
from environment import Episode, Experiment, initial_state, transition
from reward import Outcome
from run_kit import ROOT

NAMES = {"X": "features", "model": "clf", "y": "t"}
FORMATS = [AgentConfig(edit_format=f) for f in ("lines", "search_replace", "file")]


@pytest.mark.parametrize(
    ("code", "renamed"),
    [
        ("X = X[:3]\n", "features = features[:3]\n"),
        ("model.fit(X, y)\n", "clf.fit(features, t)\n"),
        ("f(model=model, y=X.y)\n", "f(model=clf, y=features.y)\n"),
        ('print("X", X)  # X\n', 'print("X", features)  # X\n'),
        ("for t2 in (X, y):\n    model = X\n", "for t2 in (features, t):\n    clf = features\n"),
        ("Xy = X_test\n", "Xy = X_test\n"),
        ("é, X = 'ü', y\n", "é, features = 'ü', t\n"),
    ],
)
def test_rename_touches_variables_alone(code, renamed):
    assert rename(code, NAMES) == renamed


def test_rename_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="tokenise"):
        rename("x = (1\n", NAMES)


@pytest.mark.parametrize("cfg", FORMATS, ids=lambda c: c.edit_format)
@pytest.mark.parametrize("name", tasks.names("micro"))
def test_every_idea_is_an_edit_in_every_format(cfg, name):
    script = tasks.load(name).sources()["train.py"]
    for idea in tasks.load(name).ideas():
        expected = tasks.apply_block(script, idea.block, idea.code)
        if expected == script:
            continue
        action = parse_reply(format_reply(expert.edit_action(script, "train.py", idea, cfg), cfg), cfg)
        assert apply_edit(script, action, cfg) == expected, idea.text


def test_a_scripted_collection_starts_without_what_takes_seconds_to_import():
    code = "import collect, sys; assert not {'torch', 'transformers', 'sklearn', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_ideas_are_drawn_from_one_to_three_axes():
    task = tasks.load("m-concrete")
    drawn = [expert.draw_ideas(task, np.random.default_rng(i)) for i in range(200)]
    assert {len(ideas) for ideas in drawn} == {1, 2, 3}
    assert all(len({idea.axis for idea in ideas}) == len(ideas) for ideas in drawn)
    assert len({ideas[0].axis for ideas in drawn}) == 3, "the order is shuffled"


def test_without_axes_one_to_three_different_ideas_are_drawn():
    pool = [idea for idea in tasks.load("m-concrete").ideas() if idea.axis == "data"][:4]
    task = tasks.load("m-concrete")
    drawn = [expert.draw_ideas(task, np.random.default_rng(i), pool, by_axis=False) for i in range(200)]
    assert {len(ideas) for ideas in drawn} == {1, 2, 3}
    assert all(len({idea.text for idea in ideas}) == len(ideas) for ideas in drawn)
    assert {idea.text for ideas in drawn for idea in ideas} == {idea.text for idea in pool}


def test_the_expert_undoes_what_made_things_worse():
    task = tasks.load("m-concrete")  # rmsle: lower is better
    cfg = AgentConfig(edit_format="lines")
    ideas = [next(i for i in task.ideas() if i.axis == axis) for axis in ("model", "learning")]

    def played(outcomes):
        """The actions of the expert when its edits give these (outcome, printed score)."""
        played = expert.ScriptedExpert(task, ideas, cfg)
        messages = [{"role": "user", "content": "start\nvalidation rmsle 0.30"}]
        state, outcome, names = State(task.name, messages, task.sources(), 0.3), None, []
        for outcome_next, text in [*outcomes, (None, "")]:
            names.append(parse_reply(played.reply(state, outcome), cfg).name)
            state, outcome = replace(state, messages=[*messages, {"role": "user", "content": text}]), outcome_next
        return names

    edit, undo, final = "Edit Script", "Undo Edit Script", "Final Answer"
    good, bad = (Outcome.OK_EDIT, "x\nvalidation rmsle 0.2"), (Outcome.OK_EDIT, "x\nvalidation rmsle 0.4")
    back = (Outcome.OK_EDIT, "x\nvalidation rmsle 0.30")
    assert played([good, good]) == [edit, edit, final]
    assert played([bad, back, good]) == [edit, undo, edit, final]
    assert played([(Outcome.SCRIPT_ERROR, "ValueError"), back, good]) == [edit, undo, edit, final]
    assert played([(Outcome.EDIT_FAILED, "no"), good]) == [edit, edit, final]


# -------------------------------------------------------------------------------------------- files


def row(score=None) -> dict:
    step = {"files": {"train.py": "x"}, "undo": {}, "reply": "r", "action": "Edit Script"}
    steps = [step | {"score": 0.2}, step | {"score": None}, step | {"score": 0.1}]
    messages = [{"role": "user", "content": "task"}]
    for _ in steps:
        messages += [{"role": "assistant", "content": "r"}, {"role": "user", "content": "o"}]
    base = {"index": 4, "copy": 0, "task": "m-concrete", "initial_score": 0.3}
    return base | {"messages": messages, "steps": steps}


def test_the_score_of_a_state_is_the_last_valid_one():
    states = records.states_of(row())
    assert [s.score for s in states] == [0.3, 0.2, 0.2]
    assert [len(s.messages) for s in states] == [1, 3, 5]
    assert [s.id for s in states] == ["4.0.0", "4.0.1", "4.0.2"]


def test_states_are_written_for_originals_only(tmp_path):
    assert collect.write_states(tmp_path) == 0, "every episode was dropped"
    trajectories = [row(), row() | {"copy": 1}, row() | {"index": 2}, row() | {"index": 10}]
    records.append_rows(tmp_path / "trajectories.jsonl", trajectories)
    assert collect.write_states(tmp_path) == 9
    rows = records.read_jsonl(tmp_path / "states.jsonl")
    assert [r["action"] for r in rows] == ["Edit Script"] * 9 and rows[1]["score"] == 0.2
    assert [r["id"] for r in rows] == [f"{index}.0.{t}" for index in (2, 4, 10) for t in range(3)], "as if none overtook"


def test_a_directory_is_one_process_at_a_time(tmp_path):
    cfg = collect.Config(run="x")
    records.claim(tmp_path, cfg)
    records.claim(tmp_path, cfg)  # the same process again
    other = "import pathlib, sys, collect, records; records.claim(pathlib.Path(sys.argv[1]), collect.Config(run='x'))"
    for folder, ending in ((tmp_path, f"UserError: another process works in {tmp_path}"), (tmp_path / "b", "")):
        done = subprocess.run([sys.executable, "-c", other, folder], cwd=ROOT, capture_output=True, text=True)
        assert ending in done.stderr and done.returncode == bool(ending)


def test_a_half_line_is_cut_off_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append_rows(path, [{"a": 1}, {"a": 2}])
    with open(path, "a") as file:
        file.write('{"a": ')
    with pytest.raises(config.UserError, match="line 3"):
        records.read_jsonl(path)
    assert records.read_jsonl(path, repair=True) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    with pytest.raises(config.UserError, match="line 2"):
        records.read_jsonl(path, repair=True)
    with pytest.raises(config.UserError, match="does not exist"):
        records.read_jsonl(tmp_path / "none.jsonl")


def test_a_resumed_log_has_no_row_from_the_future(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.append_rows(path, [{"step": i} for i in range(1, 6)])
    records.truncate_log(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_directory_belongs_to_one_configuration(tmp_path):
    cfg = collect.Config(run="x")
    records.claim(tmp_path / "d", replace(cfg, seed=5))
    records.claim(tmp_path / "d", cfg)  # nothing was made with the other seed
    (tmp_path / "d" / "trajectories.jsonl").touch()
    records.claim(tmp_path / "d", replace(cfg, trajectories=9), ignore=("trajectories",))
    with pytest.raises(config.UserError, match="seed is 0 there and 1 now"):
        records.claim(tmp_path / "d", replace(cfg, seed=1), ignore=("trajectories",))


def test_a_directory_looks_into_nested_keys(tmp_path):
    small = Endpoint("http://localhost:1/v1", "small", max_usd=1.0, price_in=1.0)
    cfg = collect.Config(run="x", endpoint=small)
    records.claim(tmp_path / "d", cfg, ignore=collect.MAY_CHANGE)
    (tmp_path / "d" / "trajectories.jsonl").touch()
    records.claim(tmp_path / "d", replace(cfg, endpoint=replace(small, max_usd=2.0)), ignore=collect.MAY_CHANGE)
    for other, message in (
        (replace(small, model="large"), "endpoint.model is 'small' there and 'large' now"),
        (replace(small, extra={"seed": 1}), "endpoint.extra.seed is None there and 1 now"),
        (None, "endpoint.model is 'small' there and None now"),
    ):
        with pytest.raises(config.UserError, match=message):
            records.claim(tmp_path / "d", replace(cfg, endpoint=other), ignore=collect.MAY_CHANGE)


def test_a_directory_older_than_a_key_has_its_default(tmp_path):
    cfg = collect.Config(run="x")
    records.claim(tmp_path / "d", cfg)
    (tmp_path / "d" / "trajectories.jsonl").touch()
    path = tmp_path / "d" / "config.yaml"
    old = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("retries", "pool", "endpoint")}
    path.write_text(yaml.safe_dump(old | {"gone": 1}))
    with pytest.raises(config.UserError, match="retries is 3 there and 4 now"):
        records.claim(tmp_path / "d", replace(cfg, retries=4))
    records.claim(tmp_path / "d", cfg)


class Scores:
    """An environment in which a script's score follows from its text."""

    def __init__(self, cfg):
        self.cfg, self.part, self.coder = cfg, "reward", None

    def experiment(self, task, files, script):
        score = 0.3 + (sum(map(ord, files[script])) % 97 - 48) / 1000
        return Experiment(Outcome.OK_EDIT, f"validation rmsle {score}", {"reward": score}, 0.5)


@pytest.mark.parametrize("keep_ideas", [False, True])
def test_the_scripted_expert_plays_as_a_plain_loop_does(keep_ideas):
    agent = AgentConfig(edit_format="lines", thought="short")
    cfg = collect.Config(run="x", seed=3, tasks=("m-concrete", "m-ames"), agent=agent, keep_ideas=keep_ideas)
    env = Scores(agent)
    collector = collect.Collector(cfg, cfg.tasks, env)
    for index in range(12):
        rng = np.random.default_rng([3, index])
        task = tasks.load(cfg.tasks[index % 2])
        ideas = expert.draw_ideas(task, rng)
        player = expert.ScriptedExpert(task, ideas, agent)
        episode = Episode(initial_state(task, env, [i.text for i in ideas] if keep_ideas else []))
        outcome = None
        while not episode.end:
            step = transition(episode.state, player.reply(episode.state, outcome), env)
            episode.add(step, cfg.max_steps, cfg.max_minutes)
            outcome = step.outcome
        (row,) = collector.play(index).rows
        assert row["messages"] == episode.state.messages and row["final_score"] == episode.state.score
        assert [i["text"] for i in row["ideas"]] == [i.text for i in ideas]
        assert " ".join(row) == (
            "index copy task ideas messages steps initial_score final_score best_score end expert seed"
        )
        assert " ".join(row["steps"][0]) == "action reply outcome score seconds files undo"


def test_without_ideas_the_scripted_expert_has_one_habit_an_axis():
    agent = AgentConfig(edit_format="lines", thought="short")
    cfg = collect.Config(run="x", tasks=("m-concrete",), agent=agent, ideas_from="none")
    collector = collect.Collector(cfg, cfg.tasks, Scores(agent))
    rows = [collector.play(index).rows[0] for index in range(40)]
    tried = {(i["axis"], i["text"]) for row in rows for i in row["ideas"]}
    first = {}
    for idea in tasks.load("m-concrete").ideas():
        first.setdefault(idea.axis, idea.text)
    assert tried == set(first.items()) and {len(row["ideas"]) for row in rows} == {1, 2, 3}


def test_the_scripted_expert_refuses_what_it_cannot_carry_out():
    task = tasks.load("m-concrete")
    text = tasks.Idea("data", "clean the columns", None, None, None)
    with pytest.raises(tasks.TaskError, match="texts without code"):
        expert.ScriptedExpert(task, [text], AgentConfig())
    with pytest.raises(tasks.TaskError, match="edit_mode = direct"):
        expert.ScriptedExpert(task, [], AgentConfig(edit_mode="instruct"))


def test_a_replay_without_experiments_left_is_no_copy():
    recorder = copies.Recorder(Scores(AgentConfig()))
    recorder.experiment(tasks.load("m-concrete"), {"train.py": "x"}, "train.py")
    replay = copies.Replay(recorder)
    assert replay.experiment() == recorder.seen[0]
    with pytest.raises(ValueError, match="no experiment"):
        replay.experiment()


def test_a_renamed_action_keeps_its_arguments():
    action = Action("Edit Script", {"script_name": "train.py"}, {"Thought": "X"}, [("X = 1", "X = y")])
    renamed = copies.rename_action(action, NAMES)
    assert renamed.edit == [("features = 1", "features = t")]
    assert (renamed.args, renamed.thought) == (action.args, action.thought)
