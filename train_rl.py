"""Step-wise RL (paper 4.2): PPO over single actions whose experiments really run.

    python train_rl.py --config configs/tiny.yaml                               # CPU, minutes
    torchrun --nproc-per-node 8 train_rl.py --config configs/qwen2.5-7b.yaml    # the paper's setting

    J(theta) = E_{s ~ expert states, a ~ pi_theta(.|s)} [ R(s, a) ]

Starts from runs/NAME/sft and runs/NAME/data/states.jsonl; writes runs/NAME/rl/: step_N/ (the policy as a Hugging
Face checkpoint, critic/ beside it, and what an exact resume needs), metrics.jsonl, transcripts.jsonl.

One step has six phases, in this order in `main`:
    1 rollout      states from the pool, one sampled action each (or whole episodes: `rollout: episode`)
    2 score        the experiments, which overlap the rollout, and their rewards
    3 evaluate     log-probabilities under the old policy and the reference, values
    4 advantages   per-token rewards with the KL penalty, GAE over action tokens, whitening
    5 update       clipped surrogate for the policy, clipped squared error for the critic
    6 log, save

With the defaults (the paper's one epoch, one minibatch) a step is one update: the ratio is 1 and nothing clips.

Differs from the usual: an episode is trained as its (state, action) pairs, each with the prompt that acting saw,
and GAE runs over the episode's action tokens across them. So every mode trains on the prompts of every other.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import config
import dist
import rl
import sandbox
import tasks
from agent import AgentConfig, PromptTooLong, State, state_from_row
from batch import Batch, Group, across_episode, episode_bootstrap, per_action, pick
from client import OPERATION
from environment import Environment, SandboxConfig, initial_state
from experiments import SANDBOX_MAY_CHANGE
from generate import Rng
from records import append_rows, claim, read_jsonl, require_checkpoint, truncate_log
from reward import Outcome
from rollout import Policy, RewardConfig, Rollout, Sampling, describe, reward_of, summarise
from weights import load_model, load_tokenizer, load_value_model, save_model, save_value_model


@dataclass(frozen=True)
class Config:
    run: str  # reads runs/RUN/{data,sft}, writes runs/RUN/OUT
    out: str = "rl"  # a name for this training within the run, for ablations
    seed: int = 0
    init: str = ""  # the policy to start from, a directory or hub id; empty = runs/RUN/sft
    critic_init: str = ""  # the critic to start from; empty = init with a zero-initialised value head
    agent: AgentConfig = field(default_factory=AgentConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    sampling: Sampling = field(default_factory=Sampling)
    # rollouts
    rollout: Literal["step", "episode"] = "step"  # episode: the paper's ablation
    steps: int = 39  # RL steps (paper: 10,000 states / 256)
    states_per_step: int = 256  # states (or episodes) in one step, over all ranks (paper C.1)
    samples_per_state: int = 1  # actions sampled in each state; group baselines need more
    pool_actions: Literal["all", "edit"] = "all"  # edit: only states in which the expert edited
    pool_tasks: tuple[str, ...] = ()  # tasks whose states are used; empty = all in the pool
    own_share: float = 0.0  # share of the states that the policy itself reached in recent steps
    max_steps: int = 15  # episode: actions (paper B.3)
    max_minutes: float = 30.0  # episode: minutes (paper B.3)
    # reward
    reward: RewardConfig = field(default_factory=RewardConfig)
    mask_timeouts: bool = False  # leave timed-out actions out of training
    kl_coef: float = 0.001  # weight of the KL to the starting policy (paper C.1)
    kl_in: Literal["reward", "loss"] = "reward"  # reward: k1 in each token's reward | loss: the k2 loss
    kl_target: float | None = None  # adapt kl_coef to hold this KL (nats per action); null = fixed
    kl_horizon: int = 10_000  # actions over which the adaptation works
    # advantages
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"] = "gae"  # all but gae: no critic
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True  # gae: advantages to mean 0, variance 1 over the step's tokens
    # update
    epochs: int = 1  # passes over a step's actions
    minibatches: int = 1  # optimiser updates in a pass
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound on the loss where the advantage is negative, above 1
    value_clip: float | None = 0.5
    entropy_coef: float = 0.0
    loss_agg: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        "token_mean"
    )
    tis_clip: float | None = None  # cap of the importance weights against the sampler's logprobs; null = off
    actor_lr: float = 1e-6  # paper C.1
    critic_lr: float = 1e-5  # paper C.1
    warmup_steps: int = 0  # RL steps over which a learning rate rises, from a model's first update on
    critic_warmup_steps: int = 0  # first RL steps, in which only the critic learns
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    micro_batch_tokens: int = 16384  # padded tokens in one forward pass; changes memory and speed alone
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of compute: bf16 on GPUs; master weights are fp32
    checkpoint_blocks: bool = False  # recompute activations in the backward pass: less memory, slower
    # log and save
    save_every: int = 5
    keep_checkpoints: int = 1  # how many of the saved steps keep what a resume needs; weights always stay
    eval_every: int = 0  # steps between rollouts on fixed states, without training; 0 = never
    eval_states: int = 64
    transcripts: int = 2  # rollouts per step that are written out in full

    def __post_init__(self):
        counts = ("states_per_step", "samples_per_state", "epochs", "minibatches", "micro_batch_tokens", "save_every")
        for key in counts:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be positive")
        if self.minibatches > self.states_per_step:
            raise ValueError(f"minibatches must not exceed states_per_step = {self.states_per_step}")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coef > 0):
            raise ValueError("kl_target needs kl_coef > 0 to start from")
        if min(self.clip_low, self.clip_high) < 0 or (self.dual_clip is not None and self.dual_clip <= 1):
            raise ValueError("clip_low and clip_high must not be negative, dual_clip must be above 1")
        if self.sampling.top_p != 1 or self.sampling.temperature <= 0:
            raise ValueError("training samples with top_p = 1 and temperature > 0: else the ratio is not 1")
        if self.advantage not in ("gae", "reinforce") and self.samples_per_state < 2:
            raise ValueError(f"advantage = {self.advantage} compares a state's actions: samples_per_state >= 2")
        if self.rollout == "episode" and (self.advantage != "gae" or self.samples_per_state != 1):
            raise ValueError("rollout = episode needs advantage = gae and samples_per_state = 1")
        if self.rollout == "episode" and self.own_share:
            raise ValueError("own_share is for rollout = step: an episode visits its own states anyway")


# Keys that may differ between a run and its continuation: how long, how fast, what is shown.
MAY_CHANGE = ("steps", *SANDBOX_MAY_CHANGE, "micro_batch_tokens", "checkpoint_blocks", "save_every", "keep_checkpoints")
MAY_CHANGE += ("eval_every", "eval_states", "transcripts", *(f"agent.coder.{key}" for key in OPERATION))


class Laps:
    """Seconds by phase: lap("update") ends a phase that began at the last call."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), {}

    def __call__(self, phase: str):
        now = time.perf_counter()
        self.seconds[phase], self.last = now - self.last, now


def learning_rate(full: float, step: int, warmup: int) -> float:
    """`step` counts from a model's first update: rises linearly over `warmup` steps, then stays."""
    return full * min(1.0, max(0, step + 1) / (warmup + 1))


@dataclass
class Old:
    """What the update takes as given: [N, T] matrices from before it, None where there is no such model."""

    logp: torch.Tensor
    ref_logp: torch.Tensor | None
    values: torch.Tensor | None
    advantages: torch.Tensor
    returns: torch.Tensor | None
    weights: torch.Tensor | None  # truncated importance sampling


def accumulate_gradients(
    batch: Batch, groups: list[Group], old: Old, models: dict, cfg: Config, kl_coef: float
) -> dict:
    """Gradients of one minibatch's losses, summed over its micro-batches; {model: [stats]}. COLLECTIVE.

    Losses are sums over tokens divided by the count of the whole minibatch on all ranks, so that neither the
    micro-batch size nor the number of ranks changes the gradient.
    """
    stats = {name: [] for name in models}
    mask = batch.mask[[row for g in groups for row in g.rows]]
    counts = (rl.loss_denom(mask, cfg.loss_agg, cfg.agent.max_new_tokens), mask.sum())
    denom, tokens = dist.all_reduce_sum(torch.stack([c.float() for c in counts]))
    for group, packed, mask in batch.micro(groups):

        def here(matrix):
            return None if matrix is None else pick(matrix, group, packed.target_mask)

        if "actor" in models:
            logp, entropy = batch.logprobs(models["actor"], packed)
            loss, stat = rl.policy_loss(
                logp,
                here(old.logp),
                here(old.advantages),
                mask,
                cfg.clip_low,
                cfg.clip_high,
                cfg.dual_clip,
                here(old.weights),
                cfg.loss_agg,
                denom,
            )
            stat["policy_loss"] = loss.detach() * tokens  # mean_stats divides by the tokens
            stat["entropy"] = rl.masked_sum(entropy.detach(), mask)
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * rl.aggregate(entropy, mask, cfg.loss_agg, denom)
            if cfg.kl_in == "loss" and old.ref_logp is not None:
                ref = here(old.ref_logp)
                loss = loss + kl_coef * rl.kl_loss(logp, here(old.logp), ref, mask, "k2", cfg.loss_agg, denom)
            loss.backward()
            stats["actor"].append(stat)
        if "critic" in models:
            values = batch.values(models["critic"], packed)
            loss, stat = rl.value_loss(values, here(old.values), here(old.returns), mask, cfg.value_clip, tokens)
            loss.backward()
            stats["critic"].append(stat)
    return stats


# ------------------------------------------------------------------------------------ states and rewards


class StatePool:
    """States to act in: the expert's, and (own_share) those that the policy reached in recent steps."""

    def __init__(self, rows: list[dict], cfg: Config):
        self.cfg, self.expert, self.own = cfg, [], []
        known: set[str] = set()
        for number, row in enumerate(rows, 1):
            try:
                state = state_from_row(row)
                task = tasks.load(state.task)
                if cfg.agent.script not in state.files:
                    raise ValueError(f"it has no {cfg.agent.script}")
            except (ValueError, TypeError) as error:
                raise config.UserError(
                    f"states.jsonl: line {number} does not fit its task: {error}; collect again"
                ) from None
            if task.name not in known:
                task.require_prepared()
                known.add(task.name)
            wanted = not cfg.pool_tasks or state.task in cfg.pool_tasks
            if wanted and (cfg.pool_actions == "all" or row.get("action") == "Edit Script"):
                self.expert.append(state)
        if not self.expert:
            raise config.UserError("the state pool is empty: collect more, or widen pool_tasks / pool_actions")

    def draw(self, step: int, count: int, fits: Callable[[State], bool], salt: int = 0) -> list[State]:
        """`count` states of a step: a function of (seed, step), the same on every rank. The pool is gone
        through in random order before any state comes twice (the paper: every state once).

        In place of a state whose prompt does not fit (an LLM expert's tokens are counted by a rule of thumb) comes the
        next one that does. Raises config.UserError when none does.
        """
        chosen, size = [], len(self.expert)
        for position in range(step * count, (step + 1) * count):
            round_, offset = divmod(position, size)
            order = np.random.default_rng([self.cfg.seed, 3 + salt, round_]).permutation(size)
            candidates = (self.expert[order[(offset + k) % size]] for k in range(size))
            state = next(filter(fits, candidates), None)
            if state is None:
                raise config.UserError("no state of the pool fits agent.max_prompt_tokens: raise it")
            chosen.append(state)
        if self.own and not salt:  # a salted draw is an evaluation's: the expert's states, always the same
            rng = np.random.default_rng([self.cfg.seed, 4 + salt, step])
            for i in np.flatnonzero(rng.random(count) < self.cfg.own_share):
                chosen[i] = self.own[rng.integers(len(self.own))]
        return chosen

    def remember(self, rollouts: list[Rollout], policy: Policy) -> None:
        """Keep the states that edits which ran have led to, the newest four steps' worth. COLLECTIVE.

        States after mistakes are left out: in them Final Answer pays 0 and an edit risks -1, so that a policy which
        trains on them learns to give up after its first mistake.
        """
        if self.cfg.own_share:
            new = [r.step.state for r in rollouts if r.step.outcome is Outcome.OK_EDIT]
            new = [replace(s, source="policy") for s in new if s.step < self.cfg.max_steps and policy.fits(s)]
            for part in dist.gather_objects(new):
                self.own += part
            self.own = self.own[-4 * self.cfg.states_per_step * self.cfg.samples_per_state :]


# -------------------------------------------------------------------------------------------------- main


def main():
    cfg = config.load(Config, "train_rl")
    ctx = dist.init()
    root = Path("runs") / cfg.run
    out = root / cfg.out
    init = require_checkpoint(cfg.init or str(root / "sft"), "run train_sft.py first, or set init")
    compute = dist.compute_dtype(cfg.dtype, ctx)
    if cfg.states_per_step % ctx.world:
        raise config.UserError(f"states_per_step must be a multiple of {ctx.world} ranks")
    pool = StatePool(read_jsonl(root / "data" / "states.jsonl"), cfg)
    if ctx.is_main:
        claim(out, cfg, ignore=MAY_CHANGE)
    dist.barrier()

    # Models: the policy, its frozen reference, and a critic of the same size. No dropout anywhere.
    with config.user_error():
        tokenizer = load_tokenizer(init)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def shard(model):
        return dist.shard(model, compute)

    reference, critic = None, None
    with config.user_error():
        actor = load_model(init, torch.float32, ctx.device, shard)
        if cfg.kl_coef:
            reference = load_model(init, compute, ctx.device, shard).requires_grad_(False)
        if cfg.advantage == "gae":
            critic = load_value_model(cfg.critic_init or init, torch.float32, ctx.device, shard)
    for model in (actor, reference, critic):
        if model is not None:
            trunk = getattr(model, "trunk", model)
            trunk.valid_vocab, trunk.checkpoint_blocks = len(tokenizer), cfg.checkpoint_blocks
    models = {"actor": actor} | ({"critic": critic} if critic else {})

    def adam(model, lr):
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay)

    optimizers = {"actor": adam(actor, cfg.actor_lr)}
    if critic:
        optimizers["critic"] = adam(critic, cfg.critic_lr)
    kl_control = rl.FixedKL(cfg.kl_coef)
    if cfg.kl_target is not None:
        kl_control = rl.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)

    start = 0
    latest = dist.find_latest(out)
    if latest:
        extra = dist.load_checkpoint(latest, models, optimizers)
        start, kl_control.coef = extra["step"], extra["kl_coef"]
        pool.own = [state_from_row(json.loads(text)) for text in extra["own"]]
        dist.print0(f"resumed {latest}")
    if ctx.is_main:
        truncate_log(out / "metrics.jsonl", start)
        truncate_log(out / "transcripts.jsonl", start)

    def save(step: int):
        """COLLECTIVE. The policy and critic as Hugging Face checkpoints, and all that an exact resume needs."""

        def export(folder: Path):
            weights = dist.full_state_dict(actor)
            if ctx.is_main:
                save_model(actor, folder, state_dict=weights, tokenizer=tokenizer)
            del weights
            if critic:
                weights = dist.full_state_dict(critic)
                if ctx.is_main:
                    save_value_model(critic, folder / "critic", state_dict=weights)

        own = [json.dumps(state.to_row()) for state in pool.own]
        extra = {"step": step, "kl_coef": kl_control.coef, "own": own}
        dist.save_checkpoint(out / f"step_{step}", models, optimizers, extra, export)
        if ctx.is_main:
            forget_old(out, cfg.keep_checkpoints)

    reduce = (dist.all_reduce_sum, dist.all_reduce_max)
    share = cfg.states_per_step // ctx.world
    mine = range(ctx.rank * share, (ctx.rank + 1) * share)
    n = cfg.samples_per_state
    cache = Path("runs") / "cache"
    with Environment(cfg.agent, cfg.sandbox, cache) as env, dist.graceful_stop() as stop_requested:
        policy = Policy(actor, tokenizer, env, cfg.sampling)
        parameters = sum(p.numel() for p in actor.parameters())
        dist.print0(
            f"{parameters / 1e6:.2f}M parameters on {ctx.world} x {ctx.device.type}; {len(pool.expert)} states; "
            f"sandbox tier {env.pool.tier}; {cfg.states_per_step * n} actions a step"
        )
        if start == 0 and latest is None:
            save(0)
        quiet = not (ctx.is_main and sys.stderr.isatty())
        for step in tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="rl", disable=quiet):
            lap = Laps()

            # 1 Rollout. Ranks sample different states; a sample's random numbers depend on its index alone.
            states = pool.draw(step, cfg.states_per_step, policy.fits)
            spans, ends = [], []
            with dist.gathered(actor):
                if cfg.rollout == "step":
                    local = [states[i] for i in mine]
                    rollouts = policy.rollout_steps(local, list(mine), n, Rng(cfg.seed, step))
                else:
                    local = [initial_state(tasks.load(states[i].task), env) for i in mine]
                    played = policy.rollout_episodes(
                        local,
                        list(mine),
                        lambda t: Rng(cfg.seed, step * cfg.max_steps + t),
                        cfg.max_steps,
                        cfg.max_minutes,
                    )
                    rollouts = []
                    for episode, parts in played:
                        spans.append((len(rollouts), len(rollouts) + len(parts)))
                        rollouts += parts
                        ends.append(episode)
            lap("rollout")

            # 2 Score. Experiments ran while others decoded; what failed through our own fault does not train.
            rewards = [reward_of(r, env.part, cfg.reward) for r in rollouts]
            batch = Batch(rollouts, n, cfg.sampling.temperature, cfg.micro_batch_tokens, pad, ctx.device)
            for i, r in enumerate(rollouts):
                if rewards[i] is None or (cfg.mask_timeouts and r.step.outcome is Outcome.TIMEOUT):
                    batch.mask[i] = False
            kept = batch.mask.any(1)
            R = torch.tensor([0.0 if r is None else r for r in rewards], device=ctx.device)
            R = torch.where(kept, R, 0.0)
            lap("score")

            # 3 The old policy, the reference and the critic, with the weights that sampled.
            old_logp, ref_logp, values = batch.fill(actor, reference, critic)
            kl = batch.zeros() if ref_logp is None else rl.kl(old_logp, ref_logp, "k1")
            weights = None
            if cfg.tis_clip is not None:
                weights = rl.tis_weights(old_logp, batch.sampler_logp, batch.mask, cfg.tis_clip)
            lap("evaluate")

            # 4 Rewards to advantages. An action pays at its last token; KL at every token.
            penalty = kl_control.coef if cfg.kl_in == "reward" else 0.0
            token_rewards = rl.token_rewards(R, kl, batch.mask, penalty)
            explained = 0.0
            if critic and cfg.rollout == "step":  # one action, then the rollout is over: no bootstrap
                advantages, returns = rl.gae(token_rewards, values, batch.mask, cfg.gamma, cfg.lam)
            elif critic:
                bootstrap = episode_bootstrap(ends, spans, batch, values, critic, policy)
                wide = [across_episode(m, spans) for m in (token_rewards, values, batch.mask)]
                wide = rl.gae(*wide, cfg.gamma, cfg.lam, bootstrap)
                advantages, returns = (per_action(m, spans, batch.shape) for m in wide)
            else:
                groups = torch.tensor([r.index for r in rollouts], device=ctx.device)
                total = token_rewards.sum(1)
                scalar = rl.group_advantages(total, groups, cfg.advantage, kept, dist.all_reduce_sum)
                advantages, returns = scalar[:, None] * batch.mask, None
            if critic:
                explained = rl.explained_variance(values, returns, batch.mask, dist.all_reduce_sum)
                if cfg.whiten:
                    advantages = rl.whiten(advantages, batch.mask, dist.all_reduce_sum)
            lap("advantages")

            # 5 Update. Minibatches are drawn over all ranks by index: how many ranks there are does not matter.
            waits = cfg.critic_warmup_steps if critic else 0  # steps before the actor's first
            train_actor = step >= waits
            for name, lr, first in (("actor", cfg.actor_lr, waits), ("critic", cfg.critic_lr, 0)):
                for group in optimizers[name].param_groups if name in optimizers else ():
                    group["lr"] = learning_rate(lr, step - first, cfg.warmup_steps)
            trained = {k: m for k, m in models.items() if k == "critic" or train_actor}
            old = Old(old_logp, ref_logp, values, advantages, returns, weights)
            stats, norms, first_ratio = {"actor": [], "critic": []}, {"actor": [], "critic": []}, None
            for epoch in range(cfg.epochs):
                order = np.random.default_rng([cfg.seed, 5, step, epoch]).permutation(cfg.states_per_step)
                for chosen in np.array_split(order, cfg.minibatches):
                    members = set(chosen.tolist())
                    groups = [g for g in batch.groups if g.index in members]
                    new_stats = accumulate_gradients(batch, groups, old, trained, cfg, kl_control.coef)
                    for name, model in trained.items():
                        norms[name].append(dist.clip_grad_norm(model.parameters(), cfg.grad_clip))
                        if not np.isfinite(norms[name][-1]):
                            raise RuntimeError(f"step {step + 1}: the {name}'s gradient is {norms[name][-1]}")
                        optimizers[name].step()
                        optimizers[name].zero_grad(set_to_none=True)
                        stats[name] += new_stats[name]
                    if first_ratio is None and train_actor:
                        first_ratio = rl.mean_stats(new_stats["actor"], *reduce)["ratio_max"]
            lap("update")

            # 6 Log, evaluate, save.
            pool.remember(rollouts, policy)
            described = [describe(r, value, env.part) for r, value in zip(rollouts, rewards)]
            everything = [row for part in dist.gather_objects(described) for row in part]
            row = {"step": step + 1, **summarise(everything), "kl_coef": kl_control.coef}
            sums = torch.stack([rl.masked_sum(kl, batch.mask), kept.sum().float(), batch.mask.sum().float()])
            kl_sum, actions, tokens = dist.all_reduce_sum(sums).tolist()
            row["kl"] = kl_sum / max(1.0, actions)  # nats per action
            row["ratio_first"] = first_ratio  # the largest ratio in the first update: 1 but for rounding
            row["explained_variance"] = explained
            row |= rl.mean_stats([rl.mismatch(old_logp, batch.sampler_logp, batch.mask)], *reduce)
            for name in models:
                if stats[name]:
                    row |= rl.mean_stats(stats[name], *reduce)
                    row[f"{name}_grad_norm"] = float(np.mean(norms[name]))
                row[f"{name}_lr"] = optimizers[name].param_groups[0]["lr"]
            kl_control.update(row["kl"], int(actions))
            if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
                row["eval"] = evaluate(policy, pool, cfg, ctx)
            lap("log")
            row |= {
                "seconds": lap.seconds,
                "tokens_per_s": tokens / lap.seconds["rollout"],
                "experiment_s": sum(r["seconds"] for r in everything),
                "cache_hits": env.counts["cache_hits"] / max(1, env.counts["experiments"]),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if ctx.device.type == "cuda" else 0.0,
            }
            if ctx.is_main:
                append_rows(out / "metrics.jsonl", [row])
                append_rows(
                    out / "transcripts.jsonl",
                    [transcript(step + 1, r, v, policy) for r, v in list(zip(rollouts, rewards))[: cfg.transcripts]],
                )
                tqdm.write(print_line(row, cfg.steps))
            stop = stop_requested()
            if stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                save(step + 1)
            if stop:
                dist.close()
                sys.exit(128 + stop)
    dist.print0(f"wrote {out}")
    dist.close()


def evaluate(policy: Policy, pool: StatePool, cfg: Config, ctx) -> dict:
    """Mean reward and outcomes on fixed states with fixed random numbers; consumes none of training's."""
    states = pool.draw(0, cfg.eval_states, policy.fits, salt=100)
    mine = list(range(ctx.rank, len(states), ctx.world))
    with dist.gathered(policy.generator.model):
        rollouts = policy.rollout_steps([states[i] for i in mine], mine, 1, Rng(cfg.seed + 1, 1 << 20))
    rows = [describe(r, reward_of(r, policy.env.part, cfg.reward), policy.env.part) for r in rollouts]
    rows = [row for part in dist.gather_objects(rows) for row in part]
    return summarise(rows)


def transcript(step: int, rollout: Rollout, value: float | None, policy: Policy) -> dict:
    return {
        "step": step,
        "task": rollout.state.task,
        "prompt": policy.tokenizer.decode(rollout.prompt),
        "reply": policy.tokenizer.decode(rollout.tokens),
        "outcome": rollout.step.outcome.value,
        "feedback": rollout.step.feedback,
        "coder": rollout.step.coder,
        "before": rollout.step.before,
        "after": rollout.step.after,
        "reward": value,
    }


def print_line(row: dict, steps: int) -> str:
    s = row["seconds"]
    parts = [
        f"step {row['step']}/{steps}",
        f"reward {row['reward']:+.3f}",
        f"valid {row['valid_share']:.2f}",
        f"edits {row['edit_share']:.2f}",
        f"gain {row['gain']:+.3f}",
        f"kl {row['kl']:.3f}",
        f"entropy {row.get('entropy', 0):.3f}",
        f"ev {row['explained_variance']:.2f}",
        f"clip {row.get('clipfrac_low', 0) + row.get('clipfrac_high', 0):.3f}",
        f"trunc {row['truncated']:.2f}",
        f"{s['rollout']:.1f}+{s['evaluate']:.1f}+{s['update']:.1f} s",
    ]
    if "eval" in row:
        parts.append(f"eval reward {row['eval']['reward']:+.3f}")
    return "  ".join(parts)


def forget_old(out: Path, keep: int) -> None:
    """Drop what only a resume needs from all but the newest `keep` checkpoints; their weights stay."""
    folders = sorted(out.glob("step_*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1)
    for folder in folders[:-keep] if keep else folders:
        (folder / "checkpoint.json").unlink(missing_ok=True)
        for file in folder.glob("rank_*.pt"):
            file.unlink()
        shutil.rmtree(folder / "critic", ignore_errors=True)


if __name__ == "__main__":
    config.main(main, user_errors=(tasks.TaskError, PromptTooLong, dist.CheckpointError, sandbox.SandboxError))
