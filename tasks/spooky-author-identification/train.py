import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

# data
train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
X, y = train["text"], train["author"]
X_train, X_valid, y_train, y_valid = train_test_split(X, y, test_size=0.2, random_state=0)

# model
model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
model.fit(X_train, y_train)
score = log_loss(y_valid, model.predict_proba(X_valid), labels=model.classes_)

# submission
model.fit(X, y)
submission = pd.DataFrame(model.predict_proba(test["text"]), columns=model.classes_)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
print(f"validation multi_log_loss: {score:.5f}")
