import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import train_test_split

LOWEST, HIGHEST = 1, 6


def predict(model, X):
    """Whole numbers in the range of the scores."""
    return model.predict(X).round().clip(LOWEST, HIGHEST).astype(int)


# data
train = pd.read_csv("data/train.csv", dtype={"essay_id": str})
test = pd.read_csv("data/test.csv", dtype={"essay_id": str})
words = TfidfVectorizer(max_features=2000)
X, y = words.fit_transform(train["full_text"]), train["score"]
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = Ridge()
model.fit(X_train, y_train)
scores = range(LOWEST, HIGHEST + 1)  # all of them: the weights count positions in this list
score = cohen_kappa_score(y_valid, predict(model, X_valid), labels=scores, weights="quadratic")

# submission
model.fit(X, y)
predictions = predict(model, words.transform(test["full_text"]))
submission = pd.DataFrame({"essay_id": test["essay_id"], "score": predictions})
submission.to_csv("submission.csv", index=False)
print(f"validation qwk: {score:.5f}")
