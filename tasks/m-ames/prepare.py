"""Houses sold in Ames, Iowa: 70 % to train on, 30 % to predict."""

from tasks import build


def prepare(raw, public, private):
    houses = build.read_table(raw, "modeldata/ames")
    train, test = build.split_rows(len(houses), 879, seed=0)
    build.write(
        public,
        private,
        train=houses.iloc[train],
        test=houses.iloc[test],
        target="Sale_Price",
        metric="mae",
    )
