import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

# data
train = pd.read_csv("data/train.csv", keep_default_na=False)
test = pd.read_csv("data/test.csv", keep_default_na=False)
X, y = train["Comment"], train["Insult"]
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = make_pipeline(TfidfVectorizer(max_features=5000), LogisticRegression())
model.fit(X_train, y_train)
score = roc_auc_score(y_valid, model.predict_proba(X_valid)[:, 1])

# submission
model.fit(X, y)
submission = pd.DataFrame({"id": test["id"], "Insult": model.predict_proba(test["Comment"])[:, 1]})
submission.to_csv("submission.csv", index=False)
print(f"validation auc: {score:.5f}")
