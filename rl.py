"""Advantages, losses and KL for step-wise PPO (paper 4.2): pure functions on tensors.

Shapes and names, everywhere in this file
    N actions (rows), T token positions of an action; tensors are [N, T] unless stated.
    mask          bool, True where the POLICY sampled the token, its end-of-sequence token included;
                  False on padding, and on what the environment wrote between an episode's actions.
                  Where it is False nothing matters, be it NaN.
    logp          log pi_theta(o_i | s, o_<i), the trainer's, at the sampling temperature, with gradient
    old_logp      log pi_old: the trainer's, under the weights that sampled
    ref_logp      log pi_ref: the frozen reference's
    sampler_logp  what the sampler itself recorded

Losses are sums divided by `denom`. Pass the count of the WHOLE batch, over micro-batches and ranks
(`loss_denom`, summed), and add gradients up: then neither the size of the micro-batches nor the number
of ranks changes the gradient. (A mean of micro-batch means weighs a token by its neighbours' length.)
`stats` are sums as well, with their count in "tokens"; `mean_stats` makes numbers of them.

Rows without any token are legal everywhere: loss 0, finite gradients.
"""

import torch

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-this before exp: e^20 is far outside any clip range


def masked_sum(x, mask):
    """The sum of x where mask, a scalar. NaN and inf elsewhere neither count nor send gradients."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x, mask, denom=None):
    """masked_sum / denom, a scalar. denom: by default the number of True; 0 gives 0."""
    return masked_sum(x, mask) / _at_least_one(mask.sum() if denom is None else denom)


def _at_least_one(count):
    return torch.as_tensor(count).clamp(min=1)


def _ratio(log_ratio, mask):
    """exp(log_ratio), never inf; 1 where masked."""
    return torch.where(mask, log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _identity(tensor):
    return tensor


# ---- rewards and advantages ----------------------------------------------------------------------


@torch.no_grad()
def token_rewards(rewards, kl, mask, coef):
    """r_t = -coef kl_t + [t is the action's last token] R

    rewards  [N], R of each row; or [N, T], placed already: an episode pays at the last token of each
             of its actions
    kl       k1 estimates of old_logp against ref_logp
    Returns [N, T], 0 where masked. A row sums to R - coef sum_t kl_t.
    """
    if rewards.ndim == 1:
        position = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, position, -1).amax(1, keepdim=True)  # [N, 1]; -1: an empty row
        rewards = torch.where(position == last, rewards[:, None], 0.0)
    assert not rewards[~mask].any(), "a reward where mask is False would be lost"
    return torch.where(mask, rewards - coef * kl, 0.0)


@torch.no_grad()
def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Generalised advantage estimation; t+ is the next SAMPLED token, however far away:

        delta_t = r_t + gamma V_{t+} - V_t    A_t = delta_t + gamma lam A_{t+}    return_t = A_t + V_t

    After a row's last sampled token V is 0 (terminated), or `bootstrap` [N] (cut short: V of the
    state that would have come next). Returns (advantages, returns), 0 where masked.

    A recursion that runs through the gaps with zeros in them agrees only at gamma = lam = 1.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values.dtype)
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def group_advantages(rewards, groups, kind, valid=None, all_reduce=None):
    """Advantages without a critic: each action against its group, the samples of one state.

        grpo        (R - mean_g) / (std_g + 1e-6), std with n - 1
        dr_grpo     R - mean_g
        rloo        (R - mean_g) n / (n - 1), which is R minus the mean of the others
        reinforce   R - mean of the whole batch (of all ranks with `all_reduce`, a sum)

    rewards  [N], KL penalty already taken off: row sums of token_rewards
    groups   [N] integers, equal for samples of one state. By state, never by prompt text; a group
             must not be split over ranks
    valid    [N] bool; a row that is not (padding, an internal failure) gets 0 and moves no baseline
    Returns [N], one advantage for all tokens of an action. A group of one gets 0: it has nothing to
    compare with.
    """
    if kind not in ("grpo", "dr_grpo", "rloo", "reinforce"):
        raise ValueError(f"unknown baseline {kind!r}; choose grpo, dr_grpo, rloo or reinforce")
    valid = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    across_ranks = (all_reduce or _identity) if kind == "reinforce" else _identity
    groups = torch.zeros_like(groups) if kind == "reinforce" else groups
    groups = groups.unique(return_inverse=True)[1]
    number = int(groups.max()) + 1 if len(groups) else 1

    def total(x):  # [N] -> the sum over each row's group, [N]
        return across_ranks(x.new_zeros(number).index_add(0, groups, x))[groups]

    reward = torch.where(valid, rewards, 0.0).double()
    n = total(valid.double())
    advantage = torch.where(valid, reward - total(reward) / n.clamp(min=1), 0.0)
    if kind == "grpo":
        advantage /= (total(advantage.square()) / (n - 1).clamp(min=1)).sqrt() + 1e-6
    if kind == "rloo":
        advantage *= n / (n - 1).clamp(min=1)
    return advantage.to(rewards.dtype)


@torch.no_grad()
def whiten(x, mask, all_reduce=None):
    """(x - mean) / sqrt(var + 1e-8) over the sampled tokens, var biased; 0 where masked.

    all_reduce(tensor) -> tensor, a sum over ranks, makes the moments global. It is called exactly
    twice whatever the data: a rank without a token must not leave the others waiting.
    """
    all_reduce = all_reduce or _identity
    x64 = torch.where(mask, x, 0.0).double()
    total, count = all_reduce(torch.stack([x64.sum(), mask.sum().double()]))
    centred = torch.where(mask, x64 - total / count.clamp(min=1), 0.0)
    variance = all_reduce(centred.square().sum()) / count.clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).to(x.dtype)


# ---- KL ------------------------------------------------------------------------------------------


def kl(logp, ref_logp, kind):
    """Estimates, token by token, of KL(pi || pi_ref) where pi sampled; d = logp - ref_logp:

        k1 = d               unbiased, noisy, of either sign: the one for the reward
        k2 = d^2 / 2         biased, never negative
        k3 = e^-d - 1 + d    unbiased, never negative

    Good estimates are not good losses: the expected gradient of k1 is zero, that of k3 is the
    gradient of the other direction, KL(pi_ref || pi). For a loss take kl_loss.
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return (-d).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + d
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


def kl_loss(logp, old_logp, ref_logp, mask, kind="k2", agg="token_mean", denom=None):
    """A loss whose expected gradient IS that of KL(pi_theta || pi_ref), on tokens from pi_old:

        k2:  sg(rho_t) d_t^2 / 2      k3:  rho_t k3_t      rho_t = pi_theta / pi_old, sg = detached

    Exact per token given its prefix, at the first update (rho = 1) and after it. A scalar.
    Raises ValueError for k1.
    """
    if kind not in ("k2", "k3"):
        raise ValueError(f"a KL loss takes k2 or k3, not {kind!r}: k1 belongs into the reward")
    logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    ratio = _ratio(logp - old_logp, mask)
    ratio = ratio.detach() if kind == "k2" else ratio
    return aggregate(ratio * kl(logp, ref_logp, kind), mask, agg, denom)


class FixedKL:
    """A constant KL coefficient, `coef`."""

    def __init__(self, coef):
        self.coef = coef

    def update(self, kl, n):
        """Nothing to do."""


class AdaptiveKL:
    """Ziegler et al. (2019): coef *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon

    `coef` is the whole state: save and restore it for an exact resume.
    """

    def __init__(self, coef, target, horizon):
        if not (coef > 0 and target > 0 and horizon > 0):
            raise ValueError(f"adaptive KL: {coef=}, {target=}, {horizon=} must be positive")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, n):
        """kl: the batch's mean, measured like `target`. n: the batch's size, counted like `horizon`."""
        self.coef *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * n / self.horizon


# ---- losses --------------------------------------------------------------------------------------


def loss_denom(mask, agg="token_mean", length=None):
    """What this batch adds to `denom`, a scalar tensor: sum it over micro-batches and ranks.

    length: the longest action allowed, required by seq_mean_token_sum_norm (the padded width T would
    differ from batch to batch). Raises ValueError without it, and for an unknown aggregation.
    """
    if agg == "token_mean":
        return mask.sum()
    rows = mask.any(1).sum()
    if agg in ("seq_mean_token_mean", "seq_mean_token_sum"):
        return rows
    if agg != "seq_mean_token_sum_norm":
        raise ValueError(f"unknown aggregation {agg!r}; choose token_mean, seq_mean_token_mean, "
                         "seq_mean_token_sum or seq_mean_token_sum_norm")  # fmt: skip
    if length is None:
        raise ValueError("seq_mean_token_sum_norm needs the fixed length that it divides by")
    return rows * length


def aggregate(x, mask, agg="token_mean", denom=None):
    """A scalar from x [N, T]; rows without a token do not count. denom: see loss_denom.

        token_mean                every token weighs the same
        seq_mean_token_mean       the mean over rows of each row's mean: every action weighs the same
        seq_mean_token_sum        the mean over rows of each row's sum
        seq_mean_token_sum_norm   that, divided by a fixed length (Dr. GRPO); denom is required
    """
    denom = loss_denom(mask, agg) if denom is None else denom
    if agg == "seq_mean_token_mean":
        x = x / _at_least_one(mask.sum(1, keepdim=True))
    return masked_mean(x, mask, denom)


def policy_loss(logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip=None, weights=None,
                agg="token_mean", denom=None):  # fmt: skip
    """PPO's clipped surrogate, token by token; rho_t = pi_theta / pi_old = exp(logp - old_logp):

        L_t = max(-rho_t A_t, -clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
        with dual_clip = c > 1, where A_t < 0:  L_t = min(L_t, -c A_t)

    weights: a factor on each token's loss (tis_weights). Returns (loss, stats), the loss a scalar.
    stats: ratio, approx_kl (k3 of pi_old || pi_theta); clipfrac_low, _high, _dual, the tokens whose
    gradient the lower, upper or dual clip stops; ratio_max.
    """
    assert clip_low >= 0 and clip_high >= 0 and (dual_clip is None or dual_clip > 1)
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = _ratio(log_ratio, mask)
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(free, clipped)
    stopped, bounded = clipped > free, torch.zeros_like(mask)
    if dual_clip is not None:
        bounded = (advantages < 0) & (loss > -dual_clip * advantages)
        loss = torch.where(bounded, -dual_clip * advantages, loss)
    if weights is not None:
        loss = loss * weights.detach()
    with torch.no_grad():
        stats = {
            "tokens": mask.sum(),
            "ratio": masked_sum(ratio, mask),
            "approx_kl": masked_sum(ratio - 1 - log_ratio, mask),
            "clipfrac_low": (stopped & (ratio < 1)).sum(),
            "clipfrac_high": (stopped & (ratio > 1)).sum(),
            "clipfrac_dual": bounded.sum(),
            "ratio_max": torch.where(mask, ratio, 0.0).max(),
        }
    return aggregate(loss, mask, agg, denom), stats


def value_loss(values, old_values, returns, mask, clip, denom=None):
    """The critic's clipped squared error, a mean over tokens:

        L_t = 1/2 max((V_t - return_t)^2, (V_old + clip(V_t - V_old, -clip, clip) - return_t)^2)

    old_values   from before the first update on this batch
    returns      of unwhitened advantages
    clip         None: the plain squared error
    Returns (loss, stats), the loss a scalar. stats: value, value_error (squared), value_clipfrac.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    loss = error
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(error, (near - returns).square())
    with torch.no_grad():
        stats = {
            "tokens": mask.sum(),
            "value": masked_sum(values, mask),
            "value_error": masked_sum(error, mask),
            "value_clipfrac": (loss > error).sum(),
        }
    return 0.5 * masked_mean(loss, mask, denom), stats


# ---- sampler against trainer ---------------------------------------------------------------------


@torch.no_grad()
def tis_weights(old_logp, sampler_logp, mask, cap):
    """Truncated importance sampling: min(pi_old / pi_sampler, cap), 0 where masked.

    For a sampler whose arithmetic is not quite the trainer's (other kernels, bf16).
    """
    return torch.where(mask, _ratio(old_logp - sampler_logp, mask).clamp(max=cap), 0.0)


@torch.no_grad()
def mismatch(old_logp, sampler_logp, mask):
    """How far the sampler's logprobs are from the trainer's: stats.

    mismatch_kl         k3 of KL(sampler || trainer); healthy below 0.005
    mismatch_prob       |p_sampler - p_trainer|
    mismatch_ratio_max  the largest pi_old / pi_sampler
    """
    ours, theirs = torch.where(mask, old_logp, 0.0), torch.where(mask, sampler_logp, 0.0)
    ratio = _ratio(ours - theirs, mask)
    return {
        "tokens": mask.sum(),
        "mismatch_kl": (ratio - 1 - (ours - theirs)).sum(),
        "mismatch_prob": (ours.exp() - theirs.exp()).abs().sum(),
        "mismatch_ratio_max": torch.where(mask, ratio, 0.0).max(),
    }


# ---- metrics -------------------------------------------------------------------------------------


@torch.no_grad()
def explained_variance(values, returns, mask, all_reduce=None):
    """1 - Var(return - V) / Var(return) over the sampled tokens, a float.

    1: perfect; 0: as good as a constant, or the returns do not vary; below 0: worse. all_reduce as in
    `whiten`, called exactly twice.
    """
    all_reduce = all_reduce or _identity
    pair = torch.where(mask, torch.stack([returns, returns - values]), 0.0).double()  # [2, N, T]
    moments = all_reduce(torch.cat([pair.sum((1, 2)), mask.sum().double()[None]]))
    mean = moments[:2] / moments[2].clamp(min=1)
    centred = torch.where(mask, pair - mean[:, None, None], 0.0)
    total, rest = all_reduce(centred.square().sum((1, 2))).tolist()
    return 1 - rest / total if total > 1e-12 else 0.0


@torch.no_grad()
def mean_stats(stats, all_reduce=None, all_reduce_max=None):
    """A list of stats (one per micro-batch, same keys) to {name: float}: means over all tokens, and
    maxima of the keys that end in "_max". all_reduce, all_reduce_max (a sum and a maximum over ranks)
    make them global; each is called once.
    """
    sums = [name for name in stats[0] if not name.endswith("_max")]
    tops = [name for name in stats[0] if name.endswith("_max")]
    table = torch.stack([torch.stack([s[name] for name in sums]).double() for s in stats]).sum(0)
    table = dict(zip(sums, (all_reduce or _identity)(table).tolist()))
    tokens = max(table.pop("tokens"), 1)
    table = {name: value / tokens for name, value in table.items()}
    if tops:
        top = torch.stack([torch.stack([s[name] for name in tops]).double() for s in stats]).amax(0)
        table |= zip(tops, (all_reduce_max or _identity)(top).tolist())
    return table
