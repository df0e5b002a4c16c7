"""Works of art in the Tate collection: 70 % to train on, 30 % to date.

Works with the same artist, title and medium (prints of a series) are kept once.
"""

from tasks import build


def prepare(raw, public, private):
    works = build.read_table(raw, "modeldata/tate_text")
    works = works.drop(columns="id").drop_duplicates(["artist", "title", "medium"])
    train, test = build.split_rows(len(works), len(works) * 3 // 10, seed=0)
    build.write(
        public,
        private,
        train=works.iloc[train],
        test=works.iloc[test],
        target="year",
        metric="pearson",
    )
