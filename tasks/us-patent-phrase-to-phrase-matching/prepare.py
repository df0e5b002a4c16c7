"""Pairs of phrases from patents and how alike they are; only the labelled train.csv is used.

MLE-bench: a random tenth of the rows is the test, not grouped by anchor: nearly every anchor of the
test also occurs in training, which makes it easier than Kaggle's hidden test.
"""

from tasks import raw as files
from tasks import split


def prepare(raw, public, private):
    columns = ["id", "anchor", "target", "context", "score"]
    pairs = files.table(raw, "train.csv", columns, dtype=str, keep_default_na=False)
    files.expect(len(pairs), 36_473, "pairs of phrases")
    train, test = split.random(len(pairs), 0.1)
    pairs.iloc[train].to_csv(public / "train.csv", index=False)
    hidden = pairs.iloc[test]
    hidden.drop(columns="score").to_csv(public / "test.csv", index=False)
    split.write_answers(private, hidden["id"], {"score": split.numbers(hidden["score"])})
