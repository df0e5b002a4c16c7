"""Hourly demand for electricity in Victoria, 2014: the last four weeks are to be predicted."""

import numpy as np
import pandas as pd

from tasks import build

TEST_HOURS = 28 * 24


def prepare(raw, public, private):
    half_hours = build.read_table(raw, "fpp2/elecdemand")
    hours = half_hours.iloc[::2].reset_index(drop=True)
    table = pd.DataFrame(
        {
            "date": pd.date_range("2014-01-01", periods=len(hours), freq="h"),
            "workday": hours["WorkDay"],
            "temperature": hours["Temperature"],
            "demand": hours["Demand"].round(4),
        }
    )
    day = np.arange(TEST_HOURS) // 24
    build.write(
        public,
        private,
        train=table.iloc[:-TEST_HOURS],
        test=table.iloc[-TEST_HOURS:],
        target="demand",
        metric="mae",
        part=np.where(day % 2 == 0, "reward", "eval"),
        group=day,
        ordered=True,
    )
