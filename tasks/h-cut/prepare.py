"""Diamonds: 4,000 to learn how well they are cut, 3,000 to grade."""

from tasks import build

CUTS = ["Fair", "Good", "Very Good", "Premium", "Ideal"]  # the grades 0 to 4
COLOURS = "DEFGHIJ"  # best first
CLARITIES = ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"]  # worst first


def prepare(raw, public, private):
    stones = build.read_table(raw, "ggplot2/diamonds").drop_duplicates()
    stones["cut"] = stones["cut"].map(CUTS.index)
    stones["color"] = stones["color"].map(COLOURS.index)
    stones["clarity"] = stones["clarity"].map(CLARITIES.index)
    rows, _ = build.split_rows(len(stones), 0, seed=0)
    build.write(
        public,
        private,
        train=stones.iloc[rows[:4000]],
        test=stones.iloc[rows[4000:7000]],
        target="cut",
        metric="qwk",
    )
