"""Loading, validation and submission for the short scripts of the micro tasks (read-only).

X, y, X_test = load() · A = graph() · model = tune(model, max_iter=100) · validate(model, X, y) ·
submit(model, X, y, X_test)
"""

import copy
import json
import warnings

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn import metrics

warnings.filterwarnings("ignore")
with open("data/info.json") as file:
    INFO = json.load(file)

SCORES = {
    "accuracy": metrics.accuracy_score,
    "log_loss": metrics.log_loss,
    "multi_log_loss": lambda y, p: metrics.log_loss(y, p, labels=INFO["classes"]),
    "auc": metrics.roc_auc_score,
    "mae": metrics.mean_absolute_error,
    "rmse": metrics.root_mean_squared_error,
    "rmsle": lambda y, p: metrics.root_mean_squared_error(np.log1p(y), np.log1p(p)),
    "pearson": lambda y, p: np.corrcoef(y, p)[0, 1],
    "qwk": lambda y, p: metrics.cohen_kappa_score(
        y, p, weights="quadratic", labels=np.arange(min(*y, *p), max(*y, *p) + 1)
    ),
}


def load():
    """X, y, X_test: images [n, height, width] where the task has images, else a data frame."""
    train, test = pd.read_csv("data/train.csv"), pd.read_csv("data/test.csv")
    for table in (train, test):
        if "date" in table:
            table["date"] = pd.to_datetime(table["date"])
    y = train.pop(INFO["target"]).to_numpy()
    try:
        return np.load("data/train_images.npy"), y, np.load("data/test_images.npy")
    except FileNotFoundError:
        return train.drop(columns="id"), y, test.drop(columns="id")


def graph():
    """The adjacency matrix [n, n], sparse: weight of the edge from row to column."""
    edges = pd.read_csv("data/edges.csv")
    ends = edges["source"], edges["target"]
    shape = INFO["nodes"], INFO["nodes"]
    return sparse.csr_array((edges["weight"].astype(float), ends), shape)


def tune(model, **parameters):
    """Set those parameters that the model (or a part of it) has; the others are skipped."""
    owned = model.get_params()
    for name in owned:
        path, _, last = name.rpartition("__")
        kernel = f"{path}__kernel" if path else "kernel"
        # the max_iter of a support vector machine cuts its solver off: not a number of epochs
        if last in parameters and not (last == "max_iter" and kernel in owned):
            model.set_params(**{name: parameters[last]})
    return model


def predict(model, X):
    """What the task's metric scores: labels, values, or probabilities of class 1 or of each."""
    if INFO["metric"] in ("log_loss", "auc"):
        return model.predict_proba(X)[:, 1]
    if INFO["metric"] == "multi_log_loss":
        p = pd.DataFrame(model.predict_proba(X), columns=model.classes_)
        return p.reindex(columns=INFO["classes"], fill_value=0).to_numpy()
    p = model.predict(X)
    if INFO["metric"] == "rmsle":
        p = np.maximum(p, 0)
    if INFO["metric"] == "qwk":
        p = np.clip(np.rint(p), *INFO["range"]).astype(int)
    return p


def rows(X, keep):
    return X.iloc[keep] if hasattr(X, "iloc") else X[keep]


def validate(model, X, y):
    """Fit on three quarters of the rows and print the score of the last quarter.

    Rows beyond the first n are changed copies of those, stacked below: a copy is held out
    together with its original, and only originals are scored.
    """
    n = min(len(y), INFO["rows"])
    order = np.arange(n) if INFO["ordered"] else np.random.default_rng(0).permutation(n)
    held_out = np.isin(np.arange(n), order[int(0.75 * n) :])
    train = np.flatnonzero(~held_out[np.arange(len(y)) % n])
    test = np.flatnonzero(held_out)
    fitted = copy.deepcopy(model).fit(rows(X, train), y[train])
    score = SCORES[INFO["metric"]](y[test], predict(fitted, rows(X, test)))
    print(f"validation {INFO['metric']} {score:.{0 if abs(score) >= 1000 else 4}f}")


def submit(model, X, y, X_test):
    """Fit on everything and write submission.csv."""
    p = predict(model.fit(X, y), X_test)
    ids = pd.read_csv("data/test.csv", usecols=["id"])
    columns = INFO["classes"] or [INFO["target"]]
    table = pd.DataFrame(np.asarray(p).reshape(len(ids), -1), columns=columns)
    pd.concat([ids, table], axis=1).to_csv("submission.csv", index=False)
