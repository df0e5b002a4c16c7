"""rl.py against brute-force Python loops and exact expectations.

Random masks have gaps (an episode's observations), empty rows, and NaN wherever the mask is False.
"""

import math
import random

import pytest
import torch
import torch.multiprocessing as mp

import rl

N, T = 7, 9


def make_mask(seed):
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[2] = False  # a row without a token
    mask[0] = torch.arange(T) < 4  # a plain padded action
    assert (mask[:, 1:] & ~mask[:, :-1]).any(), "no gap"
    return mask


def randn(seed, *shape):
    return torch.randn(*(shape or (N, T)), generator=torch.Generator().manual_seed(seed))


def spoil(x, mask, garbage=math.nan):
    return torch.where(mask, x, torch.full_like(x, garbage))


def rows(mask, *tensors):
    """For each row, its sampled tokens only: [[(x, y, ...), ...], ...]."""
    return [[tuple(float(x[i, t]) for x in tensors) for t in range(mask.shape[1]) if mask[i, t]]
            for i in range(mask.shape[0])]  # fmt: skip


def scatter(values, mask):
    """The reverse of rows, 0 elsewhere."""
    out = torch.zeros(mask.shape)
    for i, row in enumerate(values):
        for t, value in zip(mask[i].nonzero().flatten().tolist(), row, strict=True):
            out[i, t] = value
    return out


# ---- rewards and advantages ----------------------------------------------------------------------


def test_token_rewards_put_the_outcome_on_the_last_sampled_token():
    mask, kl, reward = make_mask(0), randn(1), randn(2, N)
    got = rl.token_rewards(reward, spoil(kl, mask), mask, coef=0.3)
    expected = [[-0.3 * k for (k,) in row] for row in rows(mask, kl)]
    for i, row in enumerate(expected):
        if row:
            row[-1] += float(reward[i])
    torch.testing.assert_close(got, scatter(expected, mask))
    # nothing is lost or invented on the way: each row sums to R - coef * KL
    filled = mask.any(1)
    total = reward - 0.3 * torch.where(mask, kl, 0.0).sum(1)
    torch.testing.assert_close(got.sum(1)[filled], total[filled])
    assert (got.sum(1)[~filled] == 0).all()
    assert not rl.token_rewards(reward, kl.requires_grad_(), mask, 0.3).requires_grad


def test_token_rewards_of_an_episode_are_placed_already():
    mask = torch.tensor([[True, True, False, True]])
    placed = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    torch.testing.assert_close(rl.token_rewards(placed, torch.ones(1, 4), mask, 0.5),
                               torch.tensor([[-0.5, 0.5, 0.0, 1.5]]))  # fmt: skip
    with pytest.raises(AssertionError):  # on the observation: it would be lost
        rl.token_rewards(placed.roll(1, dims=1), torch.ones(1, 4), mask, 0.5)


def loop_gae(rewards, values, gamma, lam, bootstrap):
    """By definition: A_t = sum_k (gamma lam)^k delta_{t+k}, on one row's sampled tokens."""
    after = [*values[1:], bootstrap]
    delta = [r + gamma * v2 - v for r, v, v2 in zip(rewards, values, after)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_skips_gaps(gamma, lam, cut):
    mask, rewards, values = make_mask(3), randn(4), randn(5)
    bootstrap = randn(6, N) if cut else None
    got, returns = rl.gae(spoil(rewards, mask), spoil(values, mask), mask, gamma, lam, bootstrap)
    expected = []
    for i, row in enumerate(rows(mask, rewards, values)):
        r, v = zip(*row) if row else ((), ())
        expected.append(loop_gae(r, v, gamma, lam, float(bootstrap[i]) if cut else 0.0))
    expected = scatter(expected, mask)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_gae_ignores_where_the_gaps_are():
    packed, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -0.5, 0.25]])
    whole = rl.gae(packed, values, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)[0]
    mask = torch.tensor([[False, True, False, False, True, True, False]])
    spread_r, spread_v = (torch.full((1, 7), 99.0).masked_scatter(mask, x) for x in (packed, values))
    assert rl.gae(spread_r, spread_v, mask, 0.9, 0.8)[0][mask].tolist() == whole[0].tolist()


def test_truncated_row_differs_from_a_terminated_one_by_the_discounted_bootstrap():
    rewards, values = torch.ones(2, 3), torch.zeros(2, 3)
    mask, gamma, lam = torch.ones(2, 3, dtype=torch.bool), 0.9, 0.8
    got = rl.gae(rewards, values, mask, gamma, lam, torch.tensor([0.0, 5.0]))[0]
    torch.testing.assert_close(got[1] - got[0],
                               5 * gamma * torch.tensor([(gamma * lam) ** 2, gamma * lam, 1]))  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_group_advantages_by_hand(kind):
    rewards = torch.tensor([1.0, 4.0, 2.0, 0.0, 6.0, 9.0, 100.0])
    groups = torch.tensor([30, 7, 30, 30, 7, 5, 30])  # any ids, in any order; 5 is alone
    valid = torch.tensor([True] * 6 + [False])
    got = rl.group_advantages(rewards, groups, kind, valid)
    for i in range(7):
        mates = [j for j in range(7) if valid[j] and (kind == "reinforce" or groups[j] == groups[i])]
        r = [float(rewards[j]) for j in mates]
        mean = sum(r) / len(r)
        expected = float(rewards[i]) - mean
        if kind == "grpo":
            expected /= math.sqrt(sum((x - mean) ** 2 for x in r) / max(len(r) - 1, 1)) + 1e-6
        if kind == "rloo" and len(r) > 1:
            others = [float(rewards[j]) for j in mates if j != i]
            expected = float(rewards[i]) - sum(others) / len(others)
        assert float(got[i]) == pytest.approx(expected if valid[i] else 0.0, abs=1e-5)
    if kind != "reinforce":
        assert got[5] == 0
    assert rl.group_advantages(torch.ones(4), torch.zeros(4).long(), kind).tolist() == [0] * 4
    assert rl.group_advantages(torch.ones(0), torch.zeros(0).long(), kind).shape == (0,)


def test_unknown_names_are_refused_with_the_choices():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="choose grpo"):
        rl.group_advantages(torch.ones(1), torch.zeros(1).long(), "ppo")
    with pytest.raises(ValueError, match="choose k1"):
        rl.kl(one, one, "k4")
    with pytest.raises(ValueError, match="belongs into the reward"):
        rl.kl_loss(one, one, one, one.bool(), "k1")
    with pytest.raises(ValueError, match="choose token_mean"):
        rl.aggregate(one, one.bool(), "mean")
    with pytest.raises(ValueError, match="fixed length"):
        rl.aggregate(one, one.bool(), "seq_mean_token_sum_norm")
    with pytest.raises(ValueError, match="positive"):
        rl.AdaptiveKL(0.1, 0.0, 10)


def test_whitened_tokens_have_mean_0_and_variance_1_whatever_the_padding():
    mask, x = make_mask(7), 3 * randn(8) + 2
    got = rl.whiten(spoil(x, mask), mask)
    values = [v for row in rows(mask, x) for (v,) in row]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    expected = [[(v - mean) / std for (v,) in row] for row in rows(mask, x)]
    torch.testing.assert_close(got, scatter(expected, mask))
    assert (rl.whiten(x * 0 + 5, mask) == 0).all()  # constant: no division by zero
    assert (rl.whiten(x, torch.zeros_like(mask)) == 0).all()


# ---- KL ------------------------------------------------------------------------------------------


def softmax3():
    torch.manual_seed(0)
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    return theta, torch.randn(3, dtype=torch.float64).log_softmax(0)


def exact_gradient(loss_of_logp, theta, weights):
    """d/dtheta of sum_a weights_a loss(a): the expected gradient of a loss on sampled tokens."""
    loss = (weights.detach() * loss_of_logp(theta.log_softmax(0))).sum()
    return torch.autograd.grad(loss, theta)[0]


def true_kl_gradient(theta, ref, reverse=True):
    logp = theta.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum() if reverse else (ref.exp() * (ref - logp)).sum()
    return torch.autograd.grad(kl, theta)[0]


def test_kl_estimators_in_expectation():
    theta, ref = softmax3()
    logp = theta.log_softmax(0).detach()
    kl = float((logp.exp() * (logp - ref)).sum())
    for kind in ("k1", "k3"):
        assert float((logp.exp() * rl.kl(logp, ref, kind)).sum()) == pytest.approx(kl)
    assert (rl.kl(logp, ref, "k3") >= 0).all() and (rl.kl(logp, ref, "k2") >= 0).all()
    torch.testing.assert_close(rl.kl(logp, ref, "k2"), (logp - ref) ** 2 / 2)
    # at temperature-sized differences k2 is close, and exactly half the square
    near = logp + 0.01
    assert float(rl.kl(near, logp, "k2")[0]) == pytest.approx(5e-5)


def test_expected_gradients_of_the_estimators_as_naive_losses():
    theta, ref = softmax3()
    p = theta.softmax(0)
    zero = torch.zeros(3, dtype=torch.float64)
    for kind, expected in (
        ("k1", zero),
        ("k2", true_kl_gradient(theta, ref)),
        ("k3", true_kl_gradient(theta, ref, reverse=False)),
    ):
        got = exact_gradient(lambda logp, kind=kind: rl.kl(logp, ref, kind), theta, p)
        torch.testing.assert_close(got, expected, msg=kind)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_loss_has_the_true_gradient_on_and_off_policy(kind, on_policy):
    theta, ref = softmax3()
    noise = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    old = (theta.detach() + (0 if on_policy else 1) * noise).log_softmax(0)

    def loss(logp):  # one token per row, so that the mean over rows is left out by denom=1
        one = torch.ones(1, 1, dtype=torch.bool)
        parts = [rl.kl_loss(logp[a, None, None], old[a, None, None], ref[a, None, None], one, kind, denom=1)
                 for a in range(3)]  # fmt: skip
        return torch.stack(parts)

    torch.testing.assert_close(exact_gradient(loss, theta, old.exp()), true_kl_gradient(theta, ref))


def test_kl_in_the_reward_gives_the_true_gradient_too():
    theta, ref = softmax3()
    p, logp = theta.softmax(0).detach(), theta.log_softmax(0).detach()
    penalty = rl.token_rewards(torch.zeros(3), rl.kl(logp, ref, "k1")[:, None],
                               torch.ones(3, 1, dtype=torch.bool), coef=1.0)[:, 0]  # fmt: skip
    got = exact_gradient(lambda logp: -penalty * logp, theta, p)
    torch.testing.assert_close(got, true_kl_gradient(theta, ref))


def test_adaptive_kl_arithmetic():
    controller = rl.AdaptiveKL(0.2, target=6.0, horizon=10000)
    controller.update(kl=6.6, n=256)  # error 0.1
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 256 / 10000))
    controller = rl.AdaptiveKL(0.2, target=6.0, horizon=1000)
    controller.update(kl=600.0, n=100)  # clipped
    assert controller.coef == pytest.approx(0.2 * 1.02)
    controller.update(kl=0.0, n=100)
    assert controller.coef == pytest.approx(0.2 * 1.02 * 0.98)
    fixed = rl.FixedKL(0.2)
    fixed.update(kl=600.0, n=100)
    assert fixed.coef == 0.2


# ---- losses --------------------------------------------------------------------------------------


def near_policy(seed):
    """old_logp, logp around it (ratios from about 0.3 to 3), advantages, mask."""
    old = -randn(seed).abs() - 0.1
    return old, old + 0.5 * randn(seed + 1), randn(seed + 2), make_mask(seed)


def loop_policy_token(logp, old, a, w, low, high, c):
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = -min(ratio * a, clipped * a)
    if c is not None and a < 0:
        loss = min(loss, -c * a)
    return w * loss


def loop_aggregate(per_row, agg, length):
    per_row = [row for row in per_row if row]
    if agg == "token_mean":
        return sum(map(sum, per_row)) / sum(map(len, per_row))
    if agg == "seq_mean_token_mean":
        return sum(sum(row) / len(row) for row in per_row) / len(per_row)
    return sum(map(sum, per_row)) / len(per_row) / (length if agg.endswith("norm") else 1)


AGGS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, None), (0.2, 0.28, 1.5), (0.1, 0.5, 3.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_and_its_gradient_against_a_scalar_loop(agg, low, high, dual, weighted):
    old, logp, advantages, mask = near_policy(10)
    weights = randn(20).abs() if weighted else None
    logp.requires_grad_()
    denom = rl.loss_denom(mask, agg, length=20)
    spoilt = spoil(weights, mask) if weighted else None
    loss, _ = rl.policy_loss(logp, spoil(old, mask), spoil(advantages, mask), mask, low, high, dual,
                             spoilt, agg, denom)  # fmt: skip
    grad = torch.autograd.grad(loss, logp)[0]

    def loop(logp):
        w = weights if weighted else torch.ones(N, T)
        table = rows(mask, logp, old, advantages, w)
        per_row = [[loop_policy_token(*token, low, high, dual) for token in row] for row in table]
        return loop_aggregate(per_row, agg, 20)

    logp = logp.detach().double()
    assert loss.item() == pytest.approx(loop(logp), rel=1e-5)
    generator = random.Random(0)
    for i, t in generator.sample([(i, t) for i in range(N) for t in range(T)], 12):
        step = torch.zeros(N, T, dtype=torch.float64)
        step[i, t] = 1e-6
        slope = (loop(logp + step) - loop(logp - step)) / 2e-6
        assert float(grad[i, t]) == pytest.approx(slope, rel=1e-3, abs=1e-7)
    assert (grad[~mask] == 0).all()


def test_policy_stats_count_the_tokens_whose_gradient_each_clip_stops():
    ratio = torch.tensor([[0.5, 0.5, 2.0, 2.0, 9.0, 1.0, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])
    logp = ratio.log().requires_grad_()
    mask = torch.ones(1, 7, dtype=torch.bool)
    loss, stats = rl.policy_loss(logp, torch.zeros(1, 7), advantages, mask, 0.2, 0.2, dual_clip=3.0)
    grad = torch.autograd.grad(loss, logp)[0][0]
    assert (grad == 0).tolist() == [False, True, True, False, True, False, False]
    counts = {k: float(stats[k]) for k in ("tokens", "clipfrac_low", "clipfrac_high", "clipfrac_dual")}
    assert counts == {"tokens": 7, "clipfrac_low": 1, "clipfrac_high": 1, "clipfrac_dual": 1}
    means = rl.mean_stats([stats])
    assert means["ratio"] == pytest.approx(float(ratio.mean())) and means["ratio_max"] == 9
    k3 = sum(r - 1 - math.log(r) for r in ratio[0].tolist()) / 7
    assert means["approx_kl"] == pytest.approx(k3, rel=1e-5)


def test_first_update_has_ratio_1_and_the_plain_policy_gradient():
    old, _, advantages, mask = near_policy(11)
    logp = old.clone().requires_grad_()
    loss, stats = rl.policy_loss(logp, old, advantages, mask, 0.2, 0.2)
    means = rl.mean_stats([stats])
    assert means["ratio"] == 1 and means["ratio_max"] == 1 and means["approx_kl"] == 0
    assert means["clipfrac_low"] == means["clipfrac_high"] == 0
    expected = torch.where(mask, -advantages, 0.0) / mask.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss_against_a_scalar_loop(clip):
    values, old, returns, mask = randn(30), randn(31), randn(32), make_mask(33)
    loss, stats = rl.value_loss(*(spoil(x, mask) for x in (values, old, returns)), mask, clip)
    losses, clips, errors = [], 0, 0.0
    for v, v_old, r in [token for row in rows(mask, values, old, returns) for token in row]:
        error = worst = (v - r) ** 2
        if clip:
            worst = max(error, (v_old + min(max(v - v_old, -clip), clip) - r) ** 2)
        losses.append(worst / 2)
        clips += worst > error
        errors += error
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    means = rl.mean_stats([stats])
    assert means["value_clipfrac"] == pytest.approx(clips / len(losses))
    assert means["value_error"] == pytest.approx(errors / len(losses), rel=1e-5)
    assert (clips > 0) == bool(clip)


def losses(part, denom, agg):
    """A sum of all the losses on some rows, as a training step adds them."""
    old, logp, advantages, mask, values, returns, ref = part
    return (rl.policy_loss(logp, old, advantages, mask, 0.2, 0.2, 3.0, None, agg, denom)[0]
            + rl.value_loss(values, old, returns, mask, 0.5, denom)[0]
            + rl.kl_loss(logp, old, ref, mask, "k3", agg, denom))  # fmt: skip


@pytest.mark.parametrize("agg", AGGS)
def test_gradients_do_not_depend_on_the_micro_batch_size_or_on_padding(agg):
    old, logp, advantages, mask = near_policy(12)
    parts = [old, logp, advantages, mask, randn(40), randn(41), old + randn(42)]
    denom = rl.loss_denom(mask, agg, length=20)
    gradients = []
    for size in (1, 2, 3, N):
        logp, values = parts[1].clone().requires_grad_(), parts[4].clone().requires_grad_()
        for i in range(0, N, size):
            width = int(mask[i : i + size].any(0).nonzero().amax()) + 1 if mask[i : i + size].any() else 1
            whole = [parts[0], logp, parts[2], mask, values, parts[5], parts[6]]
            cut = [x[i : i + size, :width] for x in whole]  # as narrow as this micro-batch may be
            losses(cut, denom, agg).backward()
        gradients.append((logp.grad, values.grad))
    for got in gradients[:-1]:
        torch.testing.assert_close(got, gradients[-1])
    assert all((g[0][mask] != 0).any() for g in gradients)


def test_stats_of_micro_batches_average_over_tokens_not_over_micro_batches():
    old, logp, advantages, mask = near_policy(13)
    values, returns = randn(43), randn(44)
    whole = rl.policy_loss(logp, old, advantages, mask, 0.2, 0.2)[1]
    cuts = [slice(0, 1), slice(1, 6), slice(6, 7)]
    split = [rl.policy_loss(logp[c], old[c], advantages[c], mask[c], 0.2, 0.2)[1] for c in cuts]
    assert rl.mean_stats(split) == pytest.approx(rl.mean_stats([whole]))
    whole = rl.value_loss(values, old, returns, mask, 0.5)[1]
    split = [rl.value_loss(values[c], old[c], returns[c], mask[c], 0.5)[1] for c in cuts]
    assert rl.mean_stats(split) == pytest.approx(rl.mean_stats([whole]))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, -math.inf])
def test_garbage_where_masked_changes_nothing(garbage):
    old, logp, advantages, mask = near_policy(14)
    clean = [old, logp, advantages, mask, randn(40), randn(41), old + randn(42)]
    results = []
    for inputs in (clean, [x if x is mask else spoil(x, mask, garbage) for x in clean]):
        inputs[1].requires_grad_(), inputs[4].requires_grad_()
        loss = losses(inputs, None, "token_mean")
        results.append((loss, *torch.autograd.grad(loss, [inputs[1], inputs[4]])))
        _, stats = rl.policy_loss(inputs[1], inputs[0], inputs[2], mask, 0.2, 0.2)
        results[-1] += tuple(rl.mean_stats([stats]).values())
        results[-1] += tuple(rl.mean_stats([rl.mismatch(inputs[1], inputs[0], mask)]).values())
        results[-1] += (rl.explained_variance(inputs[4], inputs[5], mask),
                        rl.tis_weights(inputs[1], inputs[0], mask, 2.0))  # fmt: skip
    for a, b in zip(*results):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0)


@pytest.mark.parametrize("agg", AGGS)
def test_aggregate_leaves_garbage_out_of_value_and_gradient(agg):
    mask, x = make_mask(16), randn(45)
    dirty = spoil(x, mask).requires_grad_()
    denom = rl.loss_denom(mask, agg, length=5)
    got = rl.aggregate(dirty, mask, agg, denom)
    assert got.item() == pytest.approx(loop_aggregate([[v for (v,) in row] for row in rows(mask, x)], agg, 5))
    grad = torch.autograd.grad(got, dirty)[0]
    assert (grad[~mask] == 0).all() and (grad[mask] > 0).all()
    mean = torch.where(mask, x, 0.0).sum() / mask.sum()
    torch.testing.assert_close(rl.masked_mean(dirty, mask).detach(), mean)


@pytest.mark.parametrize("agg", AGGS)
def test_an_empty_batch_gives_loss_0_and_gradient_0(agg):
    mask = torch.zeros(N, T, dtype=torch.bool)
    x = randn(50).requires_grad_()
    denom = rl.loss_denom(mask, agg, length=5)
    for loss in (
        rl.policy_loss(x, spoil(x, mask).detach(), randn(51), mask, 0.2, 0.2, 3.0, randn(52), agg, denom)[0],
        rl.value_loss(x, randn(53), randn(54), mask, 0.5, denom)[0],
        rl.kl_loss(x, randn(53), randn(54), mask, "k3", agg, denom),
        rl.masked_mean(x, mask),
    ):
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    stats = rl.policy_loss(x, x.detach(), randn(51), mask, 0.2, 0.2)[1]
    assert set(rl.mean_stats([stats]).values()) == {0.0}
    assert rl.explained_variance(x.detach(), x.detach(), mask) == 0


def test_a_huge_log_ratio_stays_finite():
    old, mask = torch.tensor([[-1e4, 0.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    logp = torch.tensor([[0.0, -1e4, -1.0]], requires_grad=True)
    for advantage in (1.0, -1.0):
        loss, stats = rl.policy_loss(logp, old, torch.full((1, 3), advantage), mask, 0.2, 0.2)
        grad = torch.autograd.grad(loss, logp)[0]
        assert loss.isfinite() and grad.isfinite().all()
        assert all(math.isfinite(v) for v in rl.mean_stats([stats]).values())
    for kind in ("k2", "k3"):
        loss = rl.kl_loss(logp, old, old, mask, kind)
        assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()
    assert rl.tis_weights(logp, old, mask, 2.0).tolist() == [[2.0, pytest.approx(0, abs=1e-8), 1.0]]


# ---- sampler against trainer, metrics ------------------------------------------------------------


def test_tis_weights_and_mismatch_by_hand():
    ours = torch.tensor([[0.5, 0.2, 0.9]]).log()
    theirs = torch.tensor([[0.4, 0.4, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    weights = rl.tis_weights(ours.requires_grad_(), theirs, mask, cap=1.2)
    assert weights.tolist() == [[pytest.approx(1.2), pytest.approx(0.5), 0]] and not weights.requires_grad
    got = rl.mean_stats([rl.mismatch(ours, theirs, mask)])
    k3 = [1.25 - 1 - math.log(1.25), 0.5 - 1 - math.log(0.5)]
    assert got == {"mismatch_kl": pytest.approx(sum(k3) / 2, rel=1e-5), "mismatch_prob": pytest.approx(0.15),
                   "mismatch_ratio_max": pytest.approx(1.25)}  # fmt: skip


def test_explained_variance_by_hand():
    mask, returns = make_mask(60), randn(61)
    values = returns + 0.5 * randn(62)
    r, e = ([x for row in rows(mask, t) for (x,) in row] for t in (returns, returns - values))

    def variance(x):
        return sum((v - sum(x) / len(x)) ** 2 for v in x)

    expected = 1 - variance(e) / variance(r)
    assert rl.explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-5)
    assert rl.explained_variance(returns + 3, returns, mask) == pytest.approx(1)
    assert rl.explained_variance(returns * 0, returns, mask) == pytest.approx(0)
    assert rl.explained_variance(returns, returns * 0 + 0.1, mask) == 0


# ---- two processes -------------------------------------------------------------------------------


def two_ranks(rank, path, shares):
    """Rank r computes on its share of the rows; what it returns goes to a file."""
    torch.distributed.init_process_group("gloo", f"file://{path}/rendezvous", rank=rank, world_size=2)

    def reducer(op):
        def reduce(tensor):
            torch.distributed.all_reduce(tensor, op)
            return tensor

        return reduce

    add, top = reducer(torch.distributed.ReduceOp.SUM), reducer(torch.distributed.ReduceOp.MAX)
    torch.save(global_things(shares[rank], add, top), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def global_things(share, add=None, top=None):
    old, logp, advantages, mask = (x[share] for x in near_policy(15))
    reward = randn(70, N)[share]
    groups, valid = torch.arange(N)[share], mask.any(1)
    stats = rl.policy_loss(logp, old, advantages, mask, 0.2, 0.2)[1]
    return {
        "whitened": rl.whiten(advantages, mask, add),
        "baseline": rl.group_advantages(reward, groups, "reinforce", valid, add),
        "explained": rl.explained_variance(advantages, old, mask, add),
        "stats": rl.mean_stats([stats], add, top),
    }


@pytest.mark.parametrize("shares", [([0, 1, 3], [4, 5, 6, 2]), ([0, 1, 3, 4, 5, 6], [2])])
def test_two_ranks_with_uneven_tokens_equal_one_process(tmp_path, shares):
    """Row 2 has no token: in the second case rank 1 has none at all, and must not hang or bias."""
    mp.spawn(two_ranks, (tmp_path, shares), nprocs=2)
    expected = global_things(shares[0] + shares[1])
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for key in ("whitened", "baseline"):
        torch.testing.assert_close(torch.cat([g[key] for g in got]), expected[key])
    for g in got:
        assert g["explained"] == pytest.approx(expected["explained"])
        assert g["stats"] == pytest.approx(expected["stats"])
