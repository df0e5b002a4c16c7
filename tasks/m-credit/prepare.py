"""Applicants for credit: 70 % to train on, 30 % to predict."""

from tasks import build


def prepare(raw, public, private):
    people = build.read_table(raw, "modeldata/credit_data").drop_duplicates()
    people["bad"] = (people.pop("Status") == "bad").astype(int)
    train, test = build.split_rows(len(people), 1336, seed=0, strata=people["bad"].to_numpy())
    build.write(
        public,
        private,
        train=people.iloc[train],
        test=people.iloc[test],
        target="bad",
        metric="auc",
    )
