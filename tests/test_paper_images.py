"""The paper's image and graph tasks, each on a miniature of its download, and the readers of raw files.

The miniatures hold the official names, layouts and nested archives, but tiny images: noise, lighter or
darker by their label. What is checked: the benchmark's split (against scikit-learn's function and the
published counts), that every image keeps its own label through renaming and shuffling, that the answers
are hidden, and that the starter runs in the sandbox and beats a constant answer.
"""

import dataclasses
import functools
import gzip
import importlib.util
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.model_selection import train_test_split

import tasks
from paper_kit import answers, assert_hidden, pool, prepare, run_starter, split_rows, unzipped, zipped  # noqa: F401
from tasks import raw, submission

CACTUS, DOGS = "aerial-cactus-identification", "dogs-vs-cats-redux-kernels-edition"
PLANT, LEAF = "plant-pathology-2020-fgvc7", "leaf-classification"
PAGES, ICE = "denoising-dirty-documents", "statoil-iceberg-classifier-challenge"
WHALE, CIFAR, ARXIV = "whale-categorization-playground", "cifar-10", "ogbn-arxiv"
NAMES = (CIFAR, CACTUS, DOGS, PLANT, ARXIV, PAGES, LEAF, ICE, WHALE)


def module(name):
    """A task's prepare.py."""
    spec = importlib.util.spec_from_file_location("prepare", tasks.ROOT / name / "prepare.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def noise(number, size, mode="RGB"):
    """Pixels of an image of noise, another one for each number."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def image_file(pixels, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(pixels)).save(buffer, kind)
    return buffer.getvalue()


def picture(number, size=(16, 16), mode="RGB", light=0.5):
    """Bytes of an image file of noise around a colour: `light`, from 0 to 1, may be one for each of R, G, B."""
    return image_file(0.2 * noise(number, size, mode) + 200 * np.array(light))


# --- miniatures: the members of the downloaded archive, and the score that the starter must beat ---


def cactus():
    rng = np.random.default_rng(0)
    names = [f"{rng.integers(1 << 62):032x}.jpg" for _ in range(200)]
    table = pd.DataFrame({"id": names, "has_cactus": [int(i % 4 > 0) for i in range(200)]})
    lights = table["has_cactus"]
    images = {f"train/{name}": picture(i, (32, 32), light=lights[i]) for i, name in enumerate(names)}
    return {
        "train.csv": table,
        "train.zip": images,
        "test.zip": {"test/0000.jpg": picture(0)},
        "sample_submission.csv": "id,has_cactus\n0000.jpg,0.5\n",
    }


def dogs():
    names = [f"{animal}.{i}.jpg" for animal in ("cat", "dog") for i in range(100)]
    images = {
        f"train/{n}": picture(i, (50 + i % 60, 40), "L" if i == 3 else "RGB", n.startswith("dog"))
        for i, n in enumerate(names)
    }
    return {"train.zip": images, "test.zip": {"test/1.jpg": picture(0)}, "sample_submission.csv": "id,label\n1,0.5\n"}


def plant(rows=120):
    kinds = np.arange(rows) % 4
    kinds[train_test_split(np.arange(rows), test_size=0.1, random_state=0)[1]] = np.arange(rows // 10) % 4
    table = pd.DataFrame(np.eye(4, dtype=int)[kinds], columns=["healthy", "multiple_diseases", "rust", "scab"])
    table.insert(0, "image_id", [f"Train_{i}" for i in range(rows)])
    lights = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])  # a colour for each kind
    images = {f"images/Train_{i}.jpg": picture(i, (24, 16), light=lights[kind]) for i, kind in enumerate(kinds)}
    return {"train.csv": table, "test.csv": "image_id\nTest_0\n", "images/Test_0.jpg": picture(0), **images}


def leaf():
    rng, species = np.random.default_rng(0), tasks.load(LEAF).columns[7:99:20]  # five of 99
    table = pd.DataFrame({"id": rng.permutation(1584)[:80] + 1, "species": np.resize(species, 80)})
    numbers = rng.normal(np.arange(80)[:, None] % 5, 1, (80, 192)).round(6)
    columns = [f"{kind}{i}" for kind in ("margin", "shape", "texture") for i in range(1, 65)]
    table = pd.concat([table, pd.DataFrame(numbers, columns=columns)], axis=1)
    images = {f"images/{i}.jpg": picture(i, (20, 10 + i % 9), "L") for i in table["id"]}
    return {"train.csv.zip": {"train.csv": table, "__MACOSX/._train.csv": b"\0"}, "images.zip": images}


def ice_records(rows=40):
    rng = np.random.default_rng(0)
    bands, angles = rng.normal(-20, 4, (rows, 2, 75 * 75)), rng.normal(39, 4, rows).round(4)
    bands = (bands + 8 * (np.arange(rows) // 2 % 2)[:, None, None]).round(3)  # icebergs are brighter
    return [{"id": f"{i:08x}", "band_1": bands[i, 0].tolist(), "band_2": bands[i, 1].tolist(),
             "inc_angle": "na" if i % 7 < 2 else angles[i], "is_iceberg": i // 2 % 2} for i in range(rows)]  # fmt: skip


@functools.cache
def ice_archive():
    return seven_zip({"data/processed/train.json": json.dumps(ice_records())})


def ice():
    return {"train.json.7z": ice_archive()}


def seven_zip(members):
    py7zr = pytest.importorskip("py7zr", reason="py7zr is not installed")
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 0}]) as archive:
        for name, text in members.items():
            archive.writestr(text, name)
    return buffer.getvalue()


def whale():
    sizes = [1] * 10 + [2] * 2 + [3] * 2 + [120, 120]
    ids = np.repeat([f"w_{i:07x}" for i in range(len(sizes) - 1)] + ["new_whale"], sizes)
    ids = np.random.default_rng(0).permutation(ids)
    table = pd.DataFrame({"Image": [f"{i:08x}.jpg" for i in range(len(ids))], "Id": ids})
    lights = ids == "new_whale"  # so that two whales of many can be told apart; of the others there are too few
    images = {
        f"train/{n}": picture(i, (40, 20), "L" if i % 3 else "RGB", lights[i]) for i, n in enumerate(table["Image"])
    }
    return {"train.csv": table, **images, "test/ff.jpg": picture(0)}


def pages():
    dirty, clean = {}, {}
    for i in range(1, 31):  # 10.png is sorted before 2.png
        size = (24, 18) if i % 2 else (24, 12)
        paper = noise(i + 100, size, "L")
        dirty[f"train/{i}.png"] = image_file(0.8 * paper + 0.2 * noise(i, size, "L"), "PNG")
        clean[f"train_cleaned/{i}.png"] = image_file(paper, "PNG")
    sample = {"sampleSubmission.csv": "id,value\n1_1_1,1\n"}
    return {"train.zip": dirty, "train_cleaned.zip": clean, "test.zip": {"test/11.png": picture(0)},
            "sampleSubmission.csv.zip": sample}  # fmt: skip


def cifar(rows=200):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"]:
            labels = rng.permutation(rows)[:, None] % 2 * 6 + 1  # two classes of the ten, one of them lighter
            data = np.hstack([labels, rng.integers(0, 100, (rows, 3072)) + 20 * labels])
            data = data.astype(np.uint8).tobytes() if name.endswith("bin") else b"airplane\n"
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return {"cifar-10-binary.tar.gz": buffer.getvalue()}


def arxiv_tables(nodes=60):
    rng = np.random.default_rng(0)
    order = rng.permutation(nodes)
    labels = rng.permutation(nodes)[:, None] % 4 * 13
    features = rng.normal(0, 1, (nodes, 128)) + 9 * (labels == np.arange(128) % 40)
    return {
        "raw/edge": rng.integers(0, nodes, (150, 2)),
        "raw/node-feat": features.round(6),
        "raw/node-label": labels,
        "raw/node_year": rng.integers(1971, 2021, (nodes, 1)),
        "raw/num-node-list": np.array([[nodes]]),
        "split/time/train": order[:30, None],
        "split/time/valid": order[30:40, None],
        "split/time/test": order[40:, None],
    }


def arxiv():
    texts = {name: pd.DataFrame(t).to_csv(index=False, header=False) for name, t in arxiv_tables().items()}
    return {"arxiv.zip": {f"arxiv/{name}.csv.gz": gzip.compress(text.encode()) for name, text in texts.items()}}


MAKERS = {CACTUS: cactus, DOGS: dogs, PLANT: plant, LEAF: leaf, ICE: ice, WHALE: whale, PAGES: pages,
          CIFAR: cifar, ARXIV: arxiv}  # fmt: skip
ROWS = {CACTUS: (162, 38), DOGS: (180, 20), PLANT: (108, 12), LEAF: (72, 8), ICE: (32, 8), CIFAR: (1000, 200),
        PAGES: (24, (3 * 18 + 3 * 12) * 24), ARXIV: (30, 20)}  # fmt: skip
# A score that the starter must beat on its miniature: clearly better than any constant answer.
NAIVE = {CACTUS: 0.8, DOGS: 0.6, PLANT: 0.7, LEAF: 1.0, ICE: 0.6, WHALE: 0.75, PAGES: 0.2, CIFAR: 0.7, ARXIV: 0.5}


def download(name, tmp_path):
    """The miniature as its download command leaves it: a zip, or a folder of files that are not Kaggle's."""
    members = MAKERS[name]()
    if name in (CIFAR, ARXIV):
        return unzipped(tmp_path / "raw", members)
    return zipped(tmp_path / f"{name}.zip", members)


@pytest.fixture
def ready(tmp_path, monkeypatch):
    def make(name):
        return prepare(name, download(name, tmp_path), tmp_path, monkeypatch)

    return make


# --- from the download to a score ---


@pytest.mark.parametrize("name", NAMES)
def test_starter_runs_and_is_scored(name, ready, pool, capsys):  # noqa: F811
    task = ready(name)
    assert "warning: " in capsys.readouterr().err  # of the few rows
    secrets = [image_file(noise(int(page) + 100, (24, height), "L"), "PNG") for page, height in test_pages(task)]
    assert_hidden(task, secrets)
    one_thread = dataclasses.replace(task, limits=task.limits | {"threads": 1})
    run = run_starter(one_thread, pool)
    assert task.better(run.scores["all"], NAIVE[name]), run.scores
    right = perfect(task)
    assert task.score(right) == pytest.approx(0 if task.lower_is_better else 1, abs=1e-9)
    head, *lines = right.decode().splitlines()
    assert task.score("\n".join([head, *reversed(lines)]).encode()) == task.score(right)  # ids, not places
    with pytest.raises(submission.InvalidSubmission, match="rows"):
        task.score("\n".join([head, *lines[1:]]).encode())


def perfect(task):
    """The submission that knows the answers."""
    table = answers(task)
    if task.metric == "multi_log_loss":
        table = pd.concat([table["id"], *((table["label"] == c).astype(int).rename(c) for c in task.columns)], axis=1)
    return table[["id", *task.columns]].rename(columns={"id": task.id_column}).to_csv(index=False).encode()


def test_pages(task):
    """(page, height) of the test pages of denoising, else nothing."""
    if task.name != PAGES:
        return []
    found = [(path.stem, Image.open(path).height) for path in (task.public / "test").iterdir()]
    assert len(found) == 6
    return found


test_pages.__test__ = False


@pytest.mark.parametrize("name", NAMES)
def test_archive_and_unpacked_folder_give_the_same_data(name, tmp_path, monkeypatch):
    task = prepare(name, download(name, tmp_path), tmp_path, monkeypatch)
    fingerprint = task.manifest()["fingerprint"]
    by_hand = unzipped(tmp_path / "by-hand", MAKERS[name]())
    for archive in [*by_hand.rglob("*.zip"), *by_hand.rglob("*.7z")]:
        inner = "" if archive.name in ("train.csv.zip", "arxiv.zip", "train.json.7z") else archive.stem
        raw.unpack(archive, by_hand / inner)
        archive.unlink()
    if name == CIFAR:  # has nothing to unpack by hand: the archive itself, instead of the folder it is in
        by_hand = by_hand / "cifar-10-binary.tar.gz"
    assert tasks.prepare(name, by_hand)["fingerprint"] == fingerprint
    if name in ROWS and name not in (DOGS, PAGES, CIFAR):
        assert split_rows(task) == ROWS[name]
    elif name in ROWS:
        assert len(answers(task)) == ROWS[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_halves_are_about_equal(name, ready):
    table = answers(ready(name))
    rows = table["group"].nunique() if "group" in table else len(table)
    half = table[table["part"] == "reward"]
    assert set(table["part"]) == {"reward", "eval"}
    assert abs((half["group"].nunique() if "group" in table else len(half)) - rows / 2) <= 0.5


def file_names(task):
    """All that a script can see: answers in an array would escape a search for their digits."""
    return {path.relative_to(task.public).as_posix() for path in task.public.rglob("*")}


# --- each image keeps its label: against the original files, through scikit-learn's split ---


def test_cactus_images(ready):
    members, task = cactus(), ready(CACTUS)
    train, test = train_test_split(members["train.csv"], test_size=0.19, random_state=0)
    pd.testing.assert_frame_equal(pd.read_csv(task.public / "train.csv"), train.reset_index(drop=True))
    for part, rows in (("train", train), ("test", test)):
        assert {p.name for p in (task.public / part).iterdir()} == set(rows["id"])
        for name in rows["id"]:
            assert (task.public / part / name).read_bytes() == members["train.zip"][f"train/{name}"]
    hidden = answers(task).set_index("id")["has_cactus"].astype(int)
    assert hidden.to_dict() == test.set_index("id")["has_cactus"].to_dict()
    sample = pd.read_csv(task.public / "sample_submission.csv")
    assert list(sample["id"]) == list(test["id"]) and set(sample["has_cactus"]) == {0.5}


def test_dogs_images(ready):
    images, task = dogs()["train.zip"], ready(DOGS)
    train, test = train_test_split(sorted(images), test_size=0.1, random_state=0)
    hidden = answers(task).set_index("id")["label"]
    for i, name in enumerate(test, start=1):
        assert (task.public / "test" / f"{i}.jpg").read_bytes() == images[name]
        assert hidden[str(i)] == str(int("dog" in name))
    for animal in ("cat", "dog"):  # numbered without gaps, in the order of the split
        for i, name in enumerate(name for name in train if animal in name):
            assert (task.public / "train" / f"{animal}.{i}.jpg").read_bytes() == images[name]
    assert len(list((task.public / "train").iterdir())) == len(train)
    assert len(list((task.public / "test").iterdir())) == len(test) == len(hidden)


def test_plant_images(ready):
    members, task = plant(), ready(PLANT)
    train, test = train_test_split(members["train.csv"], test_size=0.1, random_state=0)
    shown = pd.read_csv(task.public / "train.csv")
    hidden = answers(task)
    assert list(hidden["id"]) == list(pd.read_csv(task.public / "test.csv")["image_id"])
    for rows, new, table in ((train, "Train", shown), (test, "Test", hidden)):
        assert list(table.iloc[:, 0]) == [f"{new}_{i}" for i in range(len(rows))]
        assert (table.iloc[:, -4:].astype(int).to_numpy() == rows.iloc[:, -4:].to_numpy()).all()
        for i, old in enumerate(rows["image_id"]):
            assert (task.public / f"images/{new}_{i}.jpg").read_bytes() == members[f"images/{old}.jpg"]
    assert len(list((task.public / "images").iterdir())) == 120


def test_leaf_images_and_columns(ready):
    members, task = leaf(), ready(LEAF)
    table = members["train.csv.zip"]["train.csv"]
    train, test = train_test_split(table, test_size=0.1, random_state=0)
    pd.testing.assert_frame_equal(pd.read_csv(task.public / "train.csv"), train.reset_index(drop=True))
    shown = pd.read_csv(task.public / "test.csv")
    pd.testing.assert_frame_equal(shown, test.drop(columns="species").reset_index(drop=True))
    assert list(answers(task)["label"]) == list(test["species"])
    for number in table["id"]:
        assert (task.public / f"images/{number}.jpg").read_bytes() == members["images.zip"][f"images/{number}.jpg"]
    sample = (task.public / "sample_submission.csv").read_bytes()
    assert task.score(sample) == pytest.approx(np.log(99))  # rows that sum to 1, for 99 species


def test_leaf_refuses_a_species_that_nobody_can_answer(tmp_path, monkeypatch):
    members = leaf()
    table = members["train.csv.zip"]["train.csv"]
    table.loc[3, "species"] = "Taraxacum_Officinale"
    archive = zipped(tmp_path / f"{LEAF}.zip", members)
    with pytest.raises(tasks.TaskError, match=r"Taraxacum_Officinale.*; run: kaggle"):
        prepare(LEAF, archive, tmp_path, monkeypatch)


def test_ice_bands_and_angles(ready):
    task = ready(ICE)
    train, test = train_test_split(ice_records(), test_size=0.2, random_state=0)
    for part, rows in (("train", train), ("test", test)):
        table, bands = pd.read_csv(task.public / f"{part}.csv"), np.load(task.public / f"{part}_bands.npy")
        assert bands.dtype == np.float32 and bands.shape == (len(rows), 2, 75, 75)
        assert list(table["id"]) == [record["id"] for record in rows]
        for record, found in zip(rows, bands.reshape(-1, 2, 75 * 75)):
            assert np.array_equal(found, np.float32([record["band_1"], record["band_2"]]))
        angles = [np.nan if record["inc_angle"] == "na" else record["inc_angle"] for record in rows]
        np.testing.assert_array_equal(table["inc_angle"], angles)
        assert table["inc_angle"].isna().any()
    assert list(answers(task)["is_iceberg"].astype(int)) == [record["is_iceberg"] for record in test]
    assert "is_iceberg" not in pd.read_csv(task.public / "test.csv")
    assert file_names(task) == {"train.csv", "train_bands.npy", "test.csv", "test_bands.npy", "sample_submission.csv"}


def test_whale_images(ready):
    members, task = whale(), ready(WHALE)
    original = members["train.csv"].set_index("Image")["Id"]
    train = pd.read_csv(task.public / "train.csv").set_index("Image")["Id"]
    hidden = answers(task).set_index("id")["Id"]
    assert sorted([*train.index, *hidden.index]) == sorted(original.index)
    for part, rows in (("train", train), ("test", hidden)):
        assert {p.name for p in (task.public / part).iterdir()} == set(rows.index)
        for name, whale_id in rows.items():
            assert (task.public / part / name).read_bytes() == members[f"train/{name}"]
            assert whale_id == original[name] or (part, whale_id) == ("test", "new_whale")
    assert set(hidden) <= set(train)


def test_cifar_images(ready):
    task = ready(CIFAR)
    with tarfile.open(fileobj=io.BytesIO(cifar()["cifar-10-binary.tar.gz"])) as archive:
        records = archive.extractfile("cifar-10-batches-bin/data_batch_2.bin").read()
        test = archive.extractfile("cifar-10-batches-bin/test_batch.bin").read()
    images, labels = np.load(task.public / "train_images.npy"), np.load(task.public / "train_labels.npy")
    assert images.shape == (1000, 32, 32, 3) and images.dtype == np.uint8 and labels.shape == (1000,)
    record = records[3 * 3073 : 4 * 3073]  # the fourth record of the second file is image 203
    assert labels[203] == record[0]
    row, column = 5, 7
    assert images[203, row, column].tolist() == [record[1 + 1024 * c + 32 * row + column] for c in range(3)]
    assert answers(task)["label"].astype(int).tolist() == list(test[::3073])
    assert answers(task)["id"].tolist() == [str(i) for i in range(200)]
    assert np.load(task.public / "test_images.npy")[1, 0, 0].tolist() == [test[3074], test[3074 + 1024], test[3074 + 2048]]
    assert file_names(task) == {"train_images.npy", "train_labels.npy", "test_images.npy", "sample_submission.csv"}
    assert set(pd.read_csv(task.public / "sample_submission.csv")["label"]) == {0}


def test_arxiv_nodes(ready):
    task, tables = ready(ARXIV), arxiv_tables()
    labels = tables["raw/node-label"][:, 0]
    assert np.array_equal(np.load(task.public / "edges.npy"), tables["raw/edge"])
    assert np.array_equal(np.load(task.public / "features.npy"), np.float32(tables["raw/node-feat"]))
    assert np.array_equal(np.load(task.public / "years.npy"), tables["raw/node_year"][:, 0])
    hidden = answers(task).astype({"id": int, "label": int}).rename(columns={"id": "node"})
    for part in ("train", "valid", "test"):
        nodes = tables[f"split/time/{part}"][:, 0]
        table = hidden if part == "test" else pd.read_csv(task.public / f"{part}.csv")
        assert table["node"].tolist() == nodes.tolist() and table["label"].tolist() == labels[nodes].tolist()
    assert pd.read_csv(task.public / "test.csv").to_dict("list") == {"node": nodes.tolist()}
    written = {"train.csv", "valid.csv", "test.csv", "sample_submission.csv"}
    assert file_names(task) == {"features.npy", "edges.npy", "years.npy"} | written
    assert set(pd.read_csv(task.public / "sample_submission.csv")["label"]) == {0}


def test_page_pixels(ready):
    task, members = ready(PAGES), pages()
    train, test = train_test_split(sorted(members["train.zip"]), test_size=0.2, random_state=0)
    hidden = answers(task).set_index("id")
    expected = {}
    for name in test:
        page = name.removeprefix("train/").removesuffix(".png")
        assert (task.public / f"test/{page}.png").read_bytes() == members["train.zip"][name]
        clean = np.asarray(Image.open(io.BytesIO(members["train_cleaned.zip"][f"train_cleaned/{page}.png"])))
        for row, column in np.ndindex(clean.shape):
            expected[f"{page}_{row + 1}_{column + 1}"] = clean[row, column] / 255
        assert hidden.loc[[f"{page}_1_1", f"{page}_{clean.shape[0]}_24"], "part"].nunique() == 1
    assert hidden["value"].astype(float).to_dict() == expected
    for folder in ("train", "train_cleaned"):
        assert {p.name for p in (task.public / folder).iterdir()} == {n.removeprefix("train/") for n in train}


# --- the benchmarks' splits at the real number of rows, and what is published about them ---


@pytest.mark.parametrize(
    "name, rows, share, counts",
    [
        (CACTUS, 17_500, 0.19, (14_175, 3_325)),
        (PLANT, 1_821, 0.1, (1_638, 183)),
        (LEAF, 990, 0.1, (891, 99)),
    ],
)
def test_split_of_rows(name, rows, share, counts):
    table = pd.DataFrame({"id": [f"row {i}" for i in range(rows)], "value": np.arange(rows)})
    found, expected = module(name).divide(table), train_test_split(table, test_size=share, random_state=0)
    assert tuple(map(len, found)) == counts
    for mine, theirs in zip(found, expected):
        pd.testing.assert_frame_equal(mine, theirs)


@pytest.mark.parametrize(
    "name, names, share, counts",
    [
        (DOGS, [f"{animal}.{i}.jpg" for i in range(12_500) for animal in ("dog", "cat")], 0.1, (22_500, 2_500)),
        (PAGES, [f"{i}.png" for i in range(1, 217) if i % 3], 0.2, (115, 29)),
    ],
)
def test_split_of_files(name, names, share, counts):
    found, expected = module(name).divide(names), train_test_split(sorted(names), test_size=share, random_state=0)
    assert list(found) == expected
    assert tuple(map(len, found)) == counts


def test_split_of_radar_images():
    train, test = train_test_split(np.arange(1_604), test_size=0.2, random_state=0)
    found = module(ICE).divide(1_604)
    assert [len(part) for part in found] == [1_283, 321]
    assert np.array_equal(found[0], train) and np.array_equal(found[1], test)


def whales(singles, doubles, more, seed):
    """A table of images whose whales have 1, 2 or `more` images, in random order."""
    sizes = np.array([1] * singles + [2] * doubles + list(more))
    ids = np.repeat([f"w_{i:07x}" for i in range(len(sizes))], sizes)
    ids = np.random.default_rng(seed).permutation(ids)
    return pd.DataFrame({"Image": [f"{i:08x}.jpg" for i in range(len(ids))], "Id": ids})


def split_whales(rows):
    """The rule of MLE-bench, once more: by pandas' sample, numpy's choice and scikit-learn's split."""
    rng, where = np.random.default_rng(0), {}
    for whale_id in rows["Id"].unique():
        own = rows.loc[rows["Id"] == whale_id]
        if len(own) > 1:
            pair = own.sample(2, random_state=0)["Image"]
            where |= {pair.iloc[0]: "train", pair.iloc[1]: "test"}
        else:
            where[own["Image"].item()] = str(rng.choice(["train", "test"], replace=False, p=[0.9, 0.1]))
    rest = rows[~rows["Image"].isin(list(where))]
    kept, tested = train_test_split(rest, test_size=0.1, random_state=0)
    where |= dict.fromkeys(kept["Image"], "train") | dict.fromkeys(tested["Image"], "test")
    known = {whale_id for image, whale_id in rows.to_numpy() if where[image] == "train"}
    train = [(image, whale_id) for image, whale_id in rows.to_numpy() if where[image] == "train"]
    test = [(i, w if w in known else "new_whale") for i, w in rows.to_numpy() if where[i] == "test"]
    return train, test


@pytest.mark.parametrize("seed", range(3))
def test_split_of_whales(seed):
    rows = whales(200, 90, [3, 3, 4, 5, 9, 40, 81], seed)
    rows.index += 5  # the rule is about rows, whatever they are called
    train, test = module(WHALE).divide(rows)
    expected = split_whales(rows)
    assert [tuple(r) for r in train.to_numpy()] == expected[0]
    assert [tuple(r) for r in test.to_numpy()] == expected[1]
    assert sum(w == "new_whale" for _, w in expected[1]) > 5


def test_split_of_as_many_whales_as_there_are():
    """9,850 images of 4,251 whales, 2,220 of which have one image: no other number gives 7,240 + 2,610."""
    more = np.full(1_500, 3) + np.bincount(np.arange(3_568 - 1_500) % 700, minlength=1_500)
    rows = whales(2_220, 4_251 - 2_220 - 1_500, more, 0)
    assert (len(rows), rows["Id"].nunique()) == (9_850, 4_251)
    train, test = module(WHALE).divide(rows)
    assert (len(train), len(test)) == (7_240, 2_610)
    multiple = rows["Id"].value_counts().loc[lambda counts: counts > 1].index
    assert set(multiple) <= set(train["Id"]) and set(multiple) <= set(test["Id"])
    assert (test["Id"] == "new_whale").sum() == 222  # the only image of a whale, by chance in the test


# --- raw files: packed, unpacked, damaged ---


def test_table(tmp_path):
    rows = pd.DataFrame({"a": [1, 2], "b": ["x,y", 'say "z"\n']})
    unzipped(tmp_path, {"plain.csv": rows, "packed.csv.zip": {"__MACOSX/packed.csv": "?", "deep/packed.csv": rows}})
    for name in ("plain.csv", "packed.csv"):
        pd.testing.assert_frame_equal(raw.table(tmp_path, name, ["a"]), rows)
    assert raw.table(tmp_path, "plain.csv", dtype=str)["a"].tolist() == ["1", "2"]
    unzipped(tmp_path, {"empty.csv": "", "head.csv": "a,b\n", "torn.csv": 'a,b\n1,"2\n', "odd.csv.zip": {"o": "1"},
                        "torn2.csv.zip": b"PK\3\4"})  # fmt: skip
    for name, reason in {
        "none.csv": "neither none.csv nor none.csv.zip",
        "empty.csv": "damaged",
        "head.csv": "no rows",
        "torn.csv": "damaged",
        "odd.csv": "holds no odd.csv",
        "torn2.csv": "damaged",
    }.items():
        with pytest.raises(tasks.TaskError, match=reason):
            raw.table(tmp_path, name)
    with pytest.raises(tasks.TaskError, match="no column 'c'"):
        raw.table(tmp_path, "plain.csv", ["a", "c"])


def test_folder(tmp_path):
    files = {"one.txt": "1", "deep/two.txt": "2"}
    below = {f"train/{name}": text for name, text in files.items()}
    cases = {
        "folder": {"raw/" + name: text for name, text in below.items()},
        "folder-in-folder": {"raw/train/" + name: text for name, text in below.items()},
        "zip": {"raw/train.zip": files},
        "zip-of-folder": {"raw/train.zip": below},
    }
    for case, members in cases.items():
        unzipped(tmp_path / case, members)
        (tmp_path / case / "scratch").mkdir()
        found = raw.folder(tmp_path / case / "raw", "train", tmp_path / case / "scratch")
        assert {str(p.relative_to(found)) for p in found.rglob("*.txt")} == set(files), case
        assert (found / "deep/two.txt").read_text() == "2"
        assert len(list((tmp_path / case / "raw").iterdir())) == 1  # nothing was unpacked beside the raw files
    with pytest.raises(tasks.TaskError, match=r"neither none/ nor none\.zip"):
        raw.folder(tmp_path, "none", tmp_path)


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "train/../../out.txt"])
def test_archive_members_stay_inside(tmp_path, name):
    archive = zipped(tmp_path / "in" / "train.zip", {"fine.txt": "1", name: "2"})
    with pytest.raises(tasks.TaskError, match="outside"):
        raw.unpack(archive, tmp_path / "in" / "target")
    assert not list((tmp_path / "in" / "target").iterdir()) and not (tmp_path / "in" / "out.txt").exists()


def test_seven_zip(tmp_path):
    data = seven_zip({"data/processed/train.json": "[1]"})
    (tmp_path / "train.json.7z").write_bytes(data)
    found = raw.folder(tmp_path, "train.json", tmp_path / "scratch")
    assert (found / "data/processed/train.json").read_text() == "[1]"
    for number, damaged in enumerate((b"no archive", data[:-9], data[:40] + b"\0\0\0\0" + data[44:])):
        (tmp_path / "bad.7z").write_bytes(damaged)
        with pytest.raises(tasks.TaskError, match="damaged"):
            raw.unpack(tmp_path / "bad.7z", tmp_path / f"bad{number}")


def test_damaged_zip(tmp_path):
    path = zipped(tmp_path / "train.zip", {"a.jpg": picture(0, (64, 64))})
    data = path.read_bytes()
    for number, damaged in enumerate((b"no archive", data[:-30], data[:200] + b"\0" * 20 + data[220:])):
        path.write_bytes(damaged)
        with pytest.raises(tasks.TaskError, match="damaged"):
            raw.unpack(path, tmp_path / f"target{number}")


@pytest.mark.parametrize(
    "name, damage, reason",
    [
        (CACTUS, lambda m: m["train.zip"].popitem(), "missing or empty"),
        (DOGS, lambda m: m["train.zip"].update({"train/cow.1.jpg": picture(0)}), "cow"),
        (DOGS, lambda m: m.update({"train.zip": {"train/readme.txt": "?"}}), "nothing"),
        (PAGES, lambda m: m["train_cleaned.zip"].popitem(), "same pages"),
        (PAGES, lambda m: m["train_cleaned.zip"].update({f"train_cleaned/{i}.png": image_file(noise(1, (9, 9)), "PNG")
                                                         for i in range(1, 31)}), "pixels dirty"),
        (PAGES, lambda m: m["train_cleaned.zip"].update({f"train_cleaned/{i}.png": b"?" for i in range(1, 31)}), "damaged"),
        (ICE, lambda m: m.update({"train.json.7z": seven_zip({"data/processed/train.json": '[{"id": "a"}]'})}), "band_1"),
        (ICE, lambda m: m.update({"train.json.7z": seven_zip({"data/processed/train.json": "[{"})}), "two bands"),
        (ICE, lambda m: m.update({"train.json.7z": seven_zip({"data/processed/test.json": "[]"})}), "two bands"),
        (WHALE, lambda m: m.pop("train.csv"), "needs .*train.csv"),
        (CIFAR, lambda m: m.update({"cifar-10-binary.tar.gz": b"?"}), "binary version"),
        (CIFAR, lambda m: m.update({"cifar-10-binary.tar.gz": m["cifar-10-binary.tar.gz"][:-500]}), "binary version"),
        (ARXIV, lambda m: m["arxiv.zip"].pop("arxiv/raw/node_year.csv.gz"), "node_year.csv.gz is missing"),
        (ARXIV, lambda m: m["arxiv.zip"].update({"arxiv/raw/node_year.csv.gz": gzip.compress(b"2000\n2001\n")}), "fit"),
        (ARXIV, lambda m: m["arxiv.zip"].update({"arxiv/raw/edge.csv.gz": b"?"}), "damaged"),
    ],
)  # fmt: skip
def test_wrong_downloads_are_named(name, damage, reason, tmp_path, monkeypatch):
    members = MAKERS[name]()
    damage(members)
    folder = unzipped(tmp_path / "raw", members)
    with pytest.raises(tasks.TaskError, match=f"^{name}: .*{reason}.*; run: (kaggle|wget) ") as error:
        prepare(name, folder, tmp_path, monkeypatch)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").iterdir())  # nothing half done


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "DATA", tmp_path / "data")
    place = tasks.DATA / "raw" / (name if name in (CIFAR, ARXIV) else "")  # where prepare looks
    command = r"wget -P (\S+) http\S+" if name in (CIFAR, ARXIV) else rf"kaggle competitions download -c {name} -p (\S+)"
    for file in tasks.load(name).source["files"]:  # or a folder
        members = {member: content for member, content in MAKERS[name]().items() if member.split("/")[0] != file}
        with pytest.raises(tasks.TaskError, match=rf"^{name}: needs .*{file}; run: {command}$") as error:
            tasks.prepare(name, unzipped(tmp_path / f"without {file}", members))
        assert Path(re.search(command, str(error.value))[1]).resolve() == place


def test_a_missing_package_is_named_first(tmp_path, monkeypatch):
    """Before the download is looked at, and without its command: to load it once more would not help."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "py7zr" else find(name, *more))
    monkeypatch.setattr(tasks, "DATA", tmp_path)
    with pytest.raises(tasks.TaskError, match=rf"^{ICE} needs more packages; run: pip install py7zr$"):
        tasks.prepare(ICE, tmp_path / "nothing")
