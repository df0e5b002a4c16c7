"""Comments, insulting or not: Kaggle's train.csv, and its labelled test (test_with_solutions.csv) whole.

The benchmark matches submissions by the text of the comment, which is ambiguous where a comment
occurs twice; here a test comment's id is its row number in Kaggle's file. The column Usage (public
or private leaderboard) is left out, and so are Kaggle's verification files.
"""

from tasks import raw as files
from tasks import split

COLUMNS = ["Insult", "Date", "Comment"]


def prepare(raw, public, private):
    train, test = (
        files.table(raw, name, COLUMNS, dtype=str, keep_default_na=False)[COLUMNS]
        for name in ("train.csv", "test_with_solutions.csv")
    )
    files.expect(len(train), 3_947, "training comments")
    files.expect(len(test), 2_647, "test comments")
    train.to_csv(public / "train.csv", index=False)
    test.insert(0, "id", range(len(test)))
    test.drop(columns="Insult").to_csv(public / "test.csv", index=False)
    split.write_answers(private, test["id"], {"Insult": test["Insult"]})
