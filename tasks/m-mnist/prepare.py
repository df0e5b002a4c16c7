"""2,000 + 1,200 digits of 28 x 28 pixels: the digits that m-digits does not use."""

import numpy as np
import pandas as pd

from tasks import build

ROWS_OF_M_DIGITS = 180  # per digit


def prepare(raw, public, private):
    images, labels = build.read_mnist(raw)
    order, _ = build.split_rows(len(labels), 0, seed=1)  # as in m-digits
    theirs = pd.Series(order).groupby(labels[order]).head(ROWS_OF_M_DIGITS).to_numpy()
    images, labels = np.delete(images, theirs, axis=0), np.delete(labels, theirs)
    train, test = build.split_rows(len(labels), 1200, seed=2, strata=labels)
    build.write(
        public,
        private,
        train=pd.DataFrame({"digit": labels[train]}),
        test=pd.DataFrame({"digit": labels[test]}),
        target="digit",
        metric="multi_log_loss",
        images=(images[train], images[test]),
    )
