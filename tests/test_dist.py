"""dist.py with one process and with two (gloo, CPU): what two ranks do equals what one does."""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

import dist

ROOT = Path(dist.__file__).parent
WIDTH, VOCAB, ROWS, LENGTH = 6, 11, 5, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


class Toy(nn.Module):
    """A tied embedding and head around two blocks; odd sizes, so that slices are uneven."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1)  # the critic's: one row, so that one rank holds none of it

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for block in self.layers:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        return hidden @ self.embed.weight.T, self.head(hidden)[..., 0]


def toy():
    torch.manual_seed(0)
    return Toy()


def batch():
    """Rows of different lengths, as tokens and mask."""
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(LENGTH) < torch.tensor([4, 1, 3, 2, 4])[:, None]


def loss_of(model, rows, scale=1.0):
    """The sum of token losses on some rows, over the GLOBAL count of tokens."""
    tokens, mask = batch()
    logits, values = model(tokens[rows])
    loss = -logits.log_softmax(-1).gather(-1, tokens[rows].roll(-1, 1)[..., None])[..., 0] + values**2
    return scale * torch.where(mask[rows], loss, 0.0).sum() / mask.sum()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def training_steps(model, optimizer, rows, steps):
    """Steps that also depend on every random generator."""
    norms = []
    for _ in range(steps):
        noise = 1 + 0.1 * float(torch.rand(())) + 0.1 * np.random.rand() + 0.1 * random.random()
        loss_of(model, rows, noise).backward()
        norms.append(dist.clip_grad_norm(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return norms


# ---- one process -------------------------------------------------------------------------------------------


def test_one_process_has_no_group_and_plain_modules(tmp_path):
    here = dist.init("cpu")
    assert (here.rank, here.world, here.local_rank, here.is_main) == (0, 1, 0, True)
    assert not torch.distributed.is_initialized() and here.device == torch.device("cpu")
    x = torch.tensor([1.0, 2.0])
    assert dist.all_reduce_sum(x).tolist() == dist.all_reduce_max(x).tolist() == [1, 2]
    assert dist.all_reduce_sum(x) is not x
    assert dist.gather_objects(3) == [3]
    dist.barrier()
    model = toy()
    assert dist.shard(model, torch.float32) is model and not any(isinstance(p, DTensor) for p in model.parameters())
    with dist.gathered(model):
        assert not model(batch()[0])[0].requires_grad
    full = dist.full_state_dict(model)
    assert full.keys() == model.state_dict().keys()
    dist.close()


def test_clip_grad_norm_equals_torchs():
    models = toy(), toy()
    for model in models:
        loss_of(model, slice(None)).backward()
    for max_norm in (0.1, 1e6):
        norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
        assert dist.clip_grad_norm(models[0].parameters(), max_norm) == pytest.approx(float(norm), rel=1e-5)
        for a, b in zip(*(m.parameters() for m in models)):
            torch.testing.assert_close(a.grad, b.grad)


def test_a_gradient_that_is_not_finite_is_reported_and_left_alone():
    p = nn.Parameter(torch.ones(2))
    for bad in (math.nan, math.inf):
        p.grad = torch.tensor([1.0, bad])
        assert not math.isfinite(dist.clip_grad_norm([p], 0.5)) and p.grad[0] == 1
    assert dist.clip_grad_norm([nn.Parameter(torch.ones(1))], 0.5) == 0


def test_resume_is_bit_for_bit(tmp_path):
    whole = toy()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = training_steps(whole, adamw(whole), slice(None), 4)

    first = toy()
    optimizer = adamw(first)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    norms = training_steps(first, optimizer, slice(None), 2)
    extra = {"step": 2, "kl_coef": 0.1, "order": torch.tensor([3, 1])}
    dist.save_checkpoint(tmp_path / "step_2", {"actor": first}, {"actor": optimizer}, extra,
                         export=lambda path: (path / "config.json").write_text("{}"))  # fmt: skip
    training_steps(first, optimizer, slice(None), 1)  # goes on, and moves the generators

    second = Toy()
    optimizer = adamw(second)
    got = dist.load_checkpoint(dist.find_latest(tmp_path), {"actor": second}, {"actor": optimizer})
    assert got["order"].tolist() == [3, 1] and (got["step"], got["kl_coef"]) == (2, 0.1)
    assert norms + training_steps(second, optimizer, slice(None), 2) == expected
    for a, b in zip(whole.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)
    names = sorted(p.name for p in (tmp_path / "step_2").iterdir())
    assert names == ["checkpoint.json", "config.json", "rank_0.pt"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]  # nothing temporary is left


def test_only_complete_checkpoints_are_found(tmp_path):
    assert dist.find_latest(tmp_path) is None and dist.find_latest(tmp_path / "none") is None
    model = toy()
    for step in (9, 10):
        dist.save_checkpoint(tmp_path / f"step_{step}", {"a": model}, {}, {})

    def fail(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        dist.save_checkpoint(tmp_path / "step_11", {"a": model}, {}, {}, export=fail)
    (tmp_path / "step_12").mkdir()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_x" / "checkpoint.json").write_text("{}")
    assert dist.find_latest(tmp_path) == tmp_path / "step_10"
    with pytest.raises(dist.CheckpointError, match="no complete checkpoint"):
        dist.load_checkpoint(tmp_path / "step_12", {"a": model}, {})
    dist.save_checkpoint(tmp_path / "step_10", {"a": model}, {}, {"again": True})  # over the old one
    dist.save_checkpoint(tmp_path / "step_11", {"a": model}, {}, {})  # over the leftover
    assert dist.load_checkpoint(tmp_path / "step_10", {"a": model}, {}) == {"again": True}


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    dist.save_checkpoint(tmp_path / "step_1", {"a": nn.Linear(2, 2)}, {}, {})
    for other, key in (
        (nn.Linear(2, 3, bias=False), "bias"),
        (nn.Linear(3, 2), "weight"),
        (nn.Linear(2, 2, bias=False), "bias"),
        (toy(), "bias"),
    ):
        with pytest.raises(dist.CheckpointError, match=f"another one there: {key} differs"):
            dist.load_checkpoint(tmp_path / "step_1", {"a": other}, {})
    with pytest.raises(dist.CheckpointError, match="'b' is another"):
        dist.load_checkpoint(tmp_path / "step_1", {"b": nn.Linear(2, 2)}, {})


# ---- two processes -----------------------------------------------------------------------------------------

SHARES = [[0, 1, 2, 3], [4]]  # the rows of each rank: 10 and 4 tokens


def meeting_point(world):
    """(store, variables): as torchrun does, this process serves the store, on a port that is surely free."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip


def run_ranks(worker, *args, world=2):
    """worker(rank, *args) in `world` processes with a group; a hang ends in an error within a minute."""
    _store, variables = meeting_point(world)
    mp.spawn(_start, (worker, world, variables, args), nprocs=world)


def _start(rank, worker, world, variables, args):
    os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    here = dist.init("cpu", timeout_minutes=1)
    assert (here.rank, here.world, here.is_main) == (rank, world, rank == 0)
    assert (dist.rank(), dist.world()) == (rank, world)
    worker(rank, *args)
    dist.close()


def is_sharded(model):
    return all(isinstance(p, DTensor) for p in model.parameters())


def sharded_worker(rank, path):
    model = dist.shard(toy(), torch.float32)
    assert is_sharded(model)
    total = sum(p.numel() for p in toy().parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.7 * total

    # gradients are sums over ranks, the norm is that of the whole, and so is the step
    rows = torch.tensor(SHARES[rank])
    loss_of(model, rows).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    norm = dist.clip_grad_norm(model.parameters(), 0.5)
    optimizer = adamw(model)
    optimizer.step()
    optimizer.zero_grad()
    stepped = dist.full_state_dict(model)
    assert (stepped == {}) == (rank == 1)

    # a rollout: parameters are whole, and the ranks run different numbers of forwards (rank 0: none)
    with dist.gathered(model) as whole:
        assert not any(isinstance(p, DTensor) for p in whole.parameters())
        assert whole.layers[1].linear.weight.shape == (WIDTH, WIDTH)
        for _ in range(5 * rank):
            rollout = whole(batch()[0])[0]
            assert not rollout.requires_grad
            assert not any(isinstance(p, DTensor) for p in whole.parameters())
        if rank:  # a submodule alone works too
            whole.layers[0](torch.zeros(1, WIDTH))
    assert is_sharded(model)
    with torch.no_grad():
        after = model(batch()[0])[0]
    assert is_sharded(model.layers)  # blocks reshard after a forward again
    if rank:
        torch.testing.assert_close(rollout, after)

    # a rollout that fails leaves a model that trains
    with pytest.raises(RuntimeError, match="sampling"), dist.gathered(model):
        raise RuntimeError("sampling")
    assert is_sharded(model)
    loss_of(model, rows).backward()
    optimizer.step()
    optimizer.zero_grad()
    again = dist.full_state_dict(model)

    # a rank whose rows are all masked takes part and adds nothing
    (loss_of(model, rows) * (rank == 1)).backward()
    masked = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save((gradients, norm, stepped, after, again, masked), path / "sharded.pt")

    # bf16 compute over fp32 masters; the very first use is a rollout
    model = dist.shard(toy(), torch.bfloat16)
    assert model.embed.weight.dtype == torch.float32
    with dist.gathered(model):
        assert model.embed.weight.dtype == model.layers[0].linear.weight.dtype == torch.bfloat16
        assert rank or model(batch()[0])[0].dtype == torch.bfloat16
    loss_of(model, rows).backward()
    assert model.embed.weight.grad.dtype == torch.float32

    with pytest.raises(AssertionError, match="shard"):
        plain = toy()
        loss_of(plain, rows).backward()
        dist.clip_grad_norm(plain.parameters(), 0.5)


def test_two_ranks_train_as_one_process_does(tmp_path):
    run_ranks(sharded_worker, tmp_path)
    gradients, norm, stepped, after, again, masked = torch.load(tmp_path / "sharded.pt")
    model = toy()
    optimizer = adamw(model)
    loss_of(model, slice(None)).backward()
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, msg=name)
    assert norm == pytest.approx(dist.clip_grad_norm(model.parameters(), 0.5), rel=1e-5) and norm > 0.5
    optimizer.step()
    optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stepped[name], tensor, msg=name)
    torch.testing.assert_close(after, model(batch()[0])[0])
    loss_of(model, slice(None)).backward()
    optimizer.step()
    optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, msg=name)
    loss_of(model, torch.tensor(SHARES[1])).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(masked[name], p.grad, msg=name)


def checkpoint_worker(rank, path):
    def seed():
        torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)

    def export(directory):
        full = dist.full_state_dict(model)
        if rank == 0:
            torch.save(full, directory / "whole.pt")

    rows = torch.tensor(SHARES[rank])
    model = dist.shard(toy(), torch.float32)
    optimizer = adamw(model)
    seed()
    expected = training_steps(model, optimizer, rows, 4)
    whole = [p.to_local().clone() for p in model.parameters()]

    model = dist.shard(toy(), torch.float32)
    optimizer = adamw(model)
    seed()
    norms = training_steps(model, optimizer, rows, 2)
    dist.save_checkpoint(path / "step_2", {"m": model}, {"o": optimizer}, {"rank": rank}, export)
    if rank == 0:
        stored = torch.load(path / "step_2" / "whole.pt")
        assert {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in toy().state_dict().items()}

    torch.manual_seed(99)
    model = dist.shard(Toy(), torch.float32)
    optimizer = adamw(model)
    assert dist.load_checkpoint(path / "step_2", {"m": model}, {"o": optimizer}) == {"rank": rank}
    assert norms + training_steps(model, optimizer, rows, 2) == expected
    assert all(torch.equal(a, b.to_local()) for a, b in zip(whole, model.parameters()))


def test_two_ranks_resume_bit_for_bit_and_one_is_refused(tmp_path):
    run_ranks(checkpoint_worker, tmp_path)
    refusal = r"saved by 2 process\(es\), this run has 1: resume with as many"
    with pytest.raises(dist.CheckpointError, match=refusal):
        dist.load_checkpoint(tmp_path / "step_2", {}, {})


def small_worker(rank):
    x = torch.tensor([rank + 1.0, -rank])
    assert dist.all_reduce_sum(x).tolist() == [3, -1] and dist.all_reduce_max(x).tolist() == [2, 0]
    assert x.tolist() == [rank + 1, -rank]  # untouched
    assert dist.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]

    # a signal that one rank got stops all at the same step; handlers come back
    before = signal.getsignal(signal.SIGTERM)
    with dist.graceful_stop() as stop_requested:
        for step in range(10):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # forwarded twice: not a second wish
            if signum := stop_requested():
                break
    assert (step, signum) == (3, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_small_collectives_and_graceful_stop():
    run_ranks(small_worker)


def test_a_second_signal_stops_at_once(monkeypatch):
    with pytest.raises(KeyboardInterrupt), dist.graceful_stop() as stop_requested:
        assert stop_requested() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested() == signal.SIGINT
        late = time.monotonic() + 10
        monkeypatch.setattr(dist.time, "monotonic", lambda: late)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_hang_shows_its_stack_and_ends_with_an_error():
    """Rank 1 never comes: SIGUSR1 shows where rank 0 waits for it, then the time limit ends the run."""
    script = textwrap.dedent("""
        import sys, time, torch, dist
        here = dist.init("cpu", timeout_minutes=0.08)
        print("ready", flush=True)
        time.sleep(60) if here.rank else dist.barrier()
        """)
    _store, variables = meeting_point(2)
    env = os.environ | variables
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, **pipe) for rank in (0, 1)]
    try:
        for process in ranks:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGUSR1)
        _, err = ranks[0].communicate(timeout=30)
        assert ranks[0].returncode == 1
        stack, _, error = err.partition("Traceback (most recent call last)")
        assert "in barrier" in stack and "in barrier" in error and "imed out" in error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
