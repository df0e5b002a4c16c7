import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
X, X_test = X[["workday", "temperature"]], X_test[["workday", "temperature"]]
# model
from sklearn.linear_model import LinearRegression
model = LinearRegression()
# learning
X, y = X[-500:], y[-500:]
# submission
validate(model, X, y)
submit(model, X, y, X_test)
