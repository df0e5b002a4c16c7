import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split

TARGETS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]


def mcrmse(y, p):
    """The root mean squared error of each column, averaged over the columns."""
    return np.sqrt(((y - p) ** 2).mean(axis=0)).mean()


# data
train = pd.read_csv("data/train.csv", dtype={"text_id": str})
test = pd.read_csv("data/test.csv", dtype={"text_id": str})
words = TfidfVectorizer(max_features=500)
X, y = words.fit_transform(train["full_text"]), train[TARGETS].to_numpy()
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.1, random_state=42)

# model
model = LinearRegression()
model.fit(X_train, y_train)
score = mcrmse(y_valid, model.predict(X_valid))

# submission
model.fit(X, y)
submission = pd.DataFrame(model.predict(words.transform(test["full_text"])), columns=TARGETS)
submission.insert(0, "text_id", test["text_id"])
submission.to_csv("submission.csv", index=False)
print(f"validation mcrmse: {score:.5f}")
