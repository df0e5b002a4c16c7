import numpy as np
from helper import load, submit, tune, validate
X, y, X_test = load()
# data
columns = ["Lot_Area", "Year_Built", "Gr_Liv_Area", "Full_Bath", "Garage_Cars", "Fireplaces"]
X, X_test = X[columns], X_test[columns]
# model
from sklearn.tree import DecisionTreeRegressor
model = DecisionTreeRegressor(random_state=0)
# learning
model = tune(model, max_depth=3)
# submission
validate(model, X, y)
submit(model, X, y, X_test)
