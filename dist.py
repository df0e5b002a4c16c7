"""Processes, FSDP2 and checkpoints. Every collective of the repository is in this file.

    python train_rl.py ...                         one process; in bf16 (the default on a GPU) a group of one
    torchrun --nproc_per_node 8 train_rl.py ...    one process per GPU (on CPU too, for tests)
    torchrun --nnodes 2 ... train_rl.py ...        the same over nodes that share a file system

A COLLECTIVE is a call that every rank makes, in the same order, whatever its data: a rank that returns
early, or skips one, leaves the others waiting. What keeps ranks in step here: a rank without work still
takes part, with masked rows and zeros; the number of micro-batches is made equal (all_reduce_max); and a
rollout, whose length nobody can know, runs under `gathered`, where nothing communicates.

When a run hangs, `kill -USR1 PID` prints the stack of every thread of a process, and a collective that
waits longer than `timeout_minutes` ends the run with an error.
"""

import contextlib
import faulthandler
import gc
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


class CheckpointError(ValueError):
    """This run cannot resume from that directory. The message is one line for the user."""


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


def init(device=None, timeout_minutes=12 * 60.0):
    """Join the processes that torchrun started, or be alone. device None: CUDA when there is one.

    timeout_minutes bounds every collective. It must exceed what one rank may ever do while the others wait, such as
    whole episodes whose experiments are slow on that rank only. When a rank dies torchrun ends the others at once,
    whatever the bound: it is for deadlocks alone.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        td.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Dist(rank, world, local, device)


def close():
    """Leave the process group, at the end of a script."""
    if td.is_initialized():
        barrier()
        td.destroy_process_group()
        gc.collect()  # without these two, one run in six aborted in a destructor of gloo's at exit (torch 2.13)


def rank():
    return td.get_rank() if td.is_initialized() else 0


def world():
    return td.get_world_size() if td.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


# ---- small collectives -------------------------------------------------------------------------------------


def all_reduce_sum(tensor):
    """COLLECTIVE. The sum over ranks, a new tensor. Shapes, dtypes and devices must agree."""
    return _all_reduce(tensor, td.ReduceOp.SUM)


def all_reduce_max(tensor):
    """COLLECTIVE. The elementwise maximum over ranks, a new tensor."""
    return _all_reduce(tensor, td.ReduceOp.MAX)


def _all_reduce(tensor, op):
    tensor = tensor.detach().clone()
    if td.is_initialized():
        td.all_reduce(tensor, op)
    return tensor


def barrier():
    """COLLECTIVE. Wait until every rank is here."""
    all_reduce_sum(torch.zeros(1))


def gather_objects(value):
    """COLLECTIVE. The list of every rank's value, in rank order, on every rank."""
    boxes = [value] * world()
    if td.is_initialized():
        td.all_gather_object(boxes, value)
    return boxes


@contextlib.contextmanager
def graceful_stop():
    """Lets a loop stop between two steps, on all ranks at the same one:

        with dist.graceful_stop() as stop_requested:
            for step in ...:
                ...
                if signum := stop_requested():  # COLLECTIVE: once a step
                    save, then sys.exit(128 + signum)

    The first Ctrl-C or SIGTERM sets a flag; stop_requested() is that signal's number as soon as any rank
    has it, else 0. A second one, 3 s later or more (torchrun repeats the terminal's Ctrl-C), stops at
    once. torchrun kills its workers 30 s after a signal, saved or not.
    """
    first = []  # [(signal's number, when)]

    def handler(signum, frame):
        if not first:
            first.append((signum, time.monotonic()))
            if rank() == 0:  # os.write: a handler may have interrupted a print
                name = signal.Signals(signum).name
                os.write(2, f"\n{name}: stopping after this step; again to stop at once\n".encode())
        elif time.monotonic() - first[0][1] > 3:
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: int(all_reduce_max(torch.tensor(first[0][0] if first else 0)))
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


# ---- FSDP2 -------------------------------------------------------------------------------------------------


def shard(model, param_dtype=torch.bfloat16):
    """COLLECTIVE. Split parameters, gradients and optimiser state over all ranks, in place. For one process
    that computes in fp32 a no-op. Create the optimiser afterwards.

    One unit for each block of `model.layers` (or `model.trunk.layers`), one for all the rest, so that a
    tied embedding and head stay together. Parameters keep their dtype (fp32 masters), compute is in
    param_dtype, gradients are reduced in fp32 and SUMMED over ranks: divide losses by global counts.
    Call model(...), never a submodule or model.forward: the hooks that gather parameters sit there.
    """
    if world() == 1 and param_dtype != torch.float32 and not td.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)  # of one: FSDP2 does the casting
    if world() > 1 or param_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for block in getattr(model, "trunk", model).layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for unit in _units(model):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return model


def compute_dtype(name, ctx):
    """The dtype to give to `shard`: "auto" is bf16 on CUDA and fp32 on a CPU."""
    cuda = name == "auto" and ctx.device.type == "cuda"
    return torch.bfloat16 if name == "bf16" or cuda else torch.float32


def _units(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(model):
    """COLLECTIVE on entry only. Keeps the parameters whole, in the compute dtype, under no_grad: inside,
    a forward communicates with nobody, and each rank may run as many as it likes.

    (Parameters gathered under inference_mode could not be trained any more.)
    """
    with torch.no_grad():
        for unit in _units(model):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()  # this unit's own parameters only, hence the loop
        try:
            yield model
        finally:
            for unit in _units(model):
                unit.set_reshard_after_forward(unit is not model, recurse=False)  # as fully_shard sets it
                unit.reshard()


def clip_grad_norm(params, max_norm):
    """COLLECTIVE. Scales gradients to a global L2 norm of at most max_norm; returns the norm before, a
    float. When that is not finite, gradients are left alone and the caller must not step.
    """
    params = [p for p in params if p.grad is not None]
    assert world() == 1 or all(isinstance(p, DTensor) for p in params), "shard() the model first"
    grads = [_local(p.grad) for p in params]
    squares = sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
    norm = float(all_reduce_sum(squares.cpu()).sqrt())
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm


def _local(tensor):
    """This rank's slice; it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_state_dict(model):
    """COLLECTIVE. The whole state dict on rank 0, on CPU, gathered one tensor at a time; elsewhere {}."""
    full = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            full[name] = whole.detach().cpu()
    return full


# ---- checkpoints -------------------------------------------------------------------------------------------


def save_checkpoint(path, models, optimizers, extra, export=None):
    """COLLECTIVE. Writes the directory `path` whole or not at all: beside it, synced, then renamed.

    models       {name: module}, and optimizers {name: optimizer}: every rank writes its own slices as
                 they are in memory, to rank_R.pt
    extra        plain values and tensors of this rank, to be had back from load_checkpoint
    export       export(directory), called on every rank, may add files (a Hugging Face model)
    The random generators of torch, CUDA, numpy and Python are saved along.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if export:
        export(temporary)
    state = {
        "models": {name: _slices(model.state_dict()) for name, model in models.items()},
        "optimizers": {name: _slices(optim.state_dict()) for name, optim in optimizers.items()},
        "random": _random_state(),
        "extra": extra,
    }
    torch.save(state, temporary / f"rank_{rank()}.pt")
    _fsync(temporary / f"rank_{rank()}.pt")
    barrier()
    if rank() == 0:
        (temporary / "checkpoint.json").write_text(json.dumps({"world": world()}))
        for file in [*temporary.rglob("*"), temporary]:
            _fsync(file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        _fsync(path.parent)
    barrier()


def load_checkpoint(path, models, optimizers):
    """Fills models and optimizers in place, sets the random generators, returns `extra`: the run goes on
    bit for bit. Call it after shard() and after creating the optimisers.

    Raises CheckpointError for a checkpoint that is incomplete, of other models, or of another world size.
    """
    path = Path(path)
    if not (path / "checkpoint.json").exists():
        raise CheckpointError(f"{path} is no complete checkpoint")
    saved = json.loads((path / "checkpoint.json").read_text())["world"]
    if saved != world():
        hint = "resume with as many, or start a new run from its weights"
        raise CheckpointError(f"{path} was saved by {saved} process(es), this run has {world()}: {hint}")
    state = torch.load(path / f"rank_{rank()}.pt", map_location="cpu", weights_only=True)
    for name, model in models.items():
        ours, theirs = _slices(model.state_dict()), state["models"].get(name, {})
        differ = sorted(ours.keys() ^ theirs.keys())
        differ += [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
        if differ:
            raise CheckpointError(f"{path}: the model {name!r} is another one there: {differ[0]} differs")
        for key, tensor in ours.items():
            tensor.copy_(theirs[key])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(_unslice(state["optimizers"][name], optimizer))
    _set_random_state(state["random"])
    return state["extra"]


def find_latest(directory):
    """The complete `step_N` with the largest N in a directory: a Path, or None."""
    found = [path for path in Path(directory).glob("step_*") if (path / "checkpoint.json").exists()]
    found = [path for path in found if re.fullmatch(r"step_\d+", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def _slices(state):
    """A state dict with this rank's slices in place of sharded tensors; memory is shared."""
    if isinstance(state, dict):
        return {key: _slices(value) for key, value in state.items()}
    return _local(state.detach()) if torch.is_tensor(state) else state


def _unslice(state, optimizer):
    """The reverse, for an optimiser: what has the shape of its parameter's slice is sharded alike."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state["state"].items():
        p = params[index]
        for key, value in entry.items():
            if isinstance(p, DTensor) and key != "step":
                assert value.shape == p.to_local().shape
                entry[key] = DTensor.from_local(value.to(p.device), p.device_mesh, p.placements,
                                                shape=p.shape, stride=p.stride())  # fmt: skip
    return state


def _random_state():
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest]}  # fmt: skip


def _set_random_state(state):
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))


def _fsync(path):
    """Pushes a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
