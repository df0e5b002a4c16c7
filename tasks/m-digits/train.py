import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
X, X_test = X.reshape(-1, 196) / 255, X_test.reshape(-1, 196) / 255
# model
from sklearn.neural_network import MLPClassifier
model = MLPClassifier(32, solver="sgd", learning_rate_init=0.01, max_iter=40, random_state=0)
# learning
model = tune(model, max_iter=20)
# submission
validate(model, X, y)
submit(model, X, y, X_test)
