"""Every metric against a loop written from its definition, and the traps of the libraries."""

import math

import numpy as np
import pytest

from tasks import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_accuracy(rng):
    y, p = rng.integers(0, 3, 50).astype(str), rng.integers(0, 3, 50).astype(str)
    assert metrics.accuracy(y, p) == sum(a == b for a, b in zip(y, p)) / 50


def test_log_loss(rng):
    y, p = rng.integers(0, 2, 40), rng.uniform(0.01, 0.99, 40)
    naive = -sum(math.log(q if a == 1 else 1 - q) for a, q in zip(y, p)) / 40
    assert metrics.log_loss(y, p) == pytest.approx(naive)


def test_multi_log_loss_also_when_a_class_is_absent(rng):
    y = rng.integers(0, 3, 30)  # of four classes
    p = rng.uniform(0.1, 1, (30, 4))
    p /= p.sum(axis=1, keepdims=True)
    naive = -sum(math.log(row[a]) for a, row in zip(y, p)) / 30
    assert metrics.multi_log_loss(y, p) == pytest.approx(naive)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_sure_error_costs_the_same_in_every_precision(kind):
    """scikit-learn clips at the epsilon of the array's type: 36.04 in float64, 15.94 in float32."""
    assert metrics.log_loss([1], np.array([0], kind)) == pytest.approx(36.04, abs=0.01)
    wrong = np.array([[0, 1]], kind)
    assert metrics.multi_log_loss([0], wrong) == pytest.approx(36.04, abs=0.01)


def test_auc_counts_pairs_and_halves_ties(rng):
    y, p = rng.integers(0, 2, 40), rng.integers(0, 6, 40) / 5
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    assert metrics.auc(y, p) == pytest.approx(np.mean(pairs))


def test_auc_of_one_class_is_an_error_and_no_nan():
    with pytest.raises(ValueError, match="both classes"):
        metrics.auc([1, 1], [0.2, 0.4])


def test_mean_auc_is_the_mean_over_columns(rng):
    y, p = rng.integers(0, 2, (40, 3)), rng.uniform(size=(40, 3))
    naive = np.mean([metrics.auc(y[:, j], p[:, j]) for j in range(3)])
    assert metrics.mean_auc(y, p) == pytest.approx(naive)
    assert metrics.mean_auc(y, p) != pytest.approx(metrics.auc(y.ravel(), p.ravel()))


def test_mean_auc_refuses_a_column_of_one_class():
    y = np.array([[0, 1], [1, 1], [0, 1]])
    with pytest.raises(ValueError, match="both classes"):
        metrics.mean_auc(y, np.full((3, 2), 0.5))


def test_rmse_pools_all_values(rng):
    """The mean of each page's RMSE would be smaller: 2 instead of sqrt(5)."""
    y, p = np.zeros(4), np.array([1.0, 1.0, 3.0, 3.0])
    assert metrics.rmse(y, p) == pytest.approx(math.sqrt(5))
    assert metrics.rmse(y.reshape(2, 2), p.reshape(2, 2)) == pytest.approx(math.sqrt(5))


def test_errors_of_numbers(rng):
    y, p = rng.normal(size=30), rng.normal(size=30)
    assert metrics.mae(y, p) == pytest.approx(sum(abs(a - b) for a, b in zip(y, p)) / 30)
    squares = sum((a - b) ** 2 for a, b in zip(y, p))
    assert metrics.rmse(y, p) == pytest.approx(math.sqrt(squares / 30))


def test_mcrmse_takes_the_root_before_the_mean(rng):
    y, p = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) * [1, 5]
    roots = [math.sqrt(sum((y[i, j] - p[i, j]) ** 2 for i in range(20)) / 20) for j in range(2)]
    assert metrics.mcrmse(y, p) == pytest.approx(sum(roots) / 2)
    assert metrics.mcrmse(y, p) != pytest.approx(metrics.rmse(y, p))


def test_rmsle_of_one_and_of_two_columns(rng):
    y, p = rng.uniform(0, 9, (20, 2)), rng.uniform(-0.5, 9, (20, 2))
    roots = []
    for j in range(2):
        squares = sum((math.log1p(y[i, j]) - math.log1p(p[i, j])) ** 2 for i in range(20))
        roots.append(math.sqrt(squares / 20))
    assert metrics.rmsle(y, p) == pytest.approx(sum(roots) / 2)
    assert metrics.rmsle(y[:, 0], p[:, 0]) == pytest.approx(roots[0])


def test_pearson(rng):
    y, p = rng.normal(size=30), rng.normal(size=30)
    my, mp = sum(y) / 30, sum(p) / 30
    cov = sum((a - my) * (b - mp) for a, b in zip(y, p))
    naive = cov / math.sqrt(sum((a - my) ** 2 for a in y) * sum((b - mp) ** 2 for b in p))
    assert metrics.pearson(y, p) == pytest.approx(naive)
    assert metrics.pearson(y, np.full(30, 0.1)) == 0  # numpy: NaN


def naive_qwk(y, p):
    observed = expected = 0.0
    for a in range(len(y)):
        observed += (y[a] - p[a]) ** 2 / len(y)
        for b in range(len(p)):
            expected += (y[a] - p[b]) ** 2 / len(y) ** 2
    return 1 - observed / expected


def test_qwk_weighs_by_value_not_by_position():
    y, p = [1, 2, 6, 6, 1, 2], [1, 6, 2, 6, 1, 2]  # 3, 4 and 5 are absent
    assert metrics.qwk(y, p) == pytest.approx(naive_qwk(y, p))
    from sklearn.metrics import cohen_kappa_score

    assert metrics.qwk(y, p) != pytest.approx(cohen_kappa_score(y, p, weights="quadratic"))


def test_qwk_takes_floats_and_gives_zero_for_constants(rng):
    y, p = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    assert metrics.qwk(y, p.astype(float)) == pytest.approx(naive_qwk(y, p))
    assert metrics.qwk(y, np.full(40, 3)) == 0


def test_map5():
    y = ["a", "b", "c", "d"]
    p = [["a", "x"], ["x", "x", "b"], ["q", "r", "s", "t", "u", "c"], []]
    assert metrics.map5(y, p) == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)


@pytest.mark.parametrize("place, score", [*enumerate([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0])])
def test_map5_by_place(place, score):
    ranked = list("qrstuv")
    ranked[place] = "a"
    assert metrics.map5(["a"], [ranked]) == pytest.approx(score)


def test_directions():
    down = {name for name, m in metrics.METRICS.items() if m.lower_is_better}
    assert down == {"log_loss", "multi_log_loss", "mae", "rmse", "mcrmse", "rmsle"}
