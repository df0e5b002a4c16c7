"""Evaluation: the arithmetic of its tables against plain loops, and which models it finds."""

import json
import math
from pathlib import Path

import pytest

import evaluate
import tasks
from config import UserError
from evaluate import Config, draw, find_models, make_results, mean_over_tasks, summarise_task, to_markdown

UP, DOWN = "m-digits", "m-concrete"  # accuracy; rmsle


def row(task: str, k: int, score: float, valid=3, actions=4) -> dict:
    return {"task": task, "k": k, "score": score, "best": score, "valid": valid, "actions": actions, "edits": 2}


def test_a_task_is_summarised_as_a_loop_would():
    task = tasks.load(DOWN)
    m0, best = task.initial_score["eval"], task.best_score
    scores = [m0, m0 - 0.05, m0 + 0.02]
    summary = summarise_task(task, [row(DOWN, k, s) for k, s in enumerate(scores)])
    gains = [(s - m0) / (best - m0) for s in scores]
    mean = sum(gains) / 3
    error = math.sqrt(sum((g - mean) ** 2 for g in gains) / 2) / math.sqrt(3)
    assert summary["gain"] == pytest.approx(mean) and summary["gain_se"] == pytest.approx(error)
    assert summary["best"] == m0 - 0.05, "lower is better"
    assert summary["best_gain"] == pytest.approx(gains[1])
    assert summary["delta"] == pytest.approx(sum(-(s - m0) / m0 for s in scores) / 3)
    assert summary["valid"] == 0.75 and summary["edits"] == 2 and summary["k"] == 3


def test_one_episode_has_no_standard_error():
    assert math.isnan(evaluate.mean_error([0.3])[1]) and evaluate.mean_error([1.0, 3.0]) == (2.0, 1.0)
    for keys in ({"episodes": 0}, {"max_steps": 0}, {"draws": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            Config(run="x", **keys)


def test_higher_is_better_has_the_other_sign():
    task = tasks.load(UP)
    m0 = task.initial_score["eval"]
    summary = summarise_task(task, [row(UP, 0, m0), row(UP, 1, m0 + 0.1)])
    assert summary["best"] == m0 + 0.1 and summary["delta"] > 0 and summary["gain"] > 0


def test_means_over_tasks_and_their_errors():
    a = {"k": 2, "gain": 0.2, "gain_se": 0.3, "best_gain": 0.4, "delta": 0.0, "valid": 1.0, "edits": 1.0}
    b = a | {"gain": 0.4, "gain_se": 0.4}
    mean = mean_over_tasks([a, b])
    assert mean["gain"] == pytest.approx(0.3)
    assert mean["gain_se"] == pytest.approx(math.sqrt(0.3**2 + 0.4**2) / 2)
    nothing = a | {"k": 0, "gain": float("nan")}
    assert mean_over_tasks([a, b, nothing]) == mean, "a task that never ran does not wipe the mean"
    assert mean_over_tasks([]) == {}


def test_tables_and_picture(tmp_path):
    cfg = Config(run="x", episodes=2)
    played = {
        "sft": [row(UP, 0, 0.7), row(UP, 1, 0.8), row(DOWN, 0, 0.3), row(DOWN, 1, 0.25)],
        "rl": [row(UP, 0, 0.9), row(UP, 1, 0.9), row(DOWN, 0, 0.2)],
    }
    ideas = {n: {"idea": "an idea", "score": tasks.load(n).best_score} for n in (UP, DOWN)}
    part = {"reward": 0.1, "valid_share": 1.0, "edit_share": 0.5}
    steps = {"rl": {"heldin": part, "heldout": part}}
    results = make_results(played, ideas, steps, [UP], [DOWN])
    text = to_markdown(json.loads(json.dumps(results)), cfg)
    assert "| sft | " in text and "| best single idea | +1.000 | +1.000 |" in text
    assert f"| {UP} | accuracy ↑ |" in text and f"| {DOWN} | rmsle ↓ |" in text
    draw(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_models_are_found_by_step_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        find_models(Config(run="t"))
    for name in ("sft", "rl/step_9", "rl/step_10", "rl/step_11"):
        Path("runs/t", name).mkdir(parents=True)
        if name != "rl/step_11":  # a save that was killed
            Path("runs/t", name, "config.json").write_text("{}")
    assert find_models(Config(run="t")) == {"sft": "runs/t/sft", "rl": "runs/t/rl/step_10"}
    with pytest.raises(UserError, match=r"models\.mine"):
        find_models(Config(run="t", models={"mine": "runs/t/nowhere"}))


def test_an_episode_without_a_score_keeps_the_starters():
    task = tasks.load(DOWN)
    step = type("S", (), {"after": None, "outcome": evaluate.Outcome.FINAL, "state": None, "coder": []})
    state = type("State", (), {"messages": [{"content": "r"}, {"content": "o"}]})
    step.state = state
    episode = type("E", (), {"steps": [step], "end": "final"})
    row = evaluate.episode_row(task, episode, 0)
    assert row["score"] == row["best"] == task.initial_score["eval"]
    assert (row["actions"], row["valid"], row["edits"]) == (1, 1, 0)
