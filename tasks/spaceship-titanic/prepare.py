"""Passengers of a starship; only the labelled train.csv is used.

MLAgentBench, and so the paper: the first 80 % of the rows in file order train, the rest are the test.
"""

from tasks import raw as files
from tasks import split


def prepare(raw, public, private):
    passengers = files.table(raw, "train.csv", ["PassengerId", "Transported"], dtype=str, keep_default_na=False)
    files.expect(len(passengers), 8_693, "passengers")
    train, test = split.head(len(passengers), 0.8)
    passengers.iloc[train].to_csv(public / "train.csv", index=False)
    hidden = passengers.iloc[test]
    hidden.drop(columns="Transported").to_csv(public / "test.csv", index=False)
    split.write_answers(private, hidden["PassengerId"], {"Transported": hidden["Transported"]})
