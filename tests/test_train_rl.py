"""The RL script: rows, the state pool, and whole runs (resume, two ranks) in fresh processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
import train_rl
from agent import AgentConfig, State
from config import UserError
from model import ModelConfig, build_model, save_model, train_tokenizer
from train_rl import Config, Group, StatePool, across_episode, micro_batches, per_action

ROOT = Path(__file__).resolve().parent.parent
NAME = "m-concrete"


def make_state(i: int, text: str = "x = 1\n") -> dict:
    message = {"role": "user", "content": f"task {i}\nvalidation rmsle 0.3{i}"}
    state = State(NAME, [message], {"train.py": text}, 0.3, 0, {}, "expert", f"{i}.0.0")
    return state.to_row() | {"action": "Edit Script" if i % 2 else "Final Answer"}


def group(length: int, index: int = 0, row: int = 0) -> Group:
    return Group([1] * (length - 2), [[2, 3]], [row], index)


@pytest.mark.parametrize("limit", [1, 20, 64, 10_000])
def test_micro_batches_keep_every_group_within_the_limit(limit):
    groups = [group(int(n), i) for i, n in enumerate(np.random.default_rng(0).integers(3, 30, 17))]
    batches = micro_batches(groups, limit, 1)
    assert sorted(g.index for b in batches for g in b) == list(range(17))
    assert all(len(b) == 1 or len(b) * max(g.length for g in b) <= limit for b in batches)


def test_a_rank_without_work_gets_a_dummy(monkeypatch):
    monkeypatch.setattr(train_rl.dist, "all_reduce_max", lambda t: torch.tensor(3))
    batches = micro_batches([group(5)], 100, 2)
    assert len(batches) == 3
    assert batches[2][0].rows == [] and batches[2][0].actions == [[0], [0]]


def test_episodes_are_joined_and_split():
    spans = [(0, 2), (2, 3), (3, 6)]
    matrix = torch.arange(12.0).view(6, 2)
    wide = across_episode(matrix, spans)
    assert wide.shape == (3, 6)
    assert wide[0].tolist() == [0, 1, 2, 3, 0, 0] and wide[2].tolist() == [6, 7, 8, 9, 10, 11]
    assert torch.equal(per_action(wide, spans, (6, 2)), matrix)


@pytest.fixture
def prepared():
    if not tasks.load(NAME).is_prepared():
        pytest.skip("the micro tasks are not prepared: run `make data`")


def pool(rows, **keys) -> StatePool:
    return StatePool(rows, Config(run="x", agent=AgentConfig(prompt="brief"), **keys))


def test_the_pool_gives_every_state_before_any_twice(prepared):
    p = pool([make_state(i) for i in range(10)])
    drawn = [s.id for step in range(5) for s in p.draw(step, 4)]
    assert len(set(drawn[:10])) == 10 and len(set(drawn[10:])) == 10
    assert [s.id for s in p.draw(3, 4)] == drawn[12:16], "a function of the step alone"


def test_the_pool_filters_and_names_bad_rows(prepared):
    assert len(pool([make_state(i) for i in range(10)], pool_actions="edit").expert) == 5
    with pytest.raises(UserError, match="empty"):
        pool([make_state(0)], pool_actions="edit")
    with pytest.raises(UserError, match=r"line 2 .*no-such-task"):
        pool([make_state(0), make_state(1) | {"task": "no-such-task"}])
    with pytest.raises(UserError, match=r"line 1 .*train\.py"):
        pool([make_state(0) | {"files": {}}])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"advantage": "grpo"}, "samples_per_state"),
        ({"rollout": "episode", "advantage": "reinforce"}, "episode"),
        ({"sampling": train_rl.Sampling(top_p=0.9)}, "top_p"),
    ],
)
def test_impossible_combinations_are_refused(keys, reason):
    with pytest.raises(ValueError, match=reason):
        Config(run="x", **keys)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with a random model and a pool of states: enough for every line of the loop to execute."""
    if not tasks.load(NAME).is_prepared():
        pytest.skip("the micro tasks are not prepared: run `make data`")
    folder = tmp_path_factory.mktemp("rl")
    rows = [make_state(i, f"x = {i}\n" * (1 + i % 4)) for i in range(8)]
    data = folder / "runs" / "t" / "data"
    data.mkdir(parents=True)
    (data / "states.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = ["\n".join([r["messages"][0]["content"], r["files"]["train.py"], "Action: Final Answer"]) for r in rows]
    tokenizer = train_tokenizer(texts, 300)
    shape = ModelConfig("qwen2", len(tokenizer), 32, 64, 2, 2, 1, 16, tie_word_embeddings=True)
    save_model(build_model(shape, 0), folder / "runs" / "t" / "sft", tokenizer=tokenizer)
    other = folder / "sliding"  # a model that this decoder does not cover
    shutil.copytree(folder / "runs" / "t" / "sft", other)
    hf = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(hf | {"use_sliding_window": True}))
    return folder


BASE = {
    "states_per_step": 4,
    "save_every": 2,
    "epochs": 2,
    "minibatches": 2,
    "actor_lr": "1e-3",
    "critic_lr": "1e-3",
    "whiten": "false",
    "kl_coef": 0.05,
    "lam": 0.9,
    "agent.prompt": "brief",
    "agent.thought": "short",
    "agent.edit_format": "lines",
    "agent.max_new_tokens": 6,
    "agent.max_prompt_tokens": 200,
    "sandbox.allow_weak": "true",
    "sandbox.workers": 1,
    "sandbox.preload": "[]",
}


def train(folder: Path, out: str, ranks: int = 1, code: int = 0, **keys) -> subprocess.CompletedProcess:
    keys = {"run": "t", "out": out, **BASE, **keys}
    section = {"train_rl": {}}
    (folder / "c.yaml").write_text(json.dumps(section))
    args = [str(ROOT / "train_rl.py"), "--config", str(folder / "c.yaml"), *(f"{k}={v}" for k, v in keys.items())]
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ML_AGENT_DATA": str(tasks.DATA), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch + args, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(folder: Path, out: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "runs" / "t" / out / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "tokens_per_s", "experiment_s", "cache_hits")
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def weights(folder: Path, out: str, step: int) -> dict:
    from safetensors.torch import load_file

    path = folder / "runs" / "t" / out / f"step_{step}"
    tensors = load_file(path / "model.safetensors")
    critic = path / "critic"
    if critic.exists():
        for file in sorted(critic.glob("*.safetensors")):
            tensors |= {f"{file.name}:{k}": v for k, v in load_file(file).items()}
    return tensors


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
        ({"dtype": "bf16"}, "several processes"),
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
