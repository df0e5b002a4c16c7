import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
columns = ["area", "perimeter", "circularity", "aspect_ratio", "entropy", "mean_green_val"]
center, spread = X[columns].mean(), X[columns].std()
X, X_test = (X[columns] - center) / spread, (X_test[columns] - center) / spread
# model
from sklearn.linear_model import LogisticRegression
model = LogisticRegression(max_iter=100)
# learning
model = tune(model, C=0.01)
# submission
validate(model, X, y)
submit(model, X, y, X_test)
