import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
from sklearn.feature_extraction.text import CountVectorizer
words = CountVectorizer(max_features=50)
X, X_test = words.fit_transform(X["review"]), words.transform(X_test["review"])
# model
from sklearn.linear_model import LogisticRegression
model = LogisticRegression(max_iter=200)
# learning
X, y = X[:500], y[:500]
# submission
validate(model, X, y)
submit(model, X, y, X_test)
