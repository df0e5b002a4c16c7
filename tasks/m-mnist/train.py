import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
X, X_test = X.reshape(-1, 784) / 255, X_test.reshape(-1, 784) / 255
# model
from sklearn.linear_model import SGDClassifier
model = SGDClassifier(loss="log_loss", max_iter=10, random_state=0)
# learning
model = tune(model, alpha=0.1)
# submission
validate(model, X, y)
submit(model, X, y, X_test)
