"""Houses sold in Ames, Iowa, as Kaggle's course gives them; only its labelled train.csv is used.

MLAgentBench, and so the paper: the first 80 % of the rows in file order train, the rest are the test.
MLE-Dojo (`@mle-dojo`): a random half, in the proportion of Kaggle's own two files.
"""

from tasks import raw as files
from tasks import split


def prepare(raw, public, private):
    _write(raw, public, private, lambda n: split.head(n, 0.8))


def prepare_mle_dojo(raw, public, private):
    _write(raw, public, private, lambda n: split.random(n, 1459 / 2919, seed=42))


def _write(raw, public, private, rule):
    houses = files.table(raw, "train.csv", ["Id", "SalePrice"], keep_default_na=False, dtype=str)
    files.expect(len(houses), 1_460, "houses")
    train, test = rule(len(houses))
    houses.iloc[train].to_csv(public / "train.csv", index=False)
    houses.iloc[test].drop(columns="SalePrice").to_csv(public / "test.csv", index=False)
    files.copy([(raw / "data_description.txt", public / "data_description.txt")], "description")
    prices = split.numbers(houses["SalePrice"])
    split.write_answers(private, houses["Id"].iloc[test], {"SalePrice": prices[test]})
