"""The real model under FSDP2, two processes on CPU: sharded loading, scores, gradients, rollouts, saving."""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

import dist
import weights
from generate import Generator, Rng
from model import ModelConfig, ValueModel, pack_rows
from weights import (
    build_model,
    init_empty,
    load_model,
    load_value_model,
    load_weights,
    save_model,
    save_value_model,
)

# Odd sizes: dimension 0 splits unevenly, and the value head's one row lies on one rank only.
SHAPE = ModelConfig("qwen3", 51, 24, 37, 2, 3, 1, 8, eos_ids=(2,))
PROMPTS = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14]]
ACTIONS = [[[1, 2, 3], [4], [5, 2]], [[6, 7, 2], [8, 9], [2]], [[3, 2], [1], [2]], [[4, 5, 6], [7], [8, 2]]]


def make(tied, folder):
    net = build_model(replace(SHAPE, tie_word_embeddings=tied), 0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    save_model(net, folder / "actor")
    critic = load_value_model(folder / "actor")
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(1))
    save_value_model(critic, folder / "critic")


def backward(actor, critic, rows_of_rank, idle=False):
    """Loss and its gradients, summed over ranks. An idle rank's targets are all masked."""
    rows = pack_rows([PROMPTS[i] for i in rows_of_rank], [ACTIONS[i] for i in rows_of_rank])
    mask = torch.zeros_like(rows.target_mask) if idle else rows.target_mask
    logprobs, entropy = actor(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos,
                              targets=rows.targets, target_mask=mask, temperature=0.8)  # fmt: skip
    values = critic(rows.tokens, rows.positions, rows.mask, rows.source_pos, mask)
    loss = (logprobs * (1 + rows.targets) + 0.1 * entropy).sum() + values.square().sum()
    loss.backward()
    return float(loss.detach())


def sampled(actor):
    done = Generator(actor, [2], 3, 24).stream(PROMPTS, 9, temperature=1.0, rng=Rng(0, 0))
    return sorted((c.index, tuple(c.tokens), c.finish) for c in done)


def whole(gradients):
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in gradients.items()}


def worker(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init("cpu")
    read = []
    opened = weights.stored_tensors
    config = weights.read_config(folder / "actor")
    actor, critic = init_empty(config), ValueModel(init_empty(config))
    for net, name in ((actor, "actor"), (critic, "critic")):
        dist.shard(net, torch.float32)
        net.to_empty(device="cpu")
        weights.stored_tensors = lambda path: {
            k: (lambda f=f: Counted(f(), read)) for k, f in opened(path).items()
        }
        load_weights(net, folder / name)
        assert all(isinstance(p, DTensor) for p in net.parameters())
        held = sum(p.to_local().numel() for p in net.parameters())
        assert sum(read) == held, "each rank reads its own rows and no others"
        assert held < 0.6 * sum(p.numel() for p in net.parameters())
        read.clear()
    weights.stored_tensors = opened
    actor.checkpoint_blocks = True

    # Two rows a rank, then rank 1 without work: every rank still takes part.
    whole_actor, whole_critic = load_model(folder / "actor"), load_value_model(folder / "critic")
    for mine, all_rows, idle in (([0, 3] if rank == 0 else [1, 2], [0, 1, 2, 3], False), ([0], [0], rank == 1)):
        for net in (actor, critic, whole_actor, whole_critic):
            net.zero_grad()
        loss = dist.all_reduce_sum(torch.tensor(backward(actor, critic, mine, idle)))
        expected = backward(whole_actor, whole_critic, all_rows)
        torch.testing.assert_close(float(loss), expected, atol=1e-3, rtol=1e-5)
        for net, alone in ((actor, whole_actor), (critic, whole_critic)):
            ours = whole({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
            theirs = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4, msg=name)

    # A rollout communicates with nobody: rank 1 makes three while rank 0 makes one.
    with dist.gathered(actor):
        draws = [sampled(actor) for _ in range(1 + 2 * rank)]
    assert all(draw == sampled(whole_actor) for draw in draws)
    assert all(isinstance(p, DTensor) for p in actor.parameters())
    backward(actor, critic, [rank])

    for net, name, save in ((actor, "actor", save_model), (critic, "critic", save_value_model)):
        state = dist.full_state_dict(net)
        if rank == 0:
            save(net, folder / "again" / name, state_dict=state)
    dist.close()


class Counted:
    """A safetensors slice that notes how many numbers are read."""

    def __init__(self, source, read):
        self.source, self.read = source, read

    def get_shape(self):
        return self.source.get_shape()

    def __getitem__(self, rows):
        out = self.source[rows]
        self.read.append(out.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_equal_one(tied, tmp_path):
    make(tied, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, tmp_path), nprocs=2)
    for name, load in (("actor", load_model), ("critic", load_value_model)):
        before, after = load(tmp_path / name), load(tmp_path / "again" / name)
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
