import numpy as np
from helper import graph, load, submit, tune, validate
X, y, X_test = load()
# data
X, X_test = X[["inputs", "outputs"]], X_test[["inputs", "outputs"]]
# model
from sklearn.linear_model import LogisticRegression
model = LogisticRegression(max_iter=100)
# learning
X, y = X[:60], y[:60]
# submission
validate(model, X, y)
submit(model, X, y, X_test)
