import pandas as pd
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeClassifier

# data
train = pd.read_csv("data/train.csv", nrows=200_000)  # of 3.6 million
X, y = train.drop(columns=["Id", "Cover_Type"]), train["Cover_Type"]
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = DecisionTreeClassifier(max_depth=12, random_state=0)
model.fit(X_train, y_train)
score = accuracy_score(y_valid, model.predict(X_valid))

# submission
model.fit(X, y)
test = pd.read_csv("data/test.csv")
submission = pd.DataFrame({"Id": test["Id"], "Cover_Type": model.predict(test[X.columns])})
submission.to_csv("submission.csv", index=False)
print(f"validation accuracy: {score:.5f}")
