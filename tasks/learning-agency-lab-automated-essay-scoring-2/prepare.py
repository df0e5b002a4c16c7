"""Essays with one holistic score; only the labelled train.csv is used.

MLE-bench: a random tenth of the rows is the test.
"""

from tasks import raw as files
from tasks import split


def prepare(raw, public, private):
    columns = ["essay_id", "full_text", "score"]
    essays = files.table(raw, "train.csv", columns, dtype=str, keep_default_na=False)
    files.expect(len(essays), 17_307, "essays")
    train, test = split.random(len(essays), 0.1)
    essays.iloc[train].to_csv(public / "train.csv", index=False)
    essays.iloc[test].drop(columns="score").to_csv(public / "test.csv", index=False)
    hidden = essays.iloc[test]
    split.write_answers(private, hidden["essay_id"], {"score": split.numbers(hidden["score"]).astype(int)})
