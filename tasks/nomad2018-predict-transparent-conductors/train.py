import numpy as np
import pandas as pd
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split

TARGETS = ["formation_energy_ev_natom", "bandgap_energy_ev"]


def rmsle(y, p):
    """Per column, the root mean squared error of log(1 + value); then the mean over the columns."""
    return np.sqrt(((np.log1p(y) - np.log1p(p)) ** 2).mean(axis=0)).mean()


# data
train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
X, y = train.drop(columns=["id", *TARGETS]), train[TARGETS].to_numpy()
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = LinearRegression()
model.fit(X_train, y_train)
score = rmsle(y_valid, np.maximum(model.predict(X_valid), 0))

# submission
model.fit(X, y)
predictions = np.maximum(model.predict(test[X.columns]), 0)
submission = pd.DataFrame(predictions, columns=TARGETS)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
print(f"validation rmsle: {score:.5f}")
