"""Leaves of 32 plants, measured: 70 % to train on, 30 % to predict.

The text columns are left out: they are the same for all leaves of a species and give it away.
"""

from tasks import build


def prepare(raw, public, private):
    leaves = build.read_table(raw, "modeldata/leaf_id_flavia")
    table = leaves.select_dtypes("number").drop(columns="outlying_contour")  # constant
    table["species"] = leaves["species"].astype(str)
    train, test = build.split_rows(len(table), 572, seed=0, strata=table["species"].to_numpy())
    build.write(
        public,
        private,
        train=table.iloc[train],
        test=table.iloc[test],
        target="species",
        metric="multi_log_loss",
    )
