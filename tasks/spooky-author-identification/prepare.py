"""Sentences of three authors of horror stories; only the labelled train.csv, in train.zip, is used.

MLE-bench: a random tenth of the rows is the test.
"""

import tempfile
from pathlib import Path

from tasks import raw as files
from tasks import split


def prepare(raw, public, private):
    with tempfile.TemporaryDirectory(dir=public.parent) as scratch:
        packed = not (raw / "train.csv").is_file()
        folder = files.folder(raw, "train", Path(scratch)) if packed else raw
        sentences = files.table(folder, "train.csv", ["id", "text", "author"], dtype=str, keep_default_na=False)
    files.expect(len(sentences), 19_579, "sentences")
    train, test = split.random(len(sentences), 0.1)
    sentences.iloc[train].to_csv(public / "train.csv", index=False)
    hidden = sentences.iloc[test]
    hidden.drop(columns="author").to_csv(public / "test.csv", index=False)
    split.write_answers(private, hidden["id"], {"label": hidden["author"]})
