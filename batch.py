"""What one RL step trains on: rows that hold a state's prompt once for all its actions, and [N, T] matrices.

N is the number of actions on this rank, T the tokens of the longest. Every per-token quantity of a step (mask,
logprobs, values, advantages) is such a matrix; a forward pass sees micro-batches of rows and fills or reads the
entries that belong to them. Episodes (the ablation) lay their actions end to end for GAE: `across_episode`.

Functions marked COLLECTIVE must be called by every rank equally often: under FSDP each forward pass communicates.
"""

from dataclasses import dataclass

import torch

import dist
from agent import encode_state
from environment import Episode
from model import Rows, pack_rows
from rollout import Policy, Rollout


@dataclass
class Group:
    """One training row: a state's prompt, and the n actions that were sampled there."""

    prompt: list[int]
    actions: list[list[int]]
    rows: list[int]  # where its actions stand in the [N, T] matrices
    index: int  # of the state or episode, over all ranks: decides its minibatch

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.actions))


def make_groups(rollouts: list[Rollout], n: int) -> list[Group]:
    return [
        Group(
            rollouts[i].prompt,
            [r.tokens for r in rollouts[i : i + n]],
            list(range(i, i + n)),
            rollouts[i].index,
        )
        for i in range(0, len(rollouts), n)
    ]


def micro_batches(groups: list[Group], limit: int, n: int) -> list[list[Group]]:
    """Groups in lists of at most `limit` padded tokens, longest first. COLLECTIVE: every rank gets equally
    many, the missing ones with a dummy row that has no trained token."""
    batches: list[list[Group]] = []
    for group in sorted(groups, key=lambda g: -g.length):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= limit:
            batches[-1].append(group)
        else:
            batches.append([group])
    most = int(dist.all_reduce_max(torch.tensor(len(batches))))
    dummy = Group([0], [[0]] * n, [], -1)
    return batches + [[dummy]] * (most - len(batches))


def pick(matrix: torch.Tensor, batch: list[Group], like: torch.Tensor) -> torch.Tensor:
    """The rows of an [N, T] matrix that belong to a micro-batch, in the shape of `like`; zeros for a dummy."""
    rows = [row for group in batch for row in group.rows]
    return matrix[rows, : like.shape[1]] if rows else torch.zeros_like(like, dtype=matrix.dtype)


class Batch:
    """A step's [N, T] matrices and the forward passes that fill them. T = the longest action here."""

    def __init__(self, rollouts: list[Rollout], n: int, temperature: float, limit: int, pad: int, device):
        """n: actions of one state · limit: padded tokens in a micro-batch · temperature: the sampler's."""
        self.n, self.temperature, self.limit, self.pad, self.device = n, temperature, limit, pad, device
        self.groups = make_groups(rollouts, n)
        self.shape = (len(rollouts), max((len(r.tokens) for r in rollouts), default=1))
        self.mask = self.zeros(torch.bool)
        self.sampler_logp = self.zeros()
        for i, r in enumerate(rollouts):
            self.mask[i, : len(r.tokens)] = True
            self.sampler_logp[i, : len(r.tokens)] = torch.tensor(r.logprobs, device=device)

    def zeros(self, dtype=torch.float32) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.device)

    def micro(self, groups: list[Group]):
        """(batch of groups, packed rows on the device, mask of the tokens that train). COLLECTIVE."""
        for batch in micro_batches(groups, self.limit, self.n):
            packed = pack_rows([g.prompt for g in batch], [g.actions for g in batch], self.pad)
            packed = packed.to(self.device)
            yield batch, packed, pick(self.mask, batch, packed.target_mask)

    def logprobs(self, model, packed: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of every action token at the sampling temperature."""
        return model(
            packed.tokens,
            packed.positions,
            packed.mask,
            source_pos=packed.source_pos,
            targets=packed.targets,
            target_mask=packed.target_mask,
            temperature=self.temperature,
        )

    def values(self, critic, packed: Rows) -> torch.Tensor:
        """V before every action token."""
        return critic(
            packed.tokens,
            packed.positions,
            packed.mask,
            source_pos=packed.source_pos,
            target_mask=packed.target_mask,
        )

    @torch.no_grad()
    def fill(self, actor, reference, critic):
        """(old_logp, ref_logp, values), [N, T] each; None for a model that is not there. COLLECTIVE."""
        models = (actor, reference, critic)
        out = [None if model is None else self.zeros() for model in models]
        for batch, packed, mask in self.micro(self.groups):
            rows = [row for group in batch for row in group.rows]
            for matrix, model in zip(out, models):
                if model is None:
                    continue
                new = self.values(model, packed) if model is critic else self.logprobs(model, packed)[0]
                if rows:
                    # Values also where an action does not train: an episode may need the one before our own failure.
                    matrix[rows, : new.shape[1]] = new if model is critic else torch.where(mask, new, 0.0)
        return out


def across_episode(matrix: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """[N, T] of single actions -> [E, S * T]: an episode's actions one after the other. `spans` are the
    episodes' (first, last + 1) rows; S is the longest episode."""
    longest = max((b - a for a, b in spans), default=1)
    out = matrix.new_zeros(len(spans), longest, matrix.shape[1])
    for e, (a, b) in enumerate(spans):
        out[e, : b - a] = matrix[a:b]
    return out.flatten(1)


def per_action(matrix: torch.Tensor, spans: list[tuple[int, int]], shape) -> torch.Tensor:
    """The inverse of `across_episode`."""
    wide = matrix.view(len(spans), -1, shape[1])
    rows = [wide[e, : b - a] for e, (a, b) in enumerate(spans)]
    return torch.cat(rows) if rows else matrix.new_zeros(shape)


def episode_bootstrap(episodes: list[Episode], spans, batch: Batch, values, critic, policy: Policy) -> torch.Tensor:
    """[E]: what follows the last action of an episode that trains. V of the next state where steps or minutes cut
    the episode off; V of the failed action's own state where we failed ("internal": that action is masked and
    nothing is known of what it would have led to); else 0, the episode was over. COLLECTIVE."""
    bootstrap = torch.zeros(len(episodes), device=batch.device)
    groups = []
    for e, episode in enumerate(episodes):
        if episode.end == "internal":
            bootstrap[e] = values[spans[e][1] - 1, 0]
        elif episode.end in ("steps", "minutes") and policy.fits(episode.state):
            prompt = encode_state(episode.state, policy.cfg, policy.tokenizer)
            groups.append(Group(prompt, [[batch.pad]], [e], e))
    with torch.no_grad():
        for group in micro_batches(groups, batch.limit, 1):
            packed = pack_rows([g.prompt for g in group], [g.actions for g in group], batch.pad).to(batch.device)
            value = batch.values(critic, packed)[:, 0]
            rows = [row for g in group for row in g.rows]
            if rows:
                bootstrap[rows] = value
    return bootstrap
