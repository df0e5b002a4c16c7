"""From states to sampled actions and what came of them: the rollouts of RL and evaluation (paper 4.2).

Step-wise: one state, one action, one experiment, one reward. Episodes: the same until Final Answer or a limit.
Either way an action's experiment starts the moment its last token is sampled, while other actions still decode.
Nothing here communicates between ranks.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import config
import reward
import tasks
from agent import PromptTooLong, State, encode_state, end_token
from environment import Environment, Episode, Transition, counted, run_episodes
from generate import Generator, Rng
from reward import Outcome
from weights import load_model, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # of the policy, in sampling and training alike
    top_p: float = 1.0  # below 1 the sampler's support is not the trainer's: for evaluation only
    max_batch: int = 64  # sequences that decode together

    def __post_init__(self):
        if self.max_batch < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling: max_batch must be positive, temperature not negative, top_p in (0, 1]")


@dataclass(frozen=True)
class RewardConfig:
    name: Literal["linear", "sigmoid", "binary", "milestone"] = "linear"  # linear: paper v2, sigmoid: v1
    clip: tuple[float, float] | None = (-1.0, 1.0)  # null is the paper's text: one bad edit may dominate a batch
    min_gain: bool = False  # an improvement below the task's noise counts as none
    no_format: bool = False  # the paper's Table 3: no penalty for errors
    no_corner: bool = False  # the paper's Table 3: corner cases are errors
    no_performance: bool = False  # the paper's Table 3: 1 for any improvement

    def __post_init__(self):
        if self.clip and not self.clip[0] < self.clip[1]:
            raise ValueError(f"reward.clip = {list(self.clip)}: the lower bound comes first")


@dataclass
class Rollout:
    """One sampled action: `tokens` include the end-of-sequence token when finish is "stop"."""

    state: State
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # the sampler's, at the sampling temperature
    finish: str  # stop | length: cut off at max_new_tokens
    step: Transition
    index: int = 0  # of its state or episode, over all ranks


class Policy:
    """A model that replies: prompts in, sampled actions out."""

    def __init__(self, model, tokenizer, env: Environment, sampling: Sampling):
        self.tokenizer, self.env, self.cfg, self.sampling = tokenizer, env, env.cfg, sampling
        eos = {end_token(tokenizer), tokenizer.eos_token_id, *model.config.eos_ids}
        self.eos = tuple(sorted(token for token in eos if token is not None))
        length = self.cfg.max_prompt_tokens + self.cfg.max_new_tokens
        self.generator = Generator(model, self.eos, sampling.max_batch, length)

    def text(self, tokens: list[int]) -> str:
        kept = tokens[:-1] if tokens and tokens[-1] in self.eos else tokens
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def fits(self, state: State) -> bool:
        """Whether a state's prompt keeps to the limit, its history left out if need be."""
        try:
            encode_state(state, self.cfg, self.tokenizer)
        except PromptTooLong:
            return False
        return True

    def sample(self, prompts: list[list[int]], rng: Rng, ids: list[int]) -> Iterator:
        """Completions as they end. `ids` name the samples: the same id draws the same random numbers."""
        s = self.sampling
        yield from self.generator.stream(
            prompts, self.cfg.max_new_tokens, s.temperature, s.top_p, rng=rng, sample_ids=ids
        )

    def rollout_steps(self, states: list[State], indices: list[int], n: int, rng: Rng) -> list[Rollout]:
        """n actions for every state, each carried out: n consecutive rollouts a state."""
        prompts = [encode_state(state, self.cfg, self.tokenizer) for state in states]
        ids = [index * n + k for index in indices for k in range(n)]
        done, pending = {}, {}
        for c in self.sample([p for p in prompts for _ in range(n)], rng, ids):
            state = states[c.index // n]
            pending[c.index] = self.env.submit(state, self.text(c.tokens), c.finish == "length")
            done[c.index] = c
        return [
            Rollout(
                states[i // n],
                prompts[i // n],
                done[i].tokens,
                done[i].logprobs,
                done[i].finish,
                pending[i].result(),
                indices[i // n],
            )
            for i in range(len(ids))
        ]

    def rollout_episodes(
        self, states: list[State], indices: list[int], rng_of, max_steps: int, max_minutes: float
    ) -> list[tuple[Episode, list[Rollout]]]:
        """One episode from every state. `rng_of(t)` is the generator of step t; an episode whose prompt no
        longer fits ends there ("overflow")."""
        episodes = [Episode(state) for state in states]
        position = {id(e): i for i, e in enumerate(episodes)}
        drawn: list[list] = [[] for _ in episodes]

        def act(active: list[Episode]):
            rows, prompts = [], []
            for row, episode in enumerate(active):
                try:
                    prompts.append(encode_state(episode.state, self.cfg, self.tokenizer))
                except PromptTooLong:
                    if not episode.steps:
                        raise  # the task itself does not fit: the user must know
                    continue
                rows.append(row)
            ids = [indices[position[id(active[row])]] for row in rows]
            step = max(len(e.steps) for e in active)
            for c in self.sample(prompts, rng_of(step), ids):
                episode = active[rows[c.index]]
                drawn[position[id(episode)]].append((episode.state, prompts[c.index], c))
                yield rows[c.index], self.text(c.tokens), c.finish == "length"

        for _ in run_episodes(episodes, act, self.env, max_steps, max_minutes):
            pass
        return [
            (
                episode,
                [
                    Rollout(state, prompt, c.tokens, c.logprobs, c.finish, step, indices[i])
                    for (state, prompt, c), step in zip(drawn[i], episode.steps)
                ],
            )
            for i, episode in enumerate(episodes)
        ]


def load_policy(
    path: str, env: Environment, sampling: Sampling, device: torch.device | str | None = None, dtype: str = "auto"
) -> Policy:
    """A checkpoint that acts and does not learn. device: None is the GPU if there is one; dtype: auto (bf16 on CUDA,
    else fp32), bf16, fp32.

    Raises config.UserError for a model that is not covered.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    with config.user_error():
        tokenizer = load_tokenizer(path)
        model = load_model(path, torch.bfloat16 if half else torch.float32, device)
    model.valid_vocab = len(tokenizer)
    return Policy(model, tokenizer, env, sampling)


# --------------------------------------------------------------------------------- rewards and summaries


def reward_of(rollout: Rollout, part: str, cfg: RewardConfig) -> float | None:
    """The scalar of one action; None for our own failures, which must not train."""
    step = rollout.step
    if step.outcome is Outcome.INTERNAL:
        return None
    keys = {k: getattr(cfg, k) for k in ("clip", "min_gain", "no_format", "no_corner", "no_performance")}
    task = tasks.load(rollout.state.task)
    scale = task.scale(counted(task, part))
    return reward.compute(step.outcome, step.before, step.after, scale, cfg.name, **keys)


def summarise(rows: list[dict]) -> dict:
    """Metrics of a step's rollouts over all ranks, from one small dict per action."""
    scored = [r for r in rows if r["reward"] is not None]
    edits = [r for r in scored if r["action"] in ("Edit Script", "Undo Edit Script")]
    good = [r for r in edits if r["outcome"] == Outcome.OK_EDIT]
    count = max(1, len(rows))
    outcomes = Counter(r["outcome"] for r in rows)
    by_task = {t: [r["reward"] for r in scored if r["task"] == t] for t in sorted({r["task"] for r in rows})}
    return {
        "reward": float(np.mean([r["reward"] for r in scored])) if scored else 0.0,
        "reward_edits": float(np.mean([r["reward"] for r in edits])) if edits else 0.0,
        "gain": float(np.mean([r["gain"] for r in good])) if good else 0.0,
        "edit_share": len(edits) / count,
        "valid_share": 1 - sum(outcomes[o] for o in ("invalid_format", "invalid_action", "edit_failed")) / count,
        "truncated": sum(r["truncated"] for r in rows) / count,
        "internal": outcomes["internal"],
        "outcomes": dict(outcomes),
        "reward_by_task": {t: float(np.mean(v)) for t, v in by_task.items() if v},
        "action_tokens": float(np.mean([r["tokens"] for r in rows])) if rows else 0.0,
    }


def describe(rollout: Rollout, value: float | None, part: str) -> dict:
    step = rollout.step
    task = tasks.load(rollout.state.task)
    scale = task.scale(counted(task, part))
    return {
        "task": rollout.state.task,
        "action": step.action.name if step.action else None,
        "outcome": step.outcome.value,
        "reward": value,
        "gain": reward.gain(step.before, step.after, scale) if step.after is not None else 0.0,
        "truncated": rollout.finish == "length",
        "tokens": len(rollout.tokens),
        "seconds": step.seconds,
    }
