"""PPO from the functions of rl.py solves a toy MDP of four tokens; with a broken part it does not.

An episode has two turns, in each of which the policy samples tokens until END, three at the most. Turn 1
must be [(s + 1) mod 3, END] for the state s; then the environment says o; turn 2 must be
[(s + o) mod 3, END]. Each turn pays 0.5 at its last token.

    column     0  1  2 |  3  | 4  5  6         what the policy sampled is masked in, the rest is not
               turn 1  |  o  | turn 2
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

import rl

END, VOCAB, TURN, WIDTH = 3, 4, 3, 7
TEMPERATURE, EPISODES, UPDATES = 1.5, 128, 40


def net(outputs):
    layers = nn.Sequential(nn.Linear(12 + WIDTH + VOCAB + 1, 48), nn.Tanh(), nn.Linear(48, outputs))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


def features(state, observed, column, last):
    """What the policy sees before it samples a token: [N, F]. observed: 3 = not yet; last: 4 = none."""
    column = torch.full_like(state, column)
    situation = one_hot(4 * state + observed, 12)
    parts = situation, one_hot(column, WIDTH), one_hot(last, VOCAB + 1)
    return torch.cat(parts, -1).float()


@torch.no_grad()
def rollout(policy, generator):
    """(inputs [N, T, F], tokens, sampler logprobs, mask, rewards: all [N, T]) of EPISODES episodes."""
    state = torch.randint(3, (EPISODES,), generator=generator)
    says = torch.randint(3, (EPISODES,), generator=generator)
    tokens = torch.zeros(EPISODES, WIDTH, dtype=torch.long)
    mask, rewards = torch.zeros(EPISODES, WIDTH, dtype=torch.bool), torch.zeros(EPISODES, WIDTH)
    inputs = torch.zeros(EPISODES, WIDTH, policy[0].in_features)
    logps = torch.zeros(EPISODES, WIDTH)
    for start, observed, answer in ((0, torch.full_like(state, 3), state + 1), (4, says, state + says)):
        last = torch.full_like(state, VOCAB)
        for column in range(start, start + TURN):
            alive = last != END
            inputs[:, column] = features(state, observed, column, last)
            logp = (policy(inputs[:, column]) / TEMPERATURE).log_softmax(-1)
            token = logp.exp().multinomial(1, generator=generator)[:, 0]
            last = torch.where(alive, token, last)
            tokens[:, column], mask[:, column] = last, alive
            logps[:, column] = logp.gather(1, last[:, None])[:, 0]
        right = (tokens[:, start] == answer % 3) & (tokens[:, start + 1] == END)
        length = mask[:, start : start + TURN].sum(1)
        rewards[torch.arange(EPISODES), start + length - 1] = 0.5 * right
    tokens[:, TURN] = says
    return inputs, tokens, logps, mask, rewards


def train(seed, break_mask=False, break_temperature=False):
    """The mean reward of the last ten of UPDATES batches.

    break_mask: END is not trained, the usual slip of masks (the reward moves to the token before it).
    break_temperature: old_logp is the sampler's, at its temperature, and the trainer's is at 1.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy, critic, reference = net(VOCAB), net(1), net(VOCAB)
    reference.load_state_dict(policy.state_dict())
    actor_optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-2)

    def logprobs(model, inputs, tokens):
        temperature = 1.0 if break_temperature else TEMPERATURE
        logp = (model(inputs) / temperature).log_softmax(-1)
        return logp.gather(-1, tokens[..., None])[..., 0]

    history = []
    for _ in range(UPDATES):
        inputs, tokens, sampler_logp, mask, rewards = rollout(policy, generator)
        history.append(float(rewards.sum(1).mean()))
        if break_mask:
            before_end = (tokens == END).roll(-1, 1) & mask
            moved = torch.where(before_end, rewards.roll(-1, 1), 0.0)
            mask = mask & (tokens != END)
            rewards = torch.where(mask, rewards + moved, 0.0)
        with torch.no_grad():
            old_logp = logprobs(policy, inputs, tokens)
            if break_temperature:
                old_logp = sampler_logp
            kl = rl.kl(old_logp, logprobs(reference, inputs, tokens), "k1")
            old_values = torch.where(mask, critic(inputs)[..., 0], 0.0)
        token_rewards = rl.token_rewards(rewards, kl, mask, coef=0.001)
        advantages, returns = rl.gae(token_rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = rl.whiten(advantages, mask)
        for _epoch in range(2):
            for rows in torch.randperm(EPISODES, generator=generator).chunk(2):
                m = mask[rows]
                logp = logprobs(policy, inputs[rows], tokens[rows])
                values = critic(inputs[rows])[..., 0]
                actor_loss, _ = rl.policy_loss(logp, old_logp[rows], advantages[rows], m, 0.2, 0.2)
                critic_loss, _ = rl.value_loss(values, old_values[rows], returns[rows], m, clip=0.5)
                for optimizer, loss in ((actor_optimizer, actor_loss), (critic_optimizer, critic_loss)):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    return sum(history[-10:]) / 10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_solves_the_toy_and_a_broken_mask_or_temperature_does_not(seed):
    assert train(seed) > 0.95
    assert train(seed, break_mask=True) < 0.8
    assert train(seed, break_temperature=True) < 0.5
