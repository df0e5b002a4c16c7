"""The mushroom bodies of a fly larva: which of four types is a neuron?

Both sides of the brain are used, as two graphs that no edge joins. The files list the neurons
type by type, so they are shuffled.
"""

import numpy as np
import pandas as pd

from tasks import build

TYPES = "KPOI"  # Kenyon cells, projection, output and input neurons: the labels 0 to 3


def prepare(raw, public, private):
    folder = raw / "graspologic/datasets/drosophila"
    labels, blocks = [], []
    for side in ("left", "right"):
        labels += (folder / f"{side}_cell_labels.csv").read_text().split()
        blocks.append(np.loadtxt(folder / f"{side}_adjacency.csv"))
    n = len(labels)
    adjacency = np.zeros((n, n))
    first = len(blocks[0])
    adjacency[:first, :first], adjacency[first:, first:] = blocks
    order = np.random.default_rng(0).permutation(n)
    adjacency = adjacency[np.ix_(order, order)].astype(int)  # [from, to] number of synapses
    source, target = np.nonzero(adjacency)
    edges = pd.DataFrame({"source": source, "target": target, "weight": adjacency[source, target]})
    nodes = pd.DataFrame(
        {
            "node": np.arange(n),
            "inputs": (adjacency > 0).sum(axis=0),
            "outputs": (adjacency > 0).sum(axis=1),
            "type": np.array([TYPES.index(labels[i]) for i in order]),
        }
    )
    train, test = build.split_rows(n, n * 7 // 10, seed=1, strata=nodes["type"].to_numpy())
    build.write(
        public,
        private,
        train=nodes.iloc[train],
        test=nodes.iloc[test],
        target="type",
        metric="accuracy",
        edges=edges,
    )
