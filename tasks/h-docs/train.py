import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
X, X_test = X.reshape(-1, 1) / 255, X_test.reshape(-1, 1) / 255
# model
from sklearn.linear_model import LinearRegression
model = LinearRegression()
# learning
X, y = X[::20], y[::20]
# submission
validate(model, X, y)
submit(model, X, y, X_test)
