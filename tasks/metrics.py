"""The metrics of all tasks: one function each, and one table.

Every function takes the answers and the predictions of the same rows as numpy arrays and returns a
float. Shapes: n rows, k columns. All of them compute in float64, because scikit-learn clips
probabilities at the machine epsilon of the array's own type: one confidently wrong probability
costs 36.04 in float64 and 15.94 in float32, so a float32 submission would be scored more kindly.

Checks of a submission's form (ids, ranges, rows that sum to one) are not here but in
`tasks.Task.score`, which runs them first; a metric may therefore assume valid input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def sk():
    """scikit-learn's metrics: late, since importing them takes longer than all else that a script needs but torch."""
    from sklearn import metrics

    return metrics


def accuracy(y, p) -> float:
    """Share of rows [n] whose predicted label equals the answer."""
    return float(np.mean(np.asarray(y) == np.asarray(p)))


def log_loss(y, p) -> float:
    """Binary log-loss (natural log) of labels y [n] in {0, 1} and probabilities p [n] of the 1."""
    p = np.asarray(p, dtype=np.float64)
    return float(sk().log_loss(np.asarray(y, dtype=int), np.column_stack([1 - p, p]), labels=[0, 1]))


def multi_log_loss(y, p) -> float:
    """Log-loss of class numbers y [n] in 0..k-1 and class probabilities p [n, k].

    All k classes count even when y lacks some (scikit-learn would complain about the width).
    """
    p = np.asarray(p, dtype=np.float64)
    p = p / p.sum(axis=1, keepdims=True)  # only what the scorer's tolerance lets through
    return float(sk().log_loss(np.asarray(y, dtype=int), p, labels=np.arange(p.shape[1])))


def auc(y, p) -> float:
    """Area under the ROC curve of labels y [n] in {0, 1}; ties count one half."""
    y = np.asarray(y, dtype=int)
    if y.min() == y.max():  # scikit-learn warns and returns NaN, which then poisons every mean
        raise ValueError("AUC needs rows of both classes in the answers")
    return float(sk().roc_auc_score(y, np.asarray(p, dtype=np.float64)))


def mean_auc(y, p) -> float:
    """Mean over the columns of [n, k] of each column's AUC."""
    y, p = np.asarray(y), np.asarray(p)
    return float(np.mean([auc(y[:, j], p[:, j]) for j in range(y.shape[1])]))


def mae(y, p) -> float:
    """Mean absolute error of [n]."""
    return float(sk().mean_absolute_error(_float(y), _float(p)))


def rmse(y, p) -> float:
    """Root mean squared error, all values of [n] or [n, k] pooled."""
    return float(np.sqrt(np.mean((_float(y) - _float(p)) ** 2)))


def mcrmse(y, p) -> float:
    """Mean over the columns of [n, k] of each column's RMSE."""
    return float(np.mean(np.sqrt(np.mean((_float(y) - _float(p)) ** 2, axis=0))))


def rmsle(y, p) -> float:
    """RMSE of log(1 + value); for [n, k] the mean over columns. Needs values above -1."""
    return mcrmse(np.log1p(_columns(y)), np.log1p(_columns(p)))


def pearson(y, p) -> float:
    """Pearson's r of [n]; 0 when the predictions are constant (numpy's NaN is no score)."""
    y, p = _float(y), _float(p)
    if np.ptp(p) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(y, p)[0, 1])


def qwk(y, p) -> float:
    """Quadratic weighted kappa of whole numbers [n]; 0 for constant predictions.

    scikit-learn weighs by a label's *position among those present*, not by its value, so every
    whole number of the range must be listed; and it refuses floats, even 3.0.
    """
    y, p = np.asarray(y).astype(int), np.asarray(p).astype(int)
    if len(np.unique(p)) == 1 or len(np.unique(y)) == 1:
        return 0.0
    labels = np.arange(min(y.min(), p.min()), max(y.max(), p.max()) + 1)
    return float(sk().cohen_kappa_score(y, p, weights="quadratic", labels=labels))


def map5(y, p) -> float:
    """Mean average precision at 5 with one right label: 1/rank within the first 5, else 0.

    y [n] labels; p [n] lists of labels, best first. A repeated label counts at its first rank.
    """
    total = 0.0
    for answer, ranked in zip(y, p):
        ranked = list(ranked)[:5]
        if answer in ranked:
            total += 1 / (1 + ranked.index(answer))
    return total / len(y)


def _float(a) -> np.ndarray:
    return np.asarray(a, dtype=np.float64)


def _columns(a) -> np.ndarray:
    a = _float(a)
    return a.reshape(len(a), -1)


@dataclass(frozen=True)
class Metric:
    """function(answers, predictions) -> float, and what a submission must hold for it.

    takes: "label" one column of class names · "probability" columns in [0, 1] · "distribution"
    one column per class, rows sum to one · "value" columns of real numbers · "above -1" the same
    for rmsle · "whole" one column of whole numbers · "ranking" one column of up to five labels.
    """

    function: Callable
    lower_is_better: bool
    takes: str


METRICS = {
    "accuracy": Metric(accuracy, False, "label"),
    "log_loss": Metric(log_loss, True, "probability"),
    "multi_log_loss": Metric(multi_log_loss, True, "distribution"),
    "auc": Metric(auc, False, "probability"),
    "mean_auc": Metric(mean_auc, False, "probability"),
    "mae": Metric(mae, True, "value"),
    "rmse": Metric(rmse, True, "value"),
    "mcrmse": Metric(mcrmse, True, "value"),
    "rmsle": Metric(rmsle, True, "above -1"),
    "pearson": Metric(pearson, False, "value"),
    "qwk": Metric(qwk, False, "whole"),
    "map5": Metric(map5, False, "ranking"),
}
