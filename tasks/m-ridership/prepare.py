"""Daily passengers of one Chicago station: the last year is to be predicted.

Columns named after stations hold their passengers of 14 days before, as the data set ships them.
"""

import pandas as pd

from tasks import build

TRAIN_DAYS, TEST_DAYS = 2000, 365


def prepare(raw, public, private):
    days = build.read_table(raw, "modeldata/Chicago")
    days.insert(0, "date", days.pop("date"))
    dates = pd.to_datetime(days["date"])
    assert (dates.diff().dropna() == pd.Timedelta(days=1)).all(), "days are missing"
    test = days.iloc[-TEST_DAYS:]
    build.write(
        public,
        private,
        train=days.iloc[-TRAIN_DAYS - TEST_DAYS : -TEST_DAYS],
        test=test,
        target="ridership",
        metric="mae",
        ordered=True,
    )
