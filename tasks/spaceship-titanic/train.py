import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

CATEGORIES = ["HomePlanet", "CryoSleep", "Destination", "VIP", "Deck", "Side"]


def features(table):
    """The cabin's deck and side, and one column of 0 and 1 for every category."""
    cabin = table["Cabin"].str.split("/", expand=True).reindex(columns=range(3))
    table = table.assign(Deck=cabin[0], Side=cabin[2])
    return pd.get_dummies(table[CATEGORIES].astype("string").fillna("none"))


# data
train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
X, y = features(train), train["Transported"]
X_test = features(test).reindex(columns=X.columns, fill_value=False)
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = LogisticRegression(max_iter=1000)
model.fit(X_train, y_train)
score = accuracy_score(y_valid, model.predict(X_valid))

# submission
model.fit(X, y)
submission = pd.DataFrame({"PassengerId": test["PassengerId"], "Transported": model.predict(X_test)})
submission.to_csv("submission.csv", index=False)
print(f"validation accuracy: {score:.5f}")
