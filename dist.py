"""Processes, FSDP2 and checkpoints. Every collective of the repository is in this file.

    python train_rl.py ...                             one process: plain modules, no process group, nothing to set up
    torchrun --nproc_per_node 8 train_rl.py ...        one process per GPU (gloo on a machine without)
    torchrun --nnodes 2 ... train_rl.py ...            the same over nodes; checkpoints need a shared file system

A collective is a call that every rank must make, the same ones in the same order, whatever its data: never return
early or skip a step on one rank alone. The functions that are collectives say so. Three habits keep ranks in step:
a rank without work still takes part (masked dummy rows, zeros), the number of micro-batches is made equal with
all_reduce_max, and a rollout runs under `gathered`, where nothing communicates.

A hang: a collective that waits longer than `timeout_minutes` ends the run with an error. To see where a process is,
`kill -USR1 PID` prints the stack of all its threads.
"""

import contextlib
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Dist:
    """Who this process is."""

    rank: int
    world: int
    local_rank: int  # rank within its machine
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def init(device=None, timeout_minutes=60):
    """Join the process group that torchrun announces, or be alone. device: None picks CUDA when there is one.

    timeout_minutes bounds every collective, so it must exceed the longest that one rank ever works alone: a rollout
    whose experiments are slow on this rank only.
    """
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    world, rank, local = (int(os.environ.get(k, d)) for k, d in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1 and not td.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        td.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Dist(rank, world, local, device)


def close():
    """Leave the process group; harmless without one."""
    if td.is_initialized():
        td.destroy_process_group()


def rank():
    return td.get_rank() if td.is_initialized() else 0


def world():
    return td.get_world_size() if td.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


# ---- small collectives -----------------------------------------------------------------------------------------------


def barrier():
    """COLLECTIVE. Wait until every rank is here."""
    all_reduce_sum(torch.zeros(1))


def all_reduce_sum(tensor):
    """COLLECTIVE. The sum over ranks, a new tensor; shape, dtype and device must agree."""
    return _all_reduce(tensor, td.ReduceOp.SUM)


def all_reduce_max(tensor):
    """COLLECTIVE. The elementwise maximum over ranks, a new tensor."""
    return _all_reduce(tensor, td.ReduceOp.MAX)


def _all_reduce(tensor, op):
    tensor = tensor.detach().clone()
    if td.is_initialized():
        td.all_reduce(tensor, op)
    return tensor


def broadcast_object(value):
    """COLLECTIVE. Rank 0's value (anything that pickles), on every rank."""
    box = [value]
    if td.is_initialized():
        td.broadcast_object_list(box)
    return box[0]


def gather_objects(value):
    """COLLECTIVE. Every rank's value, in rank order, on every rank."""
    boxes = [value] * world()
    if td.is_initialized():
        td.all_gather_object(boxes, value)
    return boxes


@contextlib.contextmanager
def graceful_stop():
    """Let a training loop stop between two steps:

        with dist.graceful_stop() as stop_requested:
            for step in ...:
                ...
                if signum := stop_requested():      # COLLECTIVE: one call per step, on every rank
                    save, then leave

    The first Ctrl-C or SIGTERM only sets a flag; the value is that signal's number as soon as ANY rank got one, else 0.
    A second one, more than 3 s later (torchrun forwards what the terminal has sent already), interrupts at once.
    torchrun kills its workers 30 s after the signal, saved or not.
    """
    first = []  # [(signal number, time)]

    def handler(signum, frame):
        if not first:
            first.append((signum, time.monotonic()))
            print0(f"\n{signal.Signals(signum).name}: stopping after this step; again to stop at once")
        elif time.monotonic() - first[0][1] > 3:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: int(all_reduce_max(torch.tensor(first[0][0] if first else 0)))
    finally:
        for s, old in before.items():
            signal.signal(s, old)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard(model, param_dtype=torch.bfloat16):
    """COLLECTIVE. Shard parameters, gradients and optimiser state over all ranks, in place; a no-op for one process.

    One unit per block of `model.layers` (or `model.trunk.layers`) and one for the rest, so that a tied embedding and
    its output head stay together. Parameters keep their dtype (fp32 masters); compute is in param_dtype, gradients are
    reduced in fp32 and SUMMED over ranks, not averaged: divide the loss by global counts. Create the optimiser after.
    Always call `model(...)`, never a submodule or `model.forward`: the hooks that gather parameters sit there.
    """
    if world() == 1:
        return model
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in getattr(model, "trunk", model).layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def _units(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(model):
    """COLLECTIVE on entry. Parameters stay whole (in the compute dtype) for a rollout, under no_grad; inside, forwards
    communicate with nobody, so ranks may run different numbers of them. Sharded again on exit.

    no_grad, not inference_mode: parameters gathered under the latter could never be trained again.
    """
    with torch.no_grad():
        for module in _units(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()  # not recursive: the root's alone would leave the blocks sharded
        try:
            yield model
        finally:
            for module in _units(model):
                module.reshard()
                module.set_reshard_after_forward(module is not model, recurse=False)  # the default


def clip_grad_norm(params, max_norm):
    """COLLECTIVE. Scale the gradients so that their global L2 norm is at most max_norm; returns the norm before, a
    float. Not finite means that the caller must not step."""
    params = list(params)
    assert world() == 1 or all(isinstance(p, DTensor) for p in params), "shard the model first"
    grads = [_local(p.grad) for p in params if p.grad is not None]
    squares = torch.zeros((), dtype=torch.float64, device=_local(params[0]).device)
    for grad in grads:
        squares += grad.double().square().sum()
    norm = float(all_reduce_sum(squares).sqrt())
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm


def _local(tensor):
    """This rank's slice, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_state_dict(model):
    """COLLECTIVE. The whole state dict on rank 0's CPU, tensor by tensor; {} on the other ranks."""
    full = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            full[name] = whole.detach().cpu()
    return full


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(path, models, optimizers, extra, export=None):
    """COLLECTIVE. Write the directory `path`, complete or not at all (written beside, synced, renamed).

    models {name: module} and optimizers {name: optimizer}: each rank writes its own slices, as they are in memory.
    extra: this rank's further state, plain values and tensors. The random generators of torch, CUDA, numpy and Python
    come along. export(directory), called on every rank, may add files of its own, such as a Hugging Face model.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if export is not None:
        export(temporary)
    state = {
        "models": {k: {n: _local(t) for n, t in m.state_dict().items()} for k, m in models.items()},
        "optimizers": {name: _optimizer_state(o) for name, o in optimizers.items()},
        "rng": _rng_state(),
        "extra": extra,
    }
    torch.save(state, temporary / f"rank_{rank()}.pt")
    _fsync(temporary / f"rank_{rank()}.pt")
    barrier()
    if rank() == 0:
        (temporary / "checkpoint.json").write_text(json.dumps({"world": world()}))
        for file in temporary.rglob("*"):
            _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _fsync(path.parent)
    barrier()


def load_checkpoint(path, models, optimizers):
    """Continue from `path`, bit for bit: fills models and optimizers in place, sets the random generators and returns
    `extra`. Call it after shard() and after the optimisers are made.

    Raises ValueError when the checkpoint is missing, is another world size's, or is of other models.
    """
    path = Path(path)
    if not (path / "checkpoint.json").exists():
        raise ValueError(f"{path} holds no complete checkpoint")
    saved = json.loads((path / "checkpoint.json").read_text())["world"]
    if saved != world():
        raise ValueError(f"{path} was saved by {saved} processes and this run has {world()}: "
                         f"resume with --nproc_per_node {saved}, or start a new run from its weights")  # fmt: skip
    state = torch.load(path / f"rank_{rank()}.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, model in models.items():
            ours, theirs = model.state_dict(), state["models"].get(name, {})
            differ = sorted(ours.keys() ^ theirs.keys()) or [
                key for key in ours if _local(ours[key]).shape != theirs[key].shape
            ]
            if differ:
                raise ValueError(f"{path}: {name!r} is another model there; they differ in {differ[0]}")
            for key, tensor in ours.items():
                _local(tensor).copy_(theirs[key])
    for name, optimizer in optimizers.items():
        _load_optimizer(optimizer, state["optimizers"][name])
    _set_rng_state(state["rng"])
    return state["extra"]


def find_latest(directory):
    """The newest complete `step_N` in the directory, a Path, or None."""
    steps = [p for p in Path(directory).glob("step_*")
             if re.fullmatch(r"step_\d+", p.name) and (p / "checkpoint.json").exists()]  # fmt: skip
    return max(steps, key=lambda p: int(p.name[5:]), default=None)


def _optimizer_state(optimizer):
    state = optimizer.state_dict()
    state["state"] = {i: {k: _local(v) if torch.is_tensor(v) else v for k, v in entry.items()}
                      for i, entry in state["state"].items()}  # fmt: skip
    return state


def _load_optimizer(optimizer, state):
    """The reverse of _optimizer_state: a slice that belongs to a sharded parameter is sharded like it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state["state"].items():
        p = params[index]
        for key, value in entry.items():
            if isinstance(p, DTensor) and torch.is_tensor(value) and value.shape == p.to_local().shape and key != "step":
                entry[key] = DTensor.from_local(value.to(p.device), p.device_mesh, p.placements, run_check=False,
                                                shape=p.shape, stride=p.stride())  # fmt: skip
    optimizer.load_state_dict(state)


def _rng_state():
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def _set_rng_state(state):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


def _fsync(path):
    """Push a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
