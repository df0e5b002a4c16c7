"""The RL script: rows, the state pool, and whole runs (resume, two ranks) in fresh processes."""

import json
import shutil

import numpy as np
import pytest
import torch

import train_rl
from agent import AgentConfig, State
from config import UserError
from environment import Transition
from reward import Outcome
from rollout import Rollout
from run_kit import NAME, make_run, make_state, metrics, need, train, weights
from train_rl import Config, StatePool


@pytest.fixture
def prepared():
    need(NAME)


def pool(rows, **keys) -> StatePool:
    return StatePool(rows, Config(run="x", agent=AgentConfig(prompt="brief"), **keys))


def always(state: State) -> bool:
    return True


def test_in_place_of_a_state_that_does_not_fit_comes_another(prepared):
    p = pool([make_state(i) for i in range(10)])

    def fits(state: State) -> bool:
        return state.id not in ("3.0.0", "7.0.0")

    drawn, free = ([s.id for step in range(5) for s in p.draw(step, 4, f)] for f in (fits, always))
    assert {"3.0.0", "7.0.0"} & set(free) and not {"3.0.0", "7.0.0"} & set(drawn)
    assert all(a == b for a, b in zip(drawn, free) if b not in ("3.0.0", "7.0.0")), "the others stay in their places"
    with pytest.raises(UserError, match="max_prompt_tokens"):
        p.draw(0, 4, lambda state: False)


def test_the_pool_gives_every_state_before_any_twice(prepared):
    p = pool([make_state(i) for i in range(10)])
    drawn = [s.id for step in range(5) for s in p.draw(step, 4, always)]
    assert len(set(drawn[:10])) == 10 and len(set(drawn[10:])) == 10
    assert [s.id for s in p.draw(3, 4, always)] == drawn[12:16], "a function of the step alone"


def test_the_pool_filters_and_names_bad_rows(prepared):
    assert len(pool([make_state(i) for i in range(10)], pool_actions="edit").expert) == 5
    with pytest.raises(UserError, match="empty"):
        pool([make_state(0)], pool_actions="edit")
    with pytest.raises(UserError, match=r"line 2 .*no-such-task"):
        pool([make_state(0), make_state(1) | {"task": "no-such-task"}])
    with pytest.raises(UserError, match=r"line 1 .*train\.py"):
        pool([make_state(0) | {"files": {}}])


def test_the_pool_remembers_where_edits_that_ran_have_led(prepared):

    class Fits:
        fits = staticmethod(lambda state: state.messages[0]["content"] != "too long")

    def acted(outcome, step=1, text="task"):
        message = {"role": "user", "content": text}
        state = State(NAME, [message], {"train.py": "x = 1\n"}, 0.3, step, {}, "expert", f"{outcome}.{step}")
        reached = Transition(state, None, outcome, "", 0.3, None)
        return Rollout(state, [], [], [], "stop", reached)

    rollouts = [acted(o) for o in Outcome for _ in range(3)]
    rollouts += [acted(Outcome.OK_EDIT, step=3), acted("ok_edit", text="too long")]
    off, on = (pool([make_state(0)], own_share=share, states_per_step=5, max_steps=3) for share in (0.0, 0.5))
    off.remember(rollouts, Fits())
    on.remember(rollouts, Fits())
    assert off.own == [] and [s.id for s in on.own] == ["ok_edit.1"] * 3
    assert {s.source for s in on.own} == {"policy"}
    drawn = on.draw(0, 200, always)
    assert 60 < sum(s.source == "policy" for s in drawn) < 140
    assert all(s.source == "expert" for s in on.draw(0, 200, always, salt=100)), "evaluation keeps to the expert's"
    for _ in range(8):
        on.remember(rollouts, Fits())
    assert len(on.own) == 20, "four steps of five states"


def test_a_learning_rate_rises_from_the_first_update_on():
    assert [train_rl.learning_rate(2.0, step, 3) for step in range(-2, 6)] == [0, 0, 0.5, 1, 1.5, 2, 2, 2]
    assert train_rl.learning_rate(2.0, 0, 0) == 2


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"advantage": "grpo"}, "samples_per_state"),
        ({"rollout": "episode", "advantage": "reinforce"}, "episode"),
        ({"sampling": train_rl.Sampling(top_p=0.9)}, "top_p"),
        ({"save_every": 0}, "save_every must be positive"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be positive"),
    ],
)
def test_impossible_combinations_are_refused(keys, reason):
    with pytest.raises(ValueError, match=reason):
        Config(run="x", **keys)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: train_rl.Sampling(max_batch=0), "max_batch"),
        (lambda: train_rl.Sampling(temperature=-1), "temperature"),
        (lambda: train_rl.RewardConfig(clip=(1.0, -1.0)), "lower bound comes first"),
    ],
)
def test_values_without_meaning_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with a random model and a pool of states: enough for every line of the loop to execute."""
    need(NAME)
    folder = tmp_path_factory.mktemp("rl")
    make_run(folder)
    other = folder / "sliding"  # a model that this decoder does not cover
    shutil.copytree(folder / "runs" / "t" / "sft", other)
    hf = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(hf | {"use_sliding_window": True}))
    return folder


def test_four_steps_equal_two_plus_resume_plus_two_bit_for_bit(run_dir):
    train(run_dir, "whole", steps=4)
    train(run_dir, "halves", steps=2)
    train(run_dir, "halves", steps=4)
    assert metrics(run_dir, "whole") == metrics(run_dir, "halves")
    one, two = weights(run_dir, "whole", 4), weights(run_dir, "halves", 4)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    first = weights(run_dir, "whole", 0)
    moved = [k for k in first if k in one and not torch.equal(first[k], one[k])]
    assert len(moved) > 10, "training moves the weights"
    rows = metrics(run_dir, "whole")
    assert abs(rows[0]["ratio_first"] - 1) < 1e-5, "the ratio is 1 at the first update"
    assert rows[0]["mismatch_kl"] < 1e-5, "sampler and trainer agree"


def close(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max((one[k] - two[k]).abs().max().item() for k in one)


def test_micro_batch_size_does_not_matter(run_dir):
    train(run_dir, "whole_mb", steps=2)
    train(run_dir, "tiny_mb", steps=2, micro_batch_tokens=1)
    assert close(weights(run_dir, "whole_mb", 2), weights(run_dir, "tiny_mb", 2)) < 2e-5


def test_one_rank_equals_two(run_dir):
    train(run_dir, "one", steps=2)
    train(run_dir, "two", ranks=2, steps=2)
    assert close(weights(run_dir, "one", 2), weights(run_dir, "two", 2)) < 2e-5
    a, b = metrics(run_dir, "one"), metrics(run_dir, "two")
    assert [r["reward"] for r in a] == [r["reward"] for r in b]
    assert np.allclose([r["kl"] for r in a], [r["kl"] for r in b], atol=1e-5)
    error = train(run_dir, "two", steps=4, code=2).stderr  # two ranks' checkpoint, one rank
    assert "2 process" in error


def test_one_process_in_bf16_keeps_fp32_masters_and_resumes_bit_for_bit(run_dir):
    train(run_dir, "bf16", steps=2, dtype="bf16")
    train(run_dir, "bf16_halves", steps=1, dtype="bf16")
    train(run_dir, "bf16_halves", steps=2, dtype="bf16")
    one, two = weights(run_dir, "bf16", 2), weights(run_dir, "bf16_halves", 2)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {t.dtype for t in one.values()} == {torch.float32}
    train(run_dir, "fp32", steps=2)
    exact, rounded = metrics(run_dir, "fp32")[0], metrics(run_dir, "bf16")[0]
    assert rounded["ratio_first"] == pytest.approx(1, abs=1e-3)
    assert abs(rounded["mismatch_kl"]) < 1e-2, "sampler and trainer compute in bf16, and nearly agree"
    assert rounded["entropy"] != exact["entropy"], "it is bf16"
    assert rounded["entropy"] == pytest.approx(exact["entropy"], rel=0.02)


@pytest.mark.parametrize(
    "keys",
    [
        {"advantage": "grpo", "samples_per_state": 3},
        {"advantage": "reinforce", "kl_in": "loss"},
        {"rollout": "episode", "max_steps": 3, "agent.max_prompt_tokens": 900},
        {"own_share": 0.5, "tis_clip": 2.0, "dual_clip": 3.0, "kl_target": 0.1, "entropy_coef": 0.01},
        {"reward.name": "milestone", "reward.clip": "null", "loss_agg": "seq_mean_token_sum_norm"},
    ],
)
def test_every_variant_runs_and_moves_the_weights(run_dir, keys):
    out = "v" + "_".join(map(str, keys.values())).replace(".", "")
    train(run_dir, out, steps=1, **keys)
    moved = close_or_none(weights(run_dir, out, 0), weights(run_dir, out, 1))
    rewards = [r["reward"] for r in metrics(run_dir, out)]
    assert len(rewards) == 1 and np.isfinite(rewards[0])
    if "advantage" in keys:  # a random model's actions all pay -1: equal to their baseline, so nothing to learn
        assert moved == 0
    else:
        assert moved > 0


def close_or_none(one: dict, two: dict) -> float:
    return max((one[k] - two[k]).abs().max().item() for k in one if k in two)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"init": "nowhere/at/all"}, "nowhere"),
        ({"states_per_step": 0}, "states_per_step"),
        ({"stepz": 3}, "stepz"),
        ({"steps": "many"}, "steps"),
        ({"agent.max_prompt_tokens": 3}, "max_prompt_tokens"),
        ({"run": "other"}, "other"),
        ({"init": "sliding"}, "sliding-window"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_dir, keys, reason):
    error = train(run_dir, f"bad_{reason}", code=2, **{"steps": 1, **keys}).stderr
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and reason in lines[0], error


def test_a_directory_of_another_run_is_refused(run_dir):
    train(run_dir, "claimed", steps=1)
    error = train(run_dir, "claimed", code=2, steps=1, gamma=0.5).stderr
    assert "gamma" in error and "another run" in error
