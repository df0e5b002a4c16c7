"""Comments of Wikipedia's talk pages with six kinds of toxicity: Kaggle's train and test as they are.

test_labels.csv marks with -1 the comments that Kaggle added to its test so that nobody could label
it by hand. They are not scored by anybody, so here they are left out of test.csv, too.
"""

from tasks import TaskError, split
from tasks import raw as files

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


def prepare(raw, public, private):
    text = {"dtype": str, "keep_default_na": False}  # comments may be "nan" or "null"
    train = files.table(raw, "train.csv", ["id", "comment_text", *LABELS], **text)
    files.expect(len(train), 159_571, "training comments")
    train.to_csv(public / "train.csv", index=False)
    test = files.table(raw, "test.csv", ["id", "comment_text"], **text)
    labels = files.table(raw, "test_labels.csv", ["id", *LABELS], **text)
    if list(test["id"]) != list(labels["id"]):
        raise TaskError("test.csv and test_labels.csv are not about the same comments")
    scored = (labels[LABELS] != "-1").all(axis=1)
    files.expect(int(scored.sum()), 63_978, "scored test comments")
    labels = labels[scored]
    test[scored].to_csv(public / "test.csv", index=False)
    combination = ["".join(row) for row in labels[LABELS].to_numpy()]  # the halves get equally many of each
    split.write_answers(private, labels["id"], {name: labels[name] for name in LABELS}, key=combination)
