import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split

TEXT = {"id": str, "anchor": str, "target": str, "context": str}


def features(table):
    """Cosine of the two phrases' TF-IDF vectors, their lengths, and the patent's section (A to H)."""
    a, b = words.transform(table["anchor"]), words.transform(table["target"])
    section = table["context"].str[0]
    parts = [np.asarray(a.multiply(b).sum(axis=1)).ravel(), table["anchor"].str.len(), table["target"].str.len()]
    return np.column_stack(parts + [section == letter for letter in "ABCDEFGH"])


# data
train = pd.read_csv("data/train.csv", dtype=TEXT, keep_default_na=False)
test = pd.read_csv("data/test.csv", dtype=TEXT, keep_default_na=False)
words = TfidfVectorizer().fit(pd.concat([train["anchor"], train["target"]]))
X, y = features(train), train["score"].to_numpy()
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = Ridge()
model.fit(X_train, y_train)
score = np.corrcoef(y_valid, model.predict(X_valid))[0, 1]

# submission
model.fit(X, y)
submission = pd.DataFrame({"id": test["id"], "score": model.predict(features(test))})
submission.to_csv("submission.csv", index=False)
print(f"validation pearson: {score:.5f}")
