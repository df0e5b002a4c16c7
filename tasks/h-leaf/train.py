import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
columns = ["area", "perimeter", "circularity", "aspect_ratio", "entropy", "mean_green_val"]
X, X_test = X[columns], X_test[columns]
# model
from sklearn.ensemble import RandomForestClassifier
model = RandomForestClassifier(20, random_state=0)
# learning
model = tune(model, max_depth=4)
# submission
validate(model, X, y)
submit(model, X, y, X_test)
