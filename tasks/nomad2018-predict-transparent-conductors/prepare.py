"""Transparent conductors (oxides of Al, Ga and In): two energies from composition and geometry.

MLE-bench: a random tenth of the labelled rows is the test; ids are renumbered from 1 in each part,
in the order of the split, and with them the folders that hold each crystal's geometry.xyz.
"""

import tempfile
from pathlib import Path

from tasks import raw as files
from tasks import split

TARGETS = ["formation_energy_ev_natom", "bandgap_energy_ev"]


def prepare(raw, public, private):
    crystals = files.table(raw, "train.csv", ["id", *TARGETS], dtype=str)
    files.expect(len(crystals), 2_400, "crystals")
    train, test = split.random(len(crystals), 0.1)
    with tempfile.TemporaryDirectory(dir=public.parent) as scratch:
        geometry = files.folder(raw, "train", Path(scratch))
        for name, rows in (("train", train), ("test", test)):
            table = crystals.iloc[rows]
            old, new = table["id"], range(1, len(rows) + 1)
            for number in new:
                (public / name / str(number)).mkdir(parents=True)
            pairs = [(geometry / a / "geometry.xyz", public / name / str(b) / "geometry.xyz") for a, b in zip(old, new)]
            files.copy(pairs, f"{name} geometries")
            table = table.assign(id=new)
            hidden = TARGETS if name == "test" else []
            table.drop(columns=hidden).to_csv(public / f"{name}.csv", index=False)
    answers = {target: split.numbers(table[target]) for target in TARGETS}
    split.write_answers(private, table["id"], answers, key=answers["bandgap_energy_ev"])
