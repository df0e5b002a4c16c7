"""The paper's tabular and text tasks, on miniatures of their downloads: prepare, starter, score, split."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

import tasks
from paper_kit import answers, assert_hidden, pool, prepare, run_starter, split_rows, unzipped, zipped  # noqa: F401

# ------------------------------------------------------------------------------ miniatures of downloads
# Each function gives the members of the archive that Kaggle's client leaves, for n labelled rows: the
# official names and columns, nested archives where there are some, and values that trip careless readers.

HOUSE_NUMBERS, HOUSE_WORDS = (line.split() for line in ("""
    MSSubClass LotFrontage LotArea OverallQual OverallCond YearBuilt YearRemodAdd MasVnrArea BsmtFinSF1 BsmtFinSF2
    BsmtUnfSF TotalBsmtSF 1stFlrSF 2ndFlrSF LowQualFinSF GrLivArea BsmtFullBath BsmtHalfBath FullBath HalfBath
    BedroomAbvGr KitchenAbvGr TotRmsAbvGrd Fireplaces GarageYrBlt GarageCars GarageArea WoodDeckSF OpenPorchSF
    EnclosedPorch 3SsnPorch ScreenPorch PoolArea MiscVal MoSold YrSold
""", """
    MSZoning Street Alley LotShape LandContour Utilities LotConfig LandSlope Neighborhood Condition1 Condition2
    BldgType HouseStyle RoofStyle RoofMatl Exterior1st Exterior2nd MasVnrType ExterQual ExterCond Foundation BsmtQual
    BsmtCond BsmtExposure BsmtFinType1 BsmtFinType2 Heating HeatingQC CentralAir Electrical KitchenQual Functional
    FireplaceQu GarageType GarageFinish GarageQual GarageCond PavedDrive PoolQC Fence MiscFeature SaleType SaleCondition
"""))  # fmt: skip
GRADES = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]
ENERGIES = ["formation_energy_ev_natom", "bandgap_energy_ev"]
HTML = '<a href="x">&amp;<br>'  # which comments are full of
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


def rng(seed=0):
    return np.random.default_rng(seed)


def texts(level, seed=0):
    """A text per value of `level` [n] in [0, 1]: the more, the more words of a second kind it has."""
    words = np.where(
        rng(seed).random((len(level), 12)) < np.asarray(level)[:, None],
        rng(seed + 1).choice(["mauve", "cyan", "ochre", "teal"], (len(level), 12)),
        rng(seed + 2).choice(["one", "two", "three", "four"], (len(level), 12)),
    )
    return [" ".join(row) for row in words]


def home(n):
    houses = pd.DataFrame({"Id": range(1, n + 1)})
    for i, name in enumerate(HOUSE_NUMBERS):
        houses[name] = rng(i).integers(0, 900, n)
    for i, name in enumerate(HOUSE_WORDS):
        houses[name] = rng(i).choice(["Gd", "TA", "NA"], n)
    houses["LotFrontage"] = houses["LotFrontage"].astype(str).where(rng(1).random(n) > 0.2, "NA")
    houses["SalePrice"] = 100_000 + 100 * houses["GrLivArea"] + rng(5).permutation(n) % 100
    assert len(houses.columns) == 81
    members = {"train.csv": houses, "test.csv": houses.head(3).drop(columns="SalePrice"),
               "sample_submission.csv": houses[["Id", "SalePrice"]].head(3)}  # fmt: skip
    return members | {"data_description.txt": "MSSubClass: Identifies the type of dwelling\n"}


def spaceship(n):
    sleeps = rng(0).random(n) < 0.4
    table = pd.DataFrame({"PassengerId": [f"{i // 2 + 1:04d}_{i % 2 + 1:02d}" for i in range(n)]})
    table["HomePlanet"] = rng(1).choice(["Earth", "Europa", "Mars"], n)
    table["CryoSleep"] = sleeps
    table["Cabin"] = [f"{deck}/{i}/{side}" for i, (deck, side) in enumerate(
        zip(rng(2).choice(list("ABCT"), n), rng(3).choice(list("PS"), n)))]  # fmt: skip
    table["Destination"] = rng(4).choice(["TRAPPIST-1e", "55 Cancri e", "PSO J318.5-22"], n)
    table["Age"] = rng(5).integers(0, 80, n).astype(float)
    table["VIP"] = rng(6).random(n) < 0.02
    for i, name in enumerate(["RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]):
        table[name] = rng(7 + i).integers(0, 500, n).astype(float)
    table["Name"] = [f'Zoë "Z" O\'Hara, {i}' for i in range(n)]
    for i, name in enumerate(table.columns[1:]):  # 2 % of each column is missing
        table[name] = table[name].astype(object).where(rng(20 + i).random(n) > 0.02, None)
    table["Transported"] = sleeps ^ (rng(40).random(n) < 0.2)
    return {"train.csv": table, "test.csv": table.head(3).drop(columns="Transported"),
            "sample_submission.csv": table[["PassengerId", "Transported"]].head(3)}  # fmt: skip


def nomad(n):
    share = rng(0).dirichlet(np.ones(3), n).round(4)
    table = pd.DataFrame({"id": range(1, n + 1), "spacegroup": rng(1).choice([12, 33, 167, 194, 206, 227], n),
                          "number_of_total_atoms": rng(2).choice([10.0, 20, 30, 40, 80], n)})  # fmt: skip
    table[["percent_atom_al", "percent_atom_ga", "percent_atom_in"]] = share
    for i in (1, 2, 3):
        table[f"lattice_vector_{i}_ang"] = 5 + table["id"] / 1000
    for angle in ("alpha", "beta", "gamma"):
        table[f"lattice_angle_{angle}_degree"] = 90.0
    table[ENERGIES[0]] = (0.2 * share[:, 0] + 0.01 * rng(3).random(n)).round(6)
    table[ENERGIES[1]] = (2 + 3 * share[:, 0] + rng(4).random(n)).round(6)

    def geometry(part, ids):
        lines = {i: f"#=======\nlattice_vector {5 + i / 1000} 0.0 0.0\natom 0.1 0.2 0.3 Ga\n" for i in ids}
        return {f"{part}/{i}/geometry.xyz": text for i, text in lines.items()}

    return {
        "sample_submission.csv.zip": {"sample_submission.csv": table[["id", *ENERGIES]].head(3)},
        "test.csv.zip": {"test.csv": table.head(3).drop(columns=ENERGIES)},
        "test.zip": geometry("test", range(1, 4)),
        "train.csv.zip": {"train.csv": table},
        "train.zip": geometry("train", range(1, n + 1)),
    }


def feedback(n):
    level = rng(0).random(n)
    table = pd.DataFrame({"text_id": [f"{i:012X}" for i in rng(9).permutation(n)]})
    table["full_text"] = [f'{t}\n\nShe said "no", and\r\nleft. {t}' for t in texts(level)]
    for i, grade in enumerate(GRADES):
        table[grade] = np.clip(np.round(2 * (1 + 4 * level + rng(i).normal(0, 0.3, n))) / 2, 1, 5)
    return {"train.csv": table, "test.csv": table[["text_id", "full_text"]].head(3),
            "sample_submission.csv": table[["text_id", *GRADES]].head(3)}  # fmt: skip


def essays(n):
    level = rng(0).random(n)
    table = pd.DataFrame({"essay_id": [f"{i:07x}" for i in rng(9).permutation(n)]})  # "0000010", "00001e5"
    table["full_text"] = [f"“{t}”,\n\n\n\n{t} null" for t in texts(level)]
    table["score"] = np.clip(np.round(1 + 5 * level), 1, 6).astype(int)
    return {"sample_submission.csv": table[["essay_id", "score"]].head(3), "train.csv": table,
            "test.csv": table[["essay_id", "full_text"]].head(3)}  # fmt: skip


def insults(n, tests=None):
    def part(rows, seed):
        label = rng(seed).integers(0, 2, rows)
        table = pd.DataFrame({"Insult": label, "Date": "20120618192155Z"})
        table.loc[::5, "Date"] = ""
        table["Comment"] = [f'"{t}\\xa0 \\\\n don\'t, é {HTML}"' for t in texts(0.3 + 0.4 * label, seed)]
        return table

    train, test = part(n, 0), part(tests or n, 10)
    test.loc[[1, 2], "Comment"] = '"the same words"'  # twice, with both answers
    test.loc[[1, 2], "Insult"] = [0, 1]
    train.loc[0, "Comment"] = "null"
    usage = test.assign(Usage="PublicTest")
    usage.loc[len(test) // 2 :, "Usage"] = "PrivateTest"
    return {
        "impermium_verification_labels.csv": usage.head(3),
        "impermium_verification_set.csv": test.drop(columns="Insult").head(3),
        "sample_submission_null.csv": test.assign(Insult=0),
        "test.csv": test.drop(columns="Insult"),
        "test_with_solutions.csv": usage,
        "train.csv": train,
    }


def spooky(n):
    author = rng(0).integers(0, 3, n)
    table = pd.DataFrame({"id": [f"id{i:05d}" for i in rng(9).permutation(n)]})
    table["text"] = [f'"{t}," cried he; Ægypt\'s æther, {t}' for t in texts(author / 2)]
    table["author"] = np.array(["EAP", "HPL", "MWS"])[author]
    sample = pd.DataFrame({"id": table["id"].head(3), "EAP": 0.4, "HPL": 0.3, "MWS": 0.3})
    return {"sample_submission.zip": {"sample_submission.csv": sample},
            "test.zip": {"test.csv": table[["id", "text"]].head(3)}, "train.zip": {"train.csv": table}}  # fmt: skip


def jigsaw(n, tests=200, scored=120):
    def part(rows, seed):
        table = pd.DataFrame({"id": [f"{i:016x}" for i in rng(seed).integers(0, 2**62, rows)]})
        level = rng(seed + 1).random(rows)
        some = texts(level[:1000], seed)  # repeated in tables of the real size
        table["comment_text"] = [f'{some[i % 1000]}\n\n"Quoted, ""twice""" {HTML} {i}' for i in range(rows)]
        for i, name in enumerate(TOXIC):
            table[name] = (level + rng(seed + 2 + i).normal(0, 0.2, rows) > 0.4 + i / 20).astype(int)
        table.loc[:2, "comment_text"] = ["nan", "null", "  leading blanks\t"]
        return table

    train, test = part(n, 0), part(tests, 50)
    labels = test[["id", *TOXIC]].copy()
    labels.loc[rng(1).permutation(tests)[scored:], TOXIC] = -1
    return {
        "sample_submission.csv.zip": {"sample_submission.csv": labels[["id", *TOXIC]].assign(**dict.fromkeys(TOXIC, 0.5))},
        "test.csv.zip": {"test.csv": test[["id", "comment_text"]]},
        "test_labels.csv.zip": {"test_labels.csv": labels},
        "train.csv.zip": {"train.csv": train},
    }


def patents(n):
    table = pd.DataFrame({"id": [f"{i:016x}" for i in rng(9).integers(0, 2**62, n)]})
    table.loc[:1, "id"] = ["1234567890123456", "12345678901234e5"]  # which a careless reader takes for numbers
    score = rng(0).choice([0, 0.25, 0.5, 0.75, 1.0], n)
    table["anchor"], table["target"] = texts(np.zeros(n), 1), texts(1 - score, 2)
    table.loc[2:3, ["anchor", "target"]] = [["null", "nan"], ["NA", "null"]]
    table["context"] = rng(3).choice(["A47", "H01", "G06", "C08"], n)
    table["score"] = score
    return {"sample_submission.csv": table[["id", "score"]].head(3), "train.csv": table,
            "test.csv": table.drop(columns="score").head(3)}  # fmt: skip


def forest(n):
    names = ["Elevation", "Aspect", "Slope", "Horizontal_Distance_To_Hydrology", "Vertical_Distance_To_Hydrology",
             "Horizontal_Distance_To_Roadways", "Hillshade_9am", "Hillshade_Noon", "Hillshade_3pm",
             "Horizontal_Distance_To_Fire_Points", *(f"Wilderness_Area{i}" for i in range(1, 5)),
             *(f"Soil_Type{i}" for i in range(1, 41))]  # fmt: skip
    table = pd.DataFrame({"Id": range(n)})
    for i, name in enumerate(names):
        table[name] = rng(i).integers(0, 2, n) if i > 9 else rng(i).integers(-30, 3000, n)
    table["Soil_Type7"] = table["Soil_Type15"] = 0
    table["Cover_Type"] = np.where(table["Elevation"] > 1800, 2, 1)
    table.loc[rng(1).permutation(n)[: n // 20], "Cover_Type"] = 3
    table.loc[n // 2, "Cover_Type"] = 5  # once, so that no split can be stratified
    return {"sample_submission.csv": table[["Id", "Cover_Type"]].head(3), "train.csv": table,
            "test.csv": table.drop(columns="Cover_Type").head(3)}  # fmt: skip


HOME, TITANIC = "home-data-for-ml-course", "spaceship-titanic"
NOMAD, FEEDBACK = "nomad2018-predict-transparent-conductors", "feedback-prize-english-language-learning"
ESSAYS, INSULTS = "learning-agency-lab-automated-essay-scoring-2", "detecting-insults-in-social-commentary"
SPOOKY, JIGSAW = "spooky-author-identification", "jigsaw-toxic-comment-classification-challenge"
PATENTS, FOREST = "us-patent-phrase-to-phrase-matching", "tabular-playground-series-dec-2021"
MINIATURES = {
    HOME: (home, 80), f"{HOME}@mle-dojo": (home, 80), TITANIC: (spaceship, 200), NOMAD: (nomad, 100),
    FEEDBACK: (feedback, 300), ESSAYS: (essays, 300), INSULTS: (insults, 120), f"{INSULTS}@mle-bench": (insults, 120),
    SPOOKY: (spooky, 300), JIGSAW: (jigsaw, 200), PATENTS: (patents, 300), FOREST: (forest, 600),
}  # fmt: skip
# A score that the starter must beat on its miniature: what a constant prediction gets, or nearly so.
NAIVE = {"mae": 15_000, "rmse": 20_000, "accuracy": 0.6, "rmsle": 0.2, "mcrmse": 0.9, "qwk": 0.5, "auc": 0.7,
         "multi_log_loss": 0.9, "mean_auc": 0.7, "pearson": 0.4}  # fmt: skip


def archive(name, tmp_path, n=None):
    make, rows = MINIATURES[name]
    return zipped(tmp_path / f"{name.partition('@')[0]}.zip", make(n or rows))


def labelled(name, n=None):
    """(rows of the table with the answers, as Kaggle wrote them; the same as a frame)."""
    make, rows = MINIATURES[name]
    members = make(n or rows)
    table = members.get("train.csv", members.get("train.csv.zip", members.get("train.zip", {})))
    table = table if isinstance(table, pd.DataFrame) else table["train.csv"]
    return cells(table.to_csv(index=False)), table


def cells(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def shown(task, part):
    """Rows of public/train.csv or test.csv, every cell as it stands there."""
    return cells((task.public / f"{part}.csv").read_bytes().decode())


# ------------------------------------------------------------------------------------- every task


@pytest.mark.parametrize("name", MINIATURES)
def test_from_the_download_to_the_score(name, tmp_path, monkeypatch, pool, capsys):  # noqa: F811
    task = prepare(name, archive(name, tmp_path), tmp_path, monkeypatch)
    assert "warning: " in capsys.readouterr().err  # of the few rows
    assert_hidden(task, renumbered=("train.csv",) if name == NOMAD else ())
    run = run_starter(task, pool)
    assert f"validation {task.metric}: " in run.output
    assert task.better(run.scores["all"], NAIVE[task.metric]), run.scores
    assert task.max_submission_bytes() > len(run.submission)


@pytest.mark.parametrize("name", [name for name in MINIATURES if not name.startswith((INSULTS, JIGSAW))])
def test_every_cell_is_as_kaggle_wrote_it(name, tmp_path, monkeypatch):
    """Empty cells, NA, quotes, line breaks and accents included; and every row is in one part."""
    task = prepare(name, archive(name, tmp_path), tmp_path, monkeypatch)
    rows, _ = labelled(name)
    identity = "lattice_vector_1_ang" if name == NOMAD else task.id_column  # nomad's ids are new ones
    wanted = {row[identity]: row for row in rows}
    table = answers(task).set_index("id")
    hidden = {"EAP": "author", "HPL": "author", "MWS": "author"}
    for part in ("train", "test"):
        for row in shown(task, part):
            whole = wanted.pop(row[identity])
            if part == "test":
                for column in task.columns:
                    answer = whole.pop(hidden.get(column, column), None)
                    given = table.loc[row[task.id_column], "label" if column in hidden else column]
                    if answer is not None:
                        assert given == answer or float(given) == float(answer)
            assert {**row, task.id_column: None} == {**whole, task.id_column: None}
    assert not wanted


@pytest.mark.parametrize("name", MINIATURES)
def test_an_unpacked_download_gives_the_same_data(name, tmp_path, monkeypatch):
    make, rows = MINIATURES[name]
    task = prepare(name, archive(name, tmp_path), tmp_path, monkeypatch)
    first = task.manifest()
    here, folders = {}, {}  # the archives in it unpacked, too: where they are, or each into a folder of its name
    for member, content in make(rows).items():
        inner = content if isinstance(content, dict) else {member: content}
        here |= inner
        own = isinstance(content, dict) and not member.endswith(".csv.zip") and not any("/" in file for file in inner)
        folders |= {f"{member.removesuffix('.zip')}/{file}": text for file, text in inner.items()} if own else inner
    assert tasks.prepare(name, unzipped(tmp_path / "here", here)) == first
    assert tasks.prepare(name, unzipped(tmp_path / "folders", folders)) == first


@pytest.mark.parametrize("name", MINIATURES)
def test_missing_files_are_named_with_the_command(name, tmp_path, monkeypatch):
    make, rows = MINIATURES[name]
    monkeypatch.setattr(tasks, "DATA", tmp_path / "data")
    for file in tasks.load(name).source["files"]:
        members = make(rows)
        del members[file]
        path = zipped(tmp_path / "some.zip", members)
        with pytest.raises(tasks.TaskError, match=rf"{file}; run: kaggle competitions download -c \S+ -p ") as error:
            tasks.prepare(name, path)
        target = Path(str(error.value).split()[-1])
        assert target.resolve() == tmp_path / "data" / "raw", "where prepare looks for it"


# ----------------------------------------------------------------- the splits, at the real number of rows


def random_tenth(n):
    return train_test_split(np.arange(n), test_size=0.1, random_state=0)


def first_part(n):
    return np.split(np.arange(n), [int(n * 0.8)])


def dojo_half(n):
    return train_test_split(np.arange(n), test_size=1459 / 2919, random_state=42)


def shuffled_98(n):
    order = pd.DataFrame(index=range(n)).sample(frac=1, random_state=42).index.to_numpy()
    return order[: int(n * 0.98)], order[int(n * 0.98) :]


@pytest.mark.parametrize(
    "name, rows, counts, rule",
    [
        (HOME, 1_460, (1_168, 292), first_part),
        (f"{HOME}@mle-dojo", 1_460, (730, 730), dojo_half),
        (TITANIC, 8_693, (6_954, 1_739), first_part),
        (NOMAD, 2_400, (2_160, 240), random_tenth),
        (FEEDBACK, 3_911, (3_832, 79), shuffled_98),
        (ESSAYS, 17_307, (15_576, 1_731), random_tenth),
        (SPOOKY, 19_579, (17_621, 1_958), random_tenth),
        (PATENTS, 36_473, (32_825, 3_648), random_tenth),
        (FOREST, 40_000, (36_000, 4_000), random_tenth),
        pytest.param(FOREST, 4_000_000, (3_600_000, 400_000), random_tenth, marks=pytest.mark.slow),
    ],
)
def test_split_is_the_benchmarks(name, rows, counts, rule, tmp_path, monkeypatch, capsys):
    """Same rows in the same order (forest: in file order), same number of rows as the benchmark states."""
    _, raw = labelled(name, min(rows, 40_000))
    if rows > len(raw):  # forest at its real size: the rows repeated, with ids of their own
        lines = raw.to_csv(index=False).splitlines()
        bodies = [line.partition(",")[2] for line in lines[1:]]
        path = tmp_path / "folder"
        path.mkdir()
        with open(path / "train.csv", "w") as file:
            file.write(lines[0] + "\n")
            file.writelines(f"{i},{bodies[i % len(bodies)]}\n" for i in range(rows))
        ids = np.arange(rows).astype(str)
    else:
        path = archive(name, tmp_path, rows)
        ids = raw.iloc[:, 0].astype(str).to_numpy()
    task = prepare(name, path, tmp_path, monkeypatch)
    assert split_rows(task) == counts
    assert ("warning: " in capsys.readouterr().err) == (rows == 40_000), "only of too few rows"
    train, test = rule(rows)
    if name == FOREST:
        train, test = np.sort(train), np.sort(test)
    elif name == NOMAD:  # renumbered in the order of the split
        ids = raw["lattice_vector_1_ang"].astype(str).to_numpy()
    column = "lattice_vector_1_ang" if name == NOMAD else task.id_column
    for part, expected in (("train", train), ("test", test)):
        table = pd.read_csv(task.public / f"{part}.csv", dtype=str, keep_default_na=False)
        assert np.array_equal(table[column], ids[expected])
    assert list(table[task.id_column]) == list(answers(task)["id"])


@pytest.mark.parametrize("name, members, counts", [
    (JIGSAW, lambda: jigsaw(159_571, tests=153_164, scored=63_978), (159_571, 63_978)),
    (INSULTS, lambda: insults(3_947, tests=2_647), (3_947, 2_647)),
])  # fmt: skip
def test_kaggles_own_split_at_its_real_size(name, members, counts, tmp_path, monkeypatch, capsys):
    """Kaggle's train and test as they are; of 153,164 test comments of jigsaw 63,978 are scored."""
    task = prepare(name, zipped(tmp_path / "raw.zip", members()), tmp_path, monkeypatch)
    assert split_rows(task) == counts
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize("name, members, warned", [
    (JIGSAW, lambda: jigsaw(200), ["training comments instead of 159,571", "scored test comments instead of 63,978"]),
    (INSULTS, lambda: insults(100), ["training comments instead of 3,947", "test comments instead of 2,647"]),
])  # fmt: skip
def test_both_files_of_kaggles_own_split_are_counted(name, members, warned, tmp_path, monkeypatch, capsys):
    prepare(name, zipped(tmp_path / "raw.zip", members()), tmp_path, monkeypatch)
    error = capsys.readouterr().err
    assert error.count("warning: ") == 2 and all(text in error for text in warned)


# ------------------------------------------------------------------------------------- single tasks


def test_house_variants_differ_in_split_and_metric(tmp_path, monkeypatch):
    path = archive(HOME, tmp_path)
    plain, dojo = (prepare(name, path, tmp_path / name, monkeypatch) for name in (HOME, f"{HOME}@mle-dojo"))
    assert (plain.metric, dojo.metric) == ("mae", "rmse")
    assert (dojo.public / "data_description.txt").read_text().startswith("MSSubClass")
    monkeypatch.setattr(tasks, "DATA", tmp_path / HOME / "data")
    assert list(answers(plain)["id"]) == [str(i) for i in range(65, 81)]
    monkeypatch.setattr(tasks, "DATA", tmp_path / f"{HOME}@mle-dojo" / "data")
    assert len(answers(dojo)) == 40 and list(answers(dojo)["id"]) != sorted(answers(dojo)["id"])


def test_a_house_description_that_is_still_packed_is_named(tmp_path, monkeypatch):
    members = home(80)
    members["data_description.txt.zip"] = {"data_description.txt": members.pop("data_description.txt")}
    with pytest.raises(tasks.TaskError, match=r"data_description.txt is missing or empty; run: kaggle"):
        prepare(HOME, zipped(tmp_path / "raw.zip", members), tmp_path, monkeypatch)


def test_crystals_keep_their_geometry_under_their_new_ids(tmp_path, monkeypatch):
    task = prepare(NOMAD, archive(NOMAD, tmp_path), tmp_path, monkeypatch)
    for part, count in (("train", 90), ("test", 10)):
        rows = shown(task, part)
        assert [row["id"] for row in rows] == [str(i) for i in range(1, count + 1)]
        assert {path.name for path in (task.public / part).iterdir()} == {row["id"] for row in rows}
        for row in rows:
            text = (task.public / part / row["id"] / "geometry.xyz").read_text()
            assert f"lattice_vector {row['lattice_vector_1_ang']} " in text


def test_a_crystal_without_geometry_is_named(tmp_path, monkeypatch):
    members = nomad(50)
    del members["train.zip"]["train/7/geometry.xyz"]
    with pytest.raises(tasks.TaskError, match=r"7/geometry.xyz .*; run: kaggle"):
        prepare(NOMAD, zipped(tmp_path / "raw.zip", members), tmp_path, monkeypatch)


def test_insults_keep_equal_comments_apart(tmp_path, monkeypatch):
    """The benchmark matches rows by the comment's text, so these two would be confused; here ids part them."""
    task = prepare(INSULTS, archive(INSULTS, tmp_path), tmp_path, monkeypatch)
    assert split_rows(task) == (120, 120)
    rows = shown(task, "test")
    assert set(rows[0]) == {"id", "Date", "Comment"}  # neither the answer nor Kaggle's Usage
    assert rows[1]["Comment"] == rows[2]["Comment"] == '"the same words"'
    assert list(answers(task)["Insult"][1:3]) == ["0", "1"]
    assert shown(task, "train")[0]["Comment"] == "null" and rows[5]["Date"] == ""
    members = insults(120)  # every cell is as Kaggle wrote it
    assert shown(task, "train") == cells(members["train.csv"].to_csv(index=False))
    assert [row["Comment"] for row in rows] == list(members["test.csv"]["Comment"]) and HTML in rows[0]["Comment"]
    truth = "id,Insult\n" + "".join(f"{i},{v}\n" for i, v in answers(task)[["id", "Insult"]].to_numpy())
    swapped = truth.replace("\n1,0\n2,1\n", "\n1,1\n2,0\n")
    assert task.score(truth.encode()) == 1 and task.score(swapped.encode()) == 118 / 120
    auc = prepare(f"{INSULTS}@mle-bench", archive(INSULTS, tmp_path), tmp_path / "auc", monkeypatch)
    assert auc.score(truth.encode()) == 1 and 0.9 < auc.score(swapped.encode()) < 1
    assert auc.score(truth.replace(",1\n", ",0.51\n").replace(",0\n", ",0.5\n").encode()) == 1


def test_jigsaw_shows_and_scores_labelled_comments_only(tmp_path, monkeypatch):
    members = jigsaw(200)
    task = prepare(JIGSAW, archive(JIGSAW, tmp_path), tmp_path, monkeypatch)
    labels = members["test_labels.csv.zip"]["test_labels.csv"]
    scored = labels[labels["toxic"] >= 0]
    assert 0 < len(scored) < len(labels) and list(answers(task)["id"]) == list(scored["id"])
    assert [row["id"] for row in shown(task, "test")] == list(scored["id"])
    assert (answers(task)[TOXIC].astype(int).to_numpy() == scored[TOXIC].to_numpy()).all()
    train = shown(task, "train")
    assert [row["comment_text"] for row in train[:3]] == ["nan", "null", "  leading blanks\t"]
    assert train == cells(members["train.csv.zip"]["train.csv"].to_csv(index=False))
    comments = members["test.csv.zip"]["test.csv"]["comment_text"][labels["toxic"] >= 0]
    assert [row["comment_text"] for row in shown(task, "test")] == list(comments) and HTML in train[5]["comment_text"]
    counts = answers(task).groupby("part")[TOXIC].agg(lambda c: c.astype(int).sum())
    assert (counts.loc["reward"] - counts.loc["eval"]).abs().max() <= 12  # of about 60


def test_jigsaw_refuses_labels_of_other_comments(tmp_path, monkeypatch):
    members = jigsaw(200)
    labels = members["test_labels.csv.zip"]["test_labels.csv"]
    members["test_labels.csv.zip"]["test_labels.csv"] = labels.iloc[::-1]
    with pytest.raises(tasks.TaskError, match="not about the same comments; run: kaggle"):
        prepare(JIGSAW, zipped(tmp_path / "raw.zip", members), tmp_path, monkeypatch)


def test_essay_scores_out_of_range_are_no_scores(tmp_path, monkeypatch):
    task = prepare(ESSAYS, archive(ESSAYS, tmp_path), tmp_path, monkeypatch)
    table = answers(task)
    right = "essay_id,score\n" + "".join(f"{i},{v}.0\n" for i, v in table[["id", "score"]].to_numpy())
    assert task.score(right.encode()) == 1
    for wrong in ("0", "7", "3.5"):
        first = f"{table['id'][0]},{table['score'][0]}.0\n"
        with pytest.raises(tasks.InvalidSubmission):
            task.score(right.replace(first, f"{table['id'][0]},{wrong}\n").encode())


def test_constant_predictions(tmp_path, monkeypatch):
    """Worthless, but scores: no NaN."""
    for name, value, score in [(PATENTS, "0.5", 0), (ESSAYS, "3", 0)]:
        task = prepare(name, archive(name, tmp_path), tmp_path / name, monkeypatch)
        rows = [f"{id_},{value}" for id_ in answers(task)["id"]]
        assert task.score("\n".join([f"{task.id_column},{task.columns[0]}", *rows]).encode()) == score


def test_authors_probabilities_must_sum_to_one(tmp_path, monkeypatch):
    task = prepare(SPOOKY, archive(SPOOKY, tmp_path), tmp_path, monkeypatch)
    ids = answers(task)["id"]

    def submission(*p):
        return "\n".join(["id,EAP,HPL,MWS", *(f"{i},{p[0]},{p[1]},{p[2]}" for i in ids)]).encode()

    assert task.score(submission(1 / 3, 1 / 3, 1 / 3)) == pytest.approx(np.log(3))
    assert task.score(submission(0.33333, 0.33333, 0.33333)) == pytest.approx(np.log(3))
    with pytest.raises(tasks.InvalidSubmission, match="sum to 1"):
        task.score(submission(0.333, 0.333, 0.333))


def test_forest_has_its_single_row_of_kind_5_and_refuses_damage(tmp_path, monkeypatch):
    task = prepare(FOREST, archive(FOREST, tmp_path), tmp_path, monkeypatch)
    found = [row["Cover_Type"] for row in shown(task, "train")] + list(answers(task)["Cover_Type"])
    assert len(found) == 600 and found.count("5") == 1
    text = forest(50)["train.csv"].to_csv(index=False)
    lines = text.splitlines()
    for damaged, reason in [
        ("\n".join([*lines[:9], lines[9][:-3]]), "damaged row"),  # a cut download
        ("\n".join([*lines[:9], lines[9][:-1] + "8"]), "damaged row"),
        ("\n".join([lines[0].replace("Id,", "id,"), *lines[1:]]), "must have the columns"),
        (lines[0] + "\n", "no rows"),
        ("", "no rows"),
    ]:
        members = forest(50) | {"train.csv": damaged}
        with pytest.raises(tasks.TaskError, match=f"{reason}.*; run: kaggle"):
            prepare(FOREST, zipped(tmp_path / "raw.zip", members), tmp_path / "other", monkeypatch)
    packed = {"train.csv.zip": {"train.csv": text.replace("\n", "\r\n")}}
    plain = {"train.csv": text}
    assert (
        prepare(FOREST, unzipped(tmp_path / "packed", packed), tmp_path / "a", monkeypatch).manifest()
        == prepare(FOREST, unzipped(tmp_path / "plain", plain), tmp_path / "b", monkeypatch).manifest()
    )


@pytest.mark.parametrize("name, file, column, reason", [
    (HOME, "train.csv", "SalePrice", "SalePrice has '', not a number"),
    (FEEDBACK, "train.csv", "grammar", "grammar has '', not a number"),
    (TITANIC, "train.csv", "Transported", "'' is among the answers, but no class"),
    (INSULTS, "test_with_solutions.csv", "Insult", "'' is among the answers, but no class"),
    (f"{INSULTS}@mle-bench", "test_with_solutions.csv", "Insult", "an answer cannot be read"),
    (SPOOKY, "train.zip", "author", "'' is no class of the task"),
])  # fmt: skip
def test_an_empty_answer_is_named(name, file, column, reason, tmp_path, monkeypatch):
    """As at the end of a download that was cut."""
    make, rows = MINIATURES[name]
    members = make(rows)
    table = members[file]["train.csv"] if file == "train.zip" else members[file]
    table[column] = table[column].astype(object).where(table.index % 2 > 0, "")
    with pytest.raises(tasks.TaskError, match=f"{reason}.*; run: kaggle"):
        prepare(name, zipped(tmp_path / "raw.zip", members), tmp_path, monkeypatch)


@pytest.mark.parametrize("name, file, column", [
    (HOME, "train.csv", "SalePrice"), (TITANIC, "train.csv", "Transported"), (FEEDBACK, "train.csv", "grammar"),
    (ESSAYS, "train.csv", "score"), (INSULTS, "test_with_solutions.csv", "Insult"), (PATENTS, "train.csv", "score"),
])  # fmt: skip
def test_a_table_of_another_competition_is_refused(name, file, column, tmp_path, monkeypatch):
    """Such as Kaggle's unlabelled test.csv under the name of train.csv."""
    make, rows = MINIATURES[name]
    members = make(rows)
    members[file] = members[file].drop(columns=column)
    with pytest.raises(tasks.TaskError, match=f"no column {column!r}.*; run: kaggle"):
        prepare(name, zipped(tmp_path / "raw.zip", members), tmp_path, monkeypatch)
