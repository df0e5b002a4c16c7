"""Essays of English learners, graded in six respects; only the labelled train.csv is used.

MLAgentBench, and so the paper: the rows are shuffled with seed 42, the first 98 % train, the rest
are the test: 79 rows, so that scores are noisy.
"""

import numpy as np

from tasks import raw as files
from tasks import split

TARGETS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]


def rows(n):
    """Row numbers (train, test): those of pandas' sample(frac=1, random_state=42), written out."""
    order = np.random.RandomState(42).permutation(n)
    train, test = split.head(n, 0.98)
    return order[train], order[test]


def prepare(raw, public, private):
    columns = ["text_id", "full_text", *TARGETS]
    essays = files.table(raw, "train.csv", columns, dtype=str, keep_default_na=False)[columns]
    files.expect(len(essays), 3_911, "essays")
    train, test = rows(len(essays))
    essays.iloc[train].to_csv(public / "train.csv", index=False)
    essays.iloc[test].drop(columns=TARGETS).to_csv(public / "test.csv", index=False)
    answers = {target: split.numbers(essays[target])[test] for target in TARGETS}
    split.write_answers(private, essays["text_id"].iloc[test], answers, key=sum(answers.values()))
