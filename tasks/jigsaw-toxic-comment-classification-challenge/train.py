import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]

# data
train = pd.read_csv("data/train.csv", keep_default_na=False)
test = pd.read_csv("data/test.csv", keep_default_na=False)
words = TfidfVectorizer(max_features=10_000)
X, X_test = words.fit_transform(train["comment_text"]), words.transform(test["comment_text"])
fit_rows, valid_rows = train_test_split(range(len(train)), test_size=0.2, random_state=0)

# model
scores = []
submission = test[["id"]].copy()
for label in LABELS:
    y = train[label].to_numpy()
    model = LogisticRegression(max_iter=1000)
    model.fit(X[fit_rows], y[fit_rows])
    scores.append(roc_auc_score(y[valid_rows], model.predict_proba(X[valid_rows])[:, 1]))
    model.fit(X, y)
    submission[label] = model.predict_proba(X_test)[:, 1]

# submission
submission.to_csv("submission.csv", index=False)
print(f"validation mean_auc: {sum(scores) / len(scores):.5f}")
