"""Whole runs for tests: a run directory with a random model and a pool of states, and scripts in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from agent import State
from model import ModelConfig
from weights import build_model, save_model, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NAME = "m-concrete"
AGENT = {
    "agent.prompt": "brief",
    "agent.thought": "short",
    "agent.edit_format": "lines",
    "agent.max_new_tokens": 6,
    "agent.max_prompt_tokens": 200,
    "sandbox.allow_weak": "true",
    "sandbox.workers": 1,
    "sandbox.preload": "[]",
}
RL = {
    "states_per_step": 4,
    "save_every": 2,
    "epochs": 2,
    "minibatches": 2,
    "actor_lr": "1e-3",
    "critic_lr": "1e-3",
    "whiten": "false",
    "kl_coef": 0.05,
    "lam": 0.9,
    **AGENT,
}


def need(*names: str) -> None:
    """Skip a test whose micro tasks are not prepared."""
    for name in names:
        if not tasks.load(name).is_prepared():
            pytest.skip("the micro tasks are not prepared: run `make data`")


def make_state(i: int, text: str = "x = 1\n") -> dict:
    message = {"role": "user", "content": f"task {i}\nvalidation rmsle 0.3{i}"}
    state = State(NAME, [message], {"train.py": text}, 0.3, 0, {}, "expert", f"{i}.0.0")
    return state.to_row() | {"action": "Edit Script" if i % 2 else "Final Answer"}


def make_run(folder: Path, run: str = "t") -> Path:
    """runs/RUN with sft/ and data/states.jsonl: enough for every line of the RL loop to execute."""
    need(NAME)
    rows = [make_state(i, f"x = {i}\n" * (1 + i % 4)) for i in range(8)]
    data = folder / "runs" / run / "data"
    data.mkdir(parents=True)
    (data / "states.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = ["\n".join([r["messages"][0]["content"], r["files"]["train.py"], "Action: Final Answer"]) for r in rows]
    tokenizer = train_tokenizer(texts, 300)
    shape = ModelConfig("qwen2", len(tokenizer), 32, 64, 2, 2, 1, 16, tie_word_embeddings=True)
    save_model(build_model(shape, 0), folder / "runs" / run / "sft", tokenizer=tokenizer)
    return folder


def command(folder: Path, script: str, ranks: int = 1, **keys) -> dict:
    """Arguments of subprocess.run or Popen for one of the scripts, in `folder`, with these keys."""
    (folder / "c.yaml").write_text(json.dumps({Path(script).stem: {}}))
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [str(ROOT / script), "--config", str(folder / "c.yaml"), *(f"{k}={v}" for k, v in keys.items())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ML_AGENT_DATA": str(tasks.DATA), "PYTHONPATH": str(ROOT)}
    return {"args": launch + words, "cwd": folder, "env": env, "text": True}


def train(folder: Path, out: str, ranks: int = 1, code: int = 0, **keys) -> subprocess.CompletedProcess:
    """A finished run of train_rl.py, which must have ended with `code`."""
    keys = {"run": "t", "out": out, **RL, **keys}
    done = subprocess.run(**command(folder, "train_rl.py", ranks, **keys), capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(folder: Path, out: str) -> list[dict]:
    """metrics.jsonl of a run, without what depends on the clock and the cache."""
    rows = [json.loads(line) for line in (folder / "runs" / "t" / out / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "tokens_per_s", "experiment_s", "cache_hits")
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def weights(folder: Path, out: str, step: int) -> dict:
    """All tensors of a checkpoint, the critic's included."""
    from safetensors.torch import load_file

    path = folder / "runs" / "t" / out / f"step_{step}"
    tensors = load_file(path / "model.safetensors")
    critic = path / "critic"
    if critic.exists():
        for file in sorted(critic.glob("*.safetensors")):
            tensors |= {f"{file.name}:{k}": v for k, v in load_file(file).items()}
    return tensors
