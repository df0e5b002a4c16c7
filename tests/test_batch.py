"""The matrices of one RL step: micro-batches, episodes laid end to end, and what follows an episode's end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import batch as batch_file
from batch import Batch, Group, across_episode, episode_bootstrap, micro_batches, per_action
from environment import Episode
from model import ModelConfig, ValueModel
from rollout import Rollout
from weights import build_model

PAD, N = 0, 1


def group(length: int, index: int = 0, row: int = 0) -> Group:
    return Group([1] * (length - 2), [[2, 3]], [row], index)


@pytest.mark.parametrize("limit", [1, 20, 64, 10_000])
def test_micro_batches_keep_every_group_within_the_limit(limit):
    groups = [group(int(n), i) for i, n in enumerate(np.random.default_rng(0).integers(3, 30, 17))]
    batches = micro_batches(groups, limit, 1)
    assert sorted(g.index for b in batches for g in b) == list(range(17))
    assert all(len(b) == 1 or len(b) * max(g.length for g in b) <= limit for b in batches)


def test_a_rank_without_work_gets_a_dummy(monkeypatch):
    monkeypatch.setattr(batch_file.dist, "all_reduce_max", lambda t: torch.tensor(3))
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


def sampled(index: int, prompt: list[int], tokens: list[int]) -> Rollout:
    return Rollout(None, prompt, tokens, [-1.0 - i for i in range(len(tokens))], "stop", None, index)


def small_critic() -> ValueModel:
    critic = ValueModel(build_model(ModelConfig("qwen3", 51, 24, 37, 2, 3, 1, 8, eos_ids=(2,)), 0))
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(1))
    return critic


def value_alone(critic, prompt: list[int]) -> float:
    """V before the first token of an action, from a forward pass of the prompt alone."""
    hidden = critic.trunk(torch.tensor([prompt]))
    return float((hidden[0, -1] @ critic.value_head.weight[0] + critic.value_head.bias[0]).detach())


@pytest.mark.parametrize("limit", [1, 12, 1000])
def test_matrices_hold_what_every_action_gives_alone(limit):
    actor = build_model(ModelConfig("qwen3", 51, 24, 37, 2, 3, 1, 8, eos_ids=(2,)), 3)
    critic = small_critic()
    rollouts = [sampled(0, [5, 6, 7], [8, 9, 2]), sampled(1, [4], [2]), sampled(2, [9, 8, 7, 6], [5, 2])]
    batch = Batch(rollouts, N, 0.7, limit, PAD, "cpu")
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert batch.sampler_logp[0].tolist() == [-1, -2, -3] and batch.sampler_logp[1].tolist() == [-1, 0, 0]
    logp, ref, values = batch.fill(actor, None, critic)
    assert ref is None
    for i, r in enumerate(rollouts):
        for t, token in enumerate(r.tokens):
            context = r.prompt + r.tokens[:t]
            logits = actor.unembed(actor(torch.tensor([context])))[0, -1] / 0.7
            expected = torch.log_softmax(logits, -1)[token].detach()
            torch.testing.assert_close(logp[i, t], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(float(values[i, t]), value_alone(critic, context), atol=1e-5, rtol=1e-5)
    assert not logp[~batch.mask].any() and not values[~batch.mask].any()


def test_what_follows_the_end_of_an_episode(monkeypatch):
    """Only steps and minutes bootstrap from the next state; our own failure from the failed action's state."""
    critic, rows = small_critic(), [sampled(e, [4 + e, 5, 6], [7, 2]) for e in range(7)]
    ends = ["steps", "minutes", "final", "truncated", "overflow", "internal", "steps"]
    batch = Batch(rows, N, 1.0, 1000, PAD, "cpu")
    values = batch.fill(None, None, critic)[2]
    prompts = {e: [20 + e, 21] for e in range(7)}
    monkeypatch.setattr(batch_file, "encode_state", lambda state, *_: prompts[state])
    policy = SimpleNamespace(cfg=None, tokenizer=None, fits=lambda state: state != 6)  # the last one's does not fit
    episodes = [Episode(e, [], end) for e, end in enumerate(ends)]
    got = episode_bootstrap(episodes, [(e, e + 1) for e in range(7)], batch, values, critic, policy)
    expected = [value_alone(critic, prompts[0]), value_alone(critic, prompts[1]), 0, 0, 0, values[5, 0].item(), 0]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert expected[5] == pytest.approx(value_alone(critic, rows[5].prompt), abs=1e-5)
