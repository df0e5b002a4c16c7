"""Tasks: their files, their data, and a scorer that takes nothing but a full answer."""

import ast
import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import yaml

import sandbox
import tasks
from tasks import build, measure, split, submission
from tasks.__main__ import main

MICRO = tasks.names(suite="micro")


# --- the files of every task ---


def test_the_suite_is_complete():
    assert len(tasks.names("micro", "train")) == 9
    assert len(tasks.names("micro", "heldout")) == 6
    assert tasks.names("micro", "train") + tasks.names("micro", "heldout") == MICRO


@pytest.mark.parametrize("name", MICRO)
def test_task_is_well_formed(name):
    task = tasks.load(name)
    assert task.name == name and task.dir.name == name
    assert len(task.brief.split()) <= 15 and len(task.description) > 200
    assert set(task.initial_score) == set(tasks.PARTS)
    for part in tasks.PARTS:  # a gain of the best over the start that noise cannot explain
        assert task.better(task.best_score, task.initial_score[part])
        assert abs(task.best_score - task.initial_score[part]) > 4 * task.noise
    assert task.gain(task.best_score) == pytest.approx(1)
    assert task.gain(task.initial_score["eval"], "eval") == 0
    assert task.delta(task.best_score) > 0
    assert all(len(digest) == 64 for digest in task.source["files"].values())


@pytest.mark.parametrize("name", MICRO)
def test_script_is_short_and_has_its_blocks(name):
    task = tasks.load(name)
    assert set(task.sources()) == {"train.py"} and set(task.helpers()) == {"helper.py"}
    script = task.sources()["train.py"]
    assert len(script.splitlines()) <= 20
    assert max(map(len, script.splitlines())) <= 100
    lines = [tasks.block_lines(script, block) for block in tasks.AXES]
    assert all(first <= last for first, last in lines)
    assert lines == sorted(lines)  # data, then model, then learning
    assert script.endswith("# submission\nvalidate(model, X, y)\nsubmit(model, X, y, X_test)\n")


@pytest.mark.parametrize("name", MICRO)
def test_ideas_are_well_formed(name):
    task = tasks.load(name)
    ideas, script = task.ideas(), task.sources()["train.py"]
    counts = Counter(idea.axis for idea in ideas)
    assert all(counts[axis] >= 6 for axis in tasks.AXES), counts
    for idea in ideas:
        assert 1 <= len(idea.text.split()) <= 6, idea.text
        assert idea.block in tasks.AXES and not idea.code.startswith(" ")
        assert not any(line.startswith("# ") for line in idea.code.splitlines()), idea.text
        edited = tasks.apply_block(script, idea.block, idea.code)
        ast.parse(edited)
        first, last = tasks.block_lines(edited, idea.block)
        assert edited.splitlines()[first - 1 : last] == idea.code.strip("\n").splitlines()
        assert idea.note in ("improves", "hurts", "neutral", "crashes", "times_out"), idea.text


def test_ideas_offer_something_to_learn():
    """Half of all edits improve, a tenth at most crash, and no two tasks have the same best ones."""
    notes, best = Counter(), Counter()
    for name in MICRO:
        task = tasks.load(name)
        own = Counter(idea.note for idea in task.ideas())
        assert own["improves"] >= 0.4 * own.total(), (name, own)
        assert own["crashes"] + own["times_out"] <= 0.13 * own.total(), (name, own)
        assert own["hurts"] >= 1
        notes += own
        best[task.best_source] += 1
    assert notes["improves"] >= 0.5 * notes.total()
    assert notes["crashes"] + notes["times_out"] <= 0.1 * notes.total()
    assert max(best.values()) == 1


def test_pools_are_shared_by_training_and_heldout_tasks():
    for axis in ("model", "learning"):
        texts = {
            split: {i.text for n in tasks.names("micro", split) for i in tasks.load(n).ideas() if i.axis == axis}
            for split in ("train", "heldout")
        }
        shared = texts["train"] & texts["heldout"]
        assert len(shared) >= 0.5 * len(texts["heldout"])


PAPER = [variant for name in tasks.names(suite="paper") for variant in (name, *tasks.variants(name))]


def test_the_paper_suite_is_complete():
    assert len(tasks.names("paper", "train")) == 9 and len(tasks.names("paper", "heldout")) == 10
    assert len(PAPER) == 21
    benchmarks = {name: tasks.load(name).source["benchmark"] for name in tasks.names("paper")}
    theirs = {name for name, benchmark in benchmarks.items() if benchmark == "MLAgentBench"}
    assert theirs == {"cifar-10", "home-data-for-ml-course", "spaceship-titanic",
                      "feedback-prize-english-language-learning", "ogbn-arxiv"}  # fmt: skip
    assert Counter(benchmarks.values()) == {"MLAgentBench": 5, "MLE-bench": 14}


# The score of the paper's starter, which the paper does not state, from two numbers that it does: ML-Agent's mean score
# (Table 1 of its first version) and its mean gain in percent (Table 1 of the second, of the same runs).
INITIAL = {
    "cifar-10": (0.5148, 0.6888, 33.80),
    "home-data-for-ml-course": (21676, 20209, 6.77),
    "feedback-prize-english-language-learning": (0.6830, 0.5910, 13.47),
    "denoising-dirty-documents": (0.1556, 0.0741, 52.38),
    "leaf-classification": (0.0800, 0.0689, 13.87),
    "statoil-iceberg-classifier-challenge": (0.2909, 0.2868, 1.41),
    "whale-categorization-playground": (0.1162, 0.2009, 72.89),
    "learning-agency-lab-automated-essay-scoring-2": (0.7332, 0.7472, 1.91),
    "detecting-insults-in-social-commentary": (0.7972, 0.8111, 1.74),
    "spooky-author-identification": (0.4494, 0.4415, 1.76),
    "jigsaw-toxic-comment-classification-challenge": (0.9752, 0.9753, 0.01),
    "us-patent-phrase-to-phrase-matching": (0.4530, 0.5117, 12.96),
    "tabular-playground-series-dec-2021": (0.9590, 0.9609, 0.20),
}


def test_initial_scores_that_are_not_ours_are_the_papers():
    for name, (initial, score, gain) in INITIAL.items():
        task = tasks.load(name)
        if task.initial_source == "measured":  # here, by whoever has the data
            continue
        assert task.initial_source.startswith("derived from the paper's Table 1")
        assert task.initial_score == dict.fromkeys(tasks.PARTS, initial)
        assert 100 * task.delta(score) == pytest.approx(gain, abs=0.02)
    others = {name for name in PAPER if tasks.load(name).initial_score and name not in INITIAL}
    assert all(tasks.load(name).initial_source == "measured" for name in others)


def test_the_list_shows_every_paper_task(capsys):
    assert main(["list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line[0] for line in lines if line[1:2] == ["paper"]]
    assert shown == PAPER and len(set(shown)) == 21
    assert {name for name in shown if "@" in name} == {
        "home-data-for-ml-course@mle-dojo",
        "detecting-insults-in-social-commentary@mle-bench",
    }


@pytest.mark.parametrize("name", PAPER)
def test_paper_task_is_well_formed(name):
    task = tasks.load(name)
    assert task.name == name and task.dir.name == name.partition("@")[0]
    assert len(task.brief.split()) <= 15 and len(task.description) > 400
    named = task.columns if len(task.columns) <= 6 else ()
    for word in ("submission.csv", task.id_column, *named, "better"):
        assert word in task.description
    assert task.initial_source != "measured" if task.initial_score is None else task.initial_source
    if task.initial_score:
        assert all(task.scale(part).noise > 0 for part in tasks.PARTS), "and the best score is the better one"
    limits = sandbox.Limits(**task.limits)
    assert limits.wall_s == 1800 and limits.memory_mb >= 4096
    assert {"about", "rules", "command", "files"} <= set(task.source) and task.source["files"]
    assert task.source["benchmark"] in ("MLAgentBench", "MLE-bench")
    assert task.source["rules"].startswith("https://")
    assert task.best_source


@pytest.mark.parametrize("name", PAPER)
def test_paper_starters_and_ideas(name):
    task = tasks.load(name)
    script = task.sources()["train.py"]
    ast.parse(script)
    assert "submission.csv" in script and len(script.splitlines()) <= 120
    assert max(map(len, script.splitlines())) <= 120
    counts = Counter(idea.axis for idea in task.ideas())
    assert set(counts) == set(tasks.AXES) and min(counts.values()) >= 4
    assert all(idea.code is None and idea.note is None for idea in task.ideas())


# --- the blocks of a script ---

SCRIPT = "import a\n# data\nX = 1\nX += 1\n# model\n# learning\nm = 2\n# submission\nend()\n"


def test_blocks():
    assert tasks.block_lines(SCRIPT, "data") == (3, 4)
    assert tasks.block_lines(SCRIPT, "model") == (6, 5)  # empty
    edited = tasks.apply_block(SCRIPT, "model", "m = 1\nm += 1\n")
    assert edited == SCRIPT.replace("# model\n", "# model\nm = 1\nm += 1\n")
    assert tasks.apply_block(SCRIPT, "data", "") == SCRIPT.replace("X = 1\nX += 1\n", "")


@pytest.mark.parametrize(
    "script, block",
    [
        (SCRIPT, "submission"),
        (SCRIPT, "nothing"),
        (SCRIPT.replace("# data\n", ""), "data"),
        (SCRIPT + SCRIPT, "data"),
        (SCRIPT.replace("# submission", "#"), "learning"),
    ],
)
def test_blocks_that_are_not_there(script, block):
    with pytest.raises(ValueError, match=r"block|line"):
        tasks.apply_block(script, block, "x = 1")


# --- a toy task for the framework ---

PREPARE = """
import pandas as pd
def prepare(raw, public, private):
    table = pd.read_csv(raw / "rows.csv", dtype=str)
    table.drop(columns=["part", *COLUMNS]).to_csv(public / "test.csv", index=False)
    table.to_csv(private / "answers.csv", index=False)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """toy(metric, answers, classes) -> a prepared task of four test rows with ids 10 to 13."""
    monkeypatch.setattr(tasks, "ROOT", tmp_path / "tasks")
    monkeypatch.setattr(tasks, "DATA", tmp_path / "data")

    def make(metric="mae", answers=None, columns=("a",), classes=()):
        folder = tmp_path / "tasks" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        answers = {"a": [1.0, 2.0, 3.0, 4.0]} if answers is None else answers
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        table = {"id": [10, 11, 12, 13], "part": ["reward", "eval", "reward", "eval"], **answers}
        pd.DataFrame(table).to_csv(raw / "rows.csv", index=False)
        code = PREPARE.replace("COLUMNS", repr(list(answers)))
        (folder / "prepare.py").write_text(code)
        spec = {
            "name": "toy", "suite": "paper", "split": "train", "modality": "tabular",
            "kind": "regression", "metric": metric, "description": "d", "brief": "b",
            "submission": {"id": "id", "columns": list(columns), "classes": list(classes)},
            "initial_score": {"reward": 4.0, "eval": 5.0, "all": 4.5}, "best_score": 0.5,
            "best_source": "", "noise": 0.1, "limits": {},
            "source": {"command": "fetch toy", "files": {"rows.csv": None}},
        }  # fmt: skip
        (folder / "task.yaml").write_text(yaml.safe_dump(spec))
        tasks.prepare("toy", raw)
        return tasks.load("toy")

    return make


def table(columns, *rows):
    return ("\n".join([columns, *rows]) + "\n").encode()


GOOD = ("10,1", "11,2", "12,3", "13,6")


def test_score_of_the_parts(toy):
    task = toy()
    submission = table("id,a", *GOOD)
    assert task.score(submission) == 0.5
    assert task.score(submission, "reward") == 0 and task.score(submission, "eval") == 1
    assert task.scores(submission) == {"reward": 0, "eval": 1, "all": 0.5}
    shuffled = table("a,id", "6,13", "2,11", "1,10", "3,12")  # rows and columns in any order
    assert task.score(shuffled, "eval") == 1
    with pytest.raises(ValueError, match="part"):
        task.score(submission, "test")


@pytest.mark.parametrize(
    "submission, reason",
    [
        (b"", "columns"),
        (b"\xff\xfe\x00", "UTF-8"),
        (table("id,a", *GOOD[:3]), "3 rows, not 4"),
        (table("id,a", *GOOD, "14,1"), "more than 4 rows"),
        (table("id,a", *GOOD[:3], "12,1"), "twice"),
        (table("id,a", *GOOD[:3], "99,1"), "lacks the id 13"),
        (table("id,a", *GOOD[:3], "13.0,1"), "lacks the id 13"),
        (table("id,b", *GOOD), "columns"),
        (table("id,a,b", *(f"{row},1" for row in GOOD)), "columns"),
        (table("id,a,a", *(f"{row},1" for row in GOOD)), "columns"),
        (table("id,a", *GOOD[:3], "13,6,7"), "3 fields"),
        (table("id,a", *GOOD[:3], ""), "fields|rows"),
        (table("id,a", *GOOD[:3], "13,"), "not a number"),
        (table("id,a", *GOOD[:3], "13,x"), "not a number"),
        (table("id,a", *GOOD[:3], "13,nan"), "NaN"),
        (table("id,a", *GOOD[:3], "13,-inf"), "infinite"),
        (table("id,a", *GOOD[:3], "13,1e999"), "infinite"),
        (table("id,a", *GOOD[:3], '13,"' + "1" * 200_000 + '"'), "CSV|number"),
        (table("id,a", *GOOD[:3], '13,"6'), "CSV"),
        (b"id,a\n" + b"\n" * 100, "fields|rows"),
    ],
)
def test_score_takes_nothing_but_a_full_answer(toy, submission, reason):
    with pytest.raises(tasks.InvalidSubmission, match=reason) as caught:
        toy().score(submission)
    assert len(caught.value.reason) < 300 and "\n" not in caught.value.reason


def test_a_huge_file_is_not_even_parsed(toy, monkeypatch):
    task = toy()
    limit = task.max_submission_bytes()
    assert 2**20 < limit < 2**21
    monkeypatch.setattr(submission.csv, "reader", None)
    with pytest.raises(tasks.InvalidSubmission, match="larger than 1 MB"):
        task.score(b"x" * (limit + 1))


def test_a_score_that_overflows_is_no_score(toy):
    task = toy("rmse")
    with pytest.raises(tasks.InvalidSubmission, match="finite"):
        task.score(table("id,a", *GOOD[:3], "13,1e200"))


@pytest.mark.parametrize("metric", ["log_loss", "auc"])
def test_probabilities_must_be_such(toy, metric):
    task = toy(metric, {"a": [0, 0, 1, 1]})
    task.score(table("id,a", "10,0", "11,0.2", "12,1", "13,0.9"))
    for wrong in ("1.0001", "-0.1"):
        with pytest.raises(tasks.InvalidSubmission, match="between 0 and 1"):
            task.score(table("id,a", "10,0", "11,0.2", "12,1", f"13,{wrong}"))


def test_class_probabilities_must_sum_to_one(toy):
    task = toy("multi_log_loss", {"label": ["x", "y", "z", "x"]}, columns="xyz")
    rows = ["10,.8,.1,.1", "11,.1,.8,.1", "12,.1,.1,.8"]
    assert task.score(table("id,x,y,z", *rows, "13,.8,.1,.1")) == pytest.approx(-np.log(0.8))
    reordered = table("id,z,y,x", *(",".join((r.split(",")[0], *r.split(",")[:0:-1]))
                                    for r in [*rows, "13,.8,.1,.1"]))  # fmt: skip
    assert task.score(reordered) == pytest.approx(-np.log(0.8))
    with pytest.raises(tasks.InvalidSubmission, match="sum to 1"):
        task.score(table("id,x,y,z", *rows, "13,.8,.1,.0"))


def test_labels_must_be_classes(toy):
    task = toy("accuracy", {"a": [0, 1, 2, 1]}, classes=[0, 1, 2])
    assert task.score(table("id,a", "10,0", "11,1.0", "12,2", "13,2")) == 0.75
    assert task.score(table("id,a", "13,2", "12,2", "11,1.0", "10,0")) == 0.75
    for wrong in ("3", "0.5", "cat", ""):
        with pytest.raises(tasks.InvalidSubmission, match="no class"):
            task.score(table("id,a", "10,0", "11,1", "12,2", f"13,{wrong}"))


def test_whole_numbers_and_logarithms(toy):
    with pytest.raises(tasks.InvalidSubmission, match="whole"):
        toy("qwk", {"a": [0, 1, 2, 1]}).score(table("id,a", "10,0", "11,1", "12,2", "13,1.5"))
    with pytest.raises(tasks.InvalidSubmission, match="far outside"):
        toy("qwk", {"a": [0, 1, 2, 1]}).score(table("id,a", "10,0", "11,1", "12,2", "13,1e9"))
    with pytest.raises(tasks.InvalidSubmission, match="-1"):
        toy("rmsle").score(table("id,a", "10,0", "11,1", "12,2", "13,-1"))


def test_rankings(toy):
    task = toy("map5", {"a": ["w", "x", "y", "z"]})
    for rows in (("10,w q", "11,q x", "12,", "13,q r s t u z"), ("13,q", "12,q", "11,q x", "10,w")):
        assert task.score(table("id,a", *rows)) == 1.5 / 4


def test_classes_bound_whole_numbers(toy):
    task = toy("qwk", {"a": [1, 2, 3, 6]}, classes=[1, 2, 3, 4, 5, 6])
    assert task.score(table("id,a", "10,1", "11,2", "12,3", "13,6")) == 1
    for wrong in ("0", "7"):
        with pytest.raises(tasks.InvalidSubmission, match="may have only 1, 2, 3, 4, 5, 6"):
            task.score(table("id,a", "10,1", "11,2", "12,3", f"13,{wrong}"))


@pytest.fixture
def long():
    """(answers, rows): 100 rows more than three chunks, with ids that are no numbers."""
    n = 3 * submission.CHUNK + 100
    rng = np.random.default_rng(0)
    values = rng.normal(size=n)
    ids = np.array([f"é{i:x}" for i in rng.permutation(n)])
    encoded = np.array([i.encode() for i in ids])
    answers = submission.Answers(encoded, values, {"all": np.arange(n)}, None, 1 << 30)
    return answers, [f"{i},{v!r}" for i, v in zip(ids, values.tolist())]


def parse_long(answers, rows):
    return submission.parse(table("id,a", *rows), answers, "mae", "id", ("a",), ())


def test_rows_are_matched_by_id_across_chunks(long):
    answers, rows = long
    for order in (np.arange(len(rows)), np.random.default_rng(1).permutation(len(rows))):
        assert np.array_equal(parse_long(answers, [rows[i] for i in order]), answers.truth)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda rows: rows.__setitem__(-1, rows[0]), "the same id twice"),
        (lambda rows: rows.__setitem__(-1, "éx,1"), "lacks the id é"),
        (lambda rows: rows.__setitem__(-1, "éx"), f"row {3 * submission.CHUNK + 100} of submission.csv has 1 fields"),
        (lambda rows: rows.append("éx,1"), "more than"),
        (lambda rows: rows.pop(), f"has {3 * submission.CHUNK + 99} rows"),
        (lambda rows: rows.__setitem__(-1, rows[-1] + "\0"), "NUL"),
    ],
)
def test_faults_are_found_in_the_last_chunk(long, change, reason):
    answers, rows = long
    change(rows)
    with pytest.raises(tasks.InvalidSubmission, match=reason):
        parse_long(answers, rows)


@pytest.mark.parametrize("metric, columns, cells", [
    ("mae", ("a", "b"), ["-1.7976931348623157e+308"] * 2),  # the longest number that Python writes
    ("accuracy", ("a",), ["x" * 300]),
    ("map5", ("a",), [" ".join(["w" * 40] * 5)]),
])  # fmt: skip
def test_no_full_answer_is_too_large(tmp_path, metric, columns, cells):
    n = 50_000
    truth = {c: [cell.split()[0]] * n for c, cell in zip(columns, cells)}
    pd.DataFrame({"id": range(n), "part": "eval", **truth}).to_csv(tmp_path / "a.csv", index=False)
    answers = submission.read_answers(tmp_path / "a.csv", metric, columns, (cells[0],))
    quoted = [f'"{i}",' + ",".join(f'"{cell}"' for cell in cells) + "\r" for i in range(n)]
    data = table('"id",' + ",".join(columns) + "\r", *quoted)
    assert len(data) < answers.max_bytes < 3 * len(data) + 2**21
    submission.parse(data, answers, metric, "id", columns, (cells[0],))


@pytest.mark.slow
def test_millions_of_rows_fit_into_little_memory(tmp_path):
    """All pixels of 29 scanned pages: 5,789,880 rows in any order, some hundred bytes a row at the peak."""
    n = 5_789_880
    with open(tmp_path / "answers.csv", "w") as file:
        file.write("id,part,value\n")
        file.writelines(f"{i % 29}_{i // 29}_1,{'reward' if i % 2 else 'eval'},{i / n:.4f}\n" for i in range(n))
    with open(tmp_path / "s.csv", "w") as file:
        file.write("id,value\n")
        file.writelines(f"{i % 29}_{i // 29}_1,{i / n + 0.25!r}\n" for i in reversed(range(n)))
    code = (
        "import resource, sys; from pathlib import Path; from tasks import submission; from tasks.metrics import rmse\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "import pandas; before = peak()\n"
        "answers = submission.read_answers(Path('answers.csv'), 'rmse', ('value',), ())\n"
        "data = Path('s.csv').read_bytes(); assert len(data) < answers.max_bytes\n"
        "p = submission.parse(data, answers, 'rmse', 'id', ('value',), ())\n"
        "print(before, peak(), rmse(answers.truth, p))"
    )
    # a fresh interpreter behind a shell, since a fork starts with its parent's peak
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1"', sys.executable, code], cwd=tmp_path, capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": str(tasks.ROOT.parent)},
    )  # fmt: skip
    before, peak, score = done.stdout.split()
    assert float(score) == pytest.approx(0.25, abs=1e-4)
    assert int(peak) - int(before) < 1200, done.stdout  # MB; as Python lists of strings it would be 3 GB


def test_better_gain_and_delta(toy):
    down, up = toy("mae"), toy("accuracy", classes=["1.0", "2.0", "3.0", "4.0"])
    up = dataclasses.replace(up, best_score=9.0)
    assert down.better(1, 2) and not down.better(2, 1) and not down.better(1, 1)
    assert up.better(2, 1) and not up.better(1, 2)
    for task in (down, up):
        assert task.better(5, None) and not task.better(None, 5) and not task.better(None, None)
    assert down.gain(2.5, "all") == 0.5 and down.gain(4.0, "reward") == 0
    assert down.delta(2.25) == 0.5 and up.delta(2.25) == -0.5
    assert down.scale("all") == tasks.Scale(4.5, 0.5, 0.1, True)
    assert down.scale("eval") == tasks.Scale(5.0, 0.5, 0.1 * 2**0.5, True)  # the error of half the answers


# --- prepare ---


def test_missing_or_changed_raw_files_are_named(toy, tmp_path):
    task = toy()
    with pytest.raises(tasks.TaskError, match=r"needs .*rows.csv; run: fetch toy"):
        tasks.prepare("toy", tmp_path / "nowhere")
    spec = yaml.safe_load((task.dir / "task.yaml").read_text())
    spec["source"]["files"]["rows.csv"] = "0" * 64
    (task.dir / "task.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(tasks.TaskError, match="not the file"):
        tasks.prepare("toy", tmp_path / "raw")
    assert task.is_prepared()  # what was there is still there


def zip_file(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name.replace("__", "."), text)
    return path


def test_prepare_takes_folders_and_archives(toy, tmp_path):
    task = toy()
    fingerprint, rows = task.manifest()["fingerprint"], (tmp_path / "raw" / "rows.csv").read_text()
    places = [tmp_path / "any.zip", tmp_path / "folder" / "toy.zip", tasks.DATA / "raw" / "toy.zip"]
    for place in places:
        place.parent.mkdir(exist_ok=True, parents=True)
        zip_file(place, rows__csv=rows)
    # the archive, a folder with the archive in it, and what stands where the command leaves it
    for raw in (places[0], places[1].parent, None):
        shutil.rmtree(tasks.DATA / "toy")
        assert tasks.prepare("toy", raw)["fingerprint"] == fingerprint
        assert sorted(path.name for path in tasks.DATA.iterdir()) == ["raw", "toy"]
    assert all(place.exists() for place in places)


def test_archives_inside_the_archive_stay_packed(toy, tmp_path):
    """rows.csv.zip counts as rows.csv; prepare.py gets it as it is."""
    task = toy()
    inner = zip_file(tmp_path / "inner.zip", rows__csv=(tmp_path / "raw" / "rows.csv").read_text())
    outer = zip_file(tmp_path / "outer.zip", rows__csv__zip=inner.read_bytes())
    code = (task.dir / "prepare.py").read_text().replace('raw / "rows.csv"', 'raw / "rows.csv.zip"')
    (task.dir / "prepare.py").write_text(code)
    tasks.prepare("toy", outer)
    assert task.is_prepared()


def test_archives_that_cannot_be_used_are_named_with_the_command(toy, tmp_path):
    task = toy()
    before = task.manifest()
    whole = zip_file(tmp_path / "toy.zip", rows__csv="x" * 10_000).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-100])
    (tmp_path / "page.zip").write_text("<html>accept the rules first</html>")
    zip_file(tmp_path / "evil.zip", rows__csv="", **{"../evil__txt": "here"})
    zip_file(tmp_path / "other.zip", other__csv="")
    for name, reason in [("cut", "damaged"), ("page", "damaged"), ("evil", "outside"), ("other", "needs .*rows.csv"),
                         ("nothing", "needs .*rows.csv")]:  # fmt: skip
        with pytest.raises(tasks.TaskError, match=f"^toy: .*{reason}.*; run: fetch toy$") as caught:
            tasks.prepare("toy", tmp_path / f"{name}.zip")
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    assert not list(tmp_path.rglob("evil.txt"))
    assert task.manifest() == before and [path.name for path in tasks.DATA.iterdir()] == ["toy"]


def test_answers_that_cannot_be_scored_are_refused(toy):
    with pytest.raises(tasks.TaskError, match=r"\(reward\) cannot be scored: AUC needs rows of both"):
        toy("auc", {"a": [1, 0, 1, 1]})
    with pytest.raises(tasks.TaskError, match="'2' is among the answers, but no class"):
        toy("accuracy", {"a": [1, 0, 2, 1]}, classes=[0, 1])
    with pytest.raises(tasks.TaskError, match="same id"):
        toy(answers={"id": [10, 11, 12, 12], "a": [1, 2, 3, 4]})
    with pytest.raises(tasks.TaskError, match=r"no answers \(eval\)"):
        toy(answers={"part": ["reward"] * 4, "a": [1, 2, 3, 4]})


def test_a_variant_is_a_task_of_its_own(toy, tmp_path, capsys):
    task = toy()
    (task.dir / "train.py").write_text("print('mae')")
    (task.dir / "train_rmse.py").write_text("print('rmse')")
    (task.dir / "task@other-way.yaml").write_text("metric: rmse\nstarter: train_rmse.py\nbest_score: 0.25\n")
    with open(task.dir / "prepare.py", "a") as file:
        file.write(
            "def prepare_other_way(raw, public, private):\n    prepare(raw, public, private)\n"
            "    path = private / 'answers.csv'\n    path.write_text(path.read_text().replace('4.0', '8.0'))\n"
        )
    assert tasks.variants("toy") == ["toy@other-way"] and tasks.names() == ["toy"]
    for name in ("toy", "toy@other-way"):
        tasks.prepare(name, tmp_path / "raw")
    plain, other = tasks.load("toy"), tasks.load("toy@other-way")
    assert (plain.metric, other.metric, other.name) == ("mae", "rmse", "toy@other-way")
    assert (plain.best_score, other.best_score, other.noise) == (0.5, 0.25, plain.noise)
    assert plain.sources() == {"train.py": "print('mae')"} and other.sources() == {"train.py": "print('rmse')"}
    assert plain.score(table("id,a", *GOOD)) == 0.5 and other.score(table("id,a", *GOOD)) == 1
    assert main(["list"]) == 0 and "toy@other-way" in capsys.readouterr().out
    with pytest.raises(tasks.TaskError, match="there are: toy, toy@other-way"):
        tasks.load("toy@third")


def change(task, **keys):
    """The task with other values in its task.yaml."""
    spec = yaml.safe_load((task.dir / "task.yaml").read_text())
    (task.dir / "task.yaml").write_text(yaml.safe_dump(spec | keys))
    return tasks.load(task.name)


def test_absent_packages_are_named(toy, tmp_path):
    task = change(toy(), requires={"yaml": "pyyaml", "no_such_module": "no-such-package"})
    for step in (lambda: tasks.prepare("toy", tmp_path / "raw"), task.require_prepared):
        with pytest.raises(tasks.TaskError, match=r"^toy needs more packages; run: pip install no-such-package$"):
            step()
    assert task.score(table("id,a", *GOOD)) == 0.5  # scoring needs none of them


def test_a_task_without_an_initial_score(toy, tmp_path, capsys):
    task = change(toy(), initial_score=None, initial_source=None)
    for step in (task.require_prepared, task.scale, lambda: task.gain(1.0), lambda: task.delta(1.0)):
        with pytest.raises(tasks.TaskError, match=r"^toy is not measured; run: python -m tasks measure toy --write$"):
            step()
    assert task.score(table("id,a", *GOOD)) == 0.5
    (tmp_path / "s.csv").write_bytes(table("id,a", *GOOD))
    assert main(["score", "toy", str(tmp_path / "s.csv")]) == 0
    assert "gain" not in capsys.readouterr().out
    assert main(["list"]) == 0 and "measure toy --write" in capsys.readouterr().out


def test_a_best_score_that_is_not_better_has_no_scale(toy):
    with pytest.raises(tasks.TaskError, match="must beat the initial one"):
        change(toy(), best_score=4.5).scale("all")


def test_measuring_a_task_whose_ideas_are_texts(toy):
    """Only the starter can be run: initial score and noise are ours then, the best score is not."""
    task = change(toy(), initial_score=None, initial_source=None)
    (task.dir / "ideas.yaml").write_text("ideas:\n- {axis: data, text: think}\n")
    body = "id,a\\n10,1\\n11,2\\n12,3\\n13,6\\n"
    (task.dir / "train.py").write_text(f'open("submission.csv", "w").write("{body}")\nprint("validation mae: 1")\n')

    class Pool:  # the sandbox has tests of its own
        def submit(self, argv, workspace, limits, read_only, hidden, gpus):
            granted.append(gpus)
            assert read_only == ((task.public, "data"),) and hidden == (task.private,)
            subprocess.run([sys.executable, *argv[1:]], cwd=workspace, check=True)
            future = Future()
            future.set_result(sandbox.Result("ok", 0, "validation mae: 1\n", "", 1.0, 1.0, 1.0, "ns"))
            return future

    granted = []
    found = measure.measure("toy", Pool(), log=lambda *_: None, gpus=(3,))
    measure.write("toy", found)
    task = tasks.load("toy")
    assert task.initial_score == {"reward": 0, "eval": 1, "all": 0.5} and task.initial_source == "measured"
    assert (task.best_score, task.best_source) == (0.5, "")
    assert task.noise == pytest.approx(1 * np.sqrt(3) / 4, rel=0.15)  # of the mean of {0, 0, 0, 2}
    assert measure.check(task, Pool(), (1, 2)) is None and granted == [(3,), (1, 2)]
    wrong = change(task, initial_score={"reward": 0, "eval": 3, "all": 0.5})
    assert measure.check(wrong, Pool()) == "the starter scores 1 on eval, not 3"
    assert measure.check(change(wrong, initial_source="the paper"), Pool()) is None


def test_ideas_without_code_say_that_they_need_a_writer(toy):
    task = toy()
    (task.dir / "ideas.yaml").write_text("ideas:\n- {axis: data, text: think}\n- {axis: model, text: x, code: y = 1}\n")
    text, edit = task.ideas()
    assert (text.code, text.block) == (None, None) and (edit.code, edit.block) == ("y = 1", "model")
    with pytest.raises(tasks.TaskError, match="only an LLM expert"):
        tasks.apply_block(SCRIPT, text.block, text.code)


def test_a_failed_prepare_leaves_nothing_and_a_repeated_one_replaces(toy, tmp_path):
    task = toy()
    before = task.manifest()["fingerprint"]
    code = (task.dir / "prepare.py").read_text()
    (task.dir / "prepare.py").write_text(code + "    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        tasks.prepare("toy", tmp_path / "raw")
    assert task.manifest()["fingerprint"] == before
    (task.public / "leftover").write_text("")
    (task.dir / "prepare.py").write_text(code)
    tasks.prepare("toy", tmp_path / "raw")
    assert not (task.public / "leftover").exists()
    assert [path.name for path in tasks.DATA.iterdir()] == ["toy"]


def test_what_is_up_to_date_is_not_prepared_anew_under_a_running_job(toy, tmp_path, capsys):
    task = toy()
    shutil.move(tmp_path / "raw", tasks.DATA / "raw" / "toy")
    inode = task.public.stat().st_ino
    assert main(["prepare", "toy"]) == 0 and task.public.stat().st_ino == inode and capsys.readouterr().out == ""
    assert main(["prepare", "toy", "--again"]) == 0 and task.public.stat().st_ino != inode
    with open(task.dir / "prepare.py", "a") as file:
        file.write("# a new recipe\n")
    inode = task.public.stat().st_ino
    assert main(["prepare", "toy"]) == 0 and task.public.stat().st_ino != inode


def test_data_from_other_packages_are_out_of_date(toy, tmp_path):
    micro, paper = dataclasses.replace(toy(), suite="micro"), toy()
    before = tasks._recipe(micro), tasks._recipe(paper)
    (tmp_path / "requirements-data.txt").write_text("a-package==2\n")
    assert tasks._recipe(micro) != before[0] and tasks._recipe(paper) == before[1]


def test_unprepared_or_stale_data_say_what_to_run(toy):
    task = toy()
    with open(task.dir / "prepare.py", "a") as file:
        file.write("# a new recipe\n")
    for what in ("out of date", "missing"):
        with pytest.raises(tasks.TaskError, match=f"{what}; run: python -m tasks prepare toy"):
            task.score(table("id,a", *GOOD))
        (tasks.DATA / "toy" / "manifest.json").unlink(missing_ok=True)


def test_answers_are_read_anew_after_a_new_prepare(toy):
    submission = table("id,a", *GOOD)
    assert toy().score(submission) == 0.5
    assert toy(answers={"a": [1.0, 2.0, 3.0, 6.0]}).score(submission) == 0


def test_command_line(toy, tmp_path, capsys):
    toy()
    assert main(["list"]) == 0 and "toy" in capsys.readouterr().out
    (tmp_path / "s.csv").write_bytes(table("id,a", *GOOD))
    assert main(["score", "toy", str(tmp_path / "s.csv")]) == 0
    assert "all     mae 0.50000   gain 1.000" in capsys.readouterr().out
    (tmp_path / "s.csv").write_bytes(b"")
    for argv in (["score", "toy", str(tmp_path / "s.csv")], ["prepare", "tiy"],
                 ["prepare", "toy", "--raw", "nowhere"], ["score", "toy", "no.csv"]):  # fmt: skip
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_malformed_task_files_are_named(toy):
    task = toy()
    text = (task.dir / "task.yaml").read_text()
    for wrong, message in [
        (text + "colour: red\n", "unknown key 'colour'"),
        (text.replace("noise: 0.1\n", ""), "missing key 'noise'"),
        (text.replace("metric: mae", "metric: mea"), "no metric is called 'mea'"),
        (text + "a: b: c\n", "not valid YAML"),
    ]:
        (task.dir / "task.yaml").write_text(wrong)
        with pytest.raises(tasks.TaskError, match=message):
            tasks.load("toy")
    (task.dir / "task.yaml").write_text(text)
    with pytest.raises(tasks.TaskError, match="there are: toy"):
        tasks.load("../toy")


# --- how data are split ---


def test_split_rows_partitions_and_stratifies():
    strata = np.repeat([0, 1, 2], [70, 20, 10])
    train, test = build.split_rows(100, 30, seed=0, strata=strata)
    assert sorted([*train, *test]) == list(range(100))
    assert all(abs(a - b) <= 1 for a, b in zip(np.bincount(strata[test]), [21, 6, 3]))
    assert list(test) != sorted(test)
    again = build.split_rows(100, 30, seed=0, strata=strata)
    assert (train == again[0]).all() and (test == again[1]).all()
    assert (build.split_rows(100, 30, seed=1)[1] != test).any()


def test_halves_have_the_same_answers():
    """Means of the two halves differ by 2 / sqrt(n) = 0.115 when rows are parted by chance alone."""
    target = np.random.default_rng(0).normal(size=301)
    gaps = []
    for seed in range(20):
        part = build.halves(target, seed)
        assert set(part) == {"reward", "eval"} and abs((part == "reward").sum() - 150.5) <= 1
        gaps.append(target[part == "reward"].mean() - target[part == "eval"].mean())
    assert np.std(gaps) < 0.03


@pytest.mark.parametrize("n, share, test", [(17_307, 0.1, 1_731), (36_473, 0.1, 3_648), (1_604, 0.2, 321)])
def test_random_split_is_that_of_the_benchmark(n, share, test):
    from sklearn.model_selection import train_test_split

    ours = split.random(n, share)
    for mine, theirs in zip(ours, train_test_split(np.arange(n), test_size=share, random_state=0)):
        assert np.array_equal(mine, theirs)
    assert len(ours[1]) == test


def test_head_split():
    train, test = split.head(1_460, 0.8)
    assert (train == np.arange(1_168)).all() and (test == np.arange(1_168, 1_460)).all()


def test_written_answers_keep_groups_together(tmp_path):
    rng = np.random.default_rng(0)
    page = np.repeat(rng.permutation(20), 5)
    level = page / 10  # of each page
    split.write_answers(tmp_path, range(100), {"v": rng.random(100)}, key=level, group=page)
    table = pd.read_csv(tmp_path / "answers.csv")
    assert list(table.columns) == ["id", "part", "group", "v"] and (table["group"] == page).all()
    parts = table.groupby("group")["part"].unique()
    assert all(len(part) == 1 for part in parts)
    halves = [part[0] for part in parts]
    assert all({a, b} == {"reward", "eval"} for a, b in zip(halves[::2], halves[1::2]))  # neighbours by key
    split.write_answers(tmp_path, range(100), {"v": page})
    assert list(pd.read_csv(tmp_path / "answers.csv").columns) == ["id", "part", "v"]


# --- the data of every task ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All micro tasks, prepared twice; a folder for each time."""
    packages = tasks.DATA / "packages"
    if not packages.exists():
        command = tasks.load("m-ames").source["command"]
        pytest.skip(f"the data packages are missing; run: {command}")
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    patch = pytest.MonkeyPatch()
    for folder in folders:
        patch.setattr(tasks, "DATA", folder)
        for name in MICRO:
            tasks.prepare(name, packages)
    yield folders
    patch.undo()


def public_tables(folder, name):
    public = folder / name / "public"
    return pd.read_csv(public / "train.csv"), pd.read_csv(public / "test.csv")


def test_prepare_is_deterministic(prepared):
    for name in MICRO:
        one, two = (json.loads((f / name / "manifest.json").read_text()) for f in prepared)
        assert one == two


def test_answers_are_in_no_public_file(prepared):
    for name in MICRO:
        task = tasks.load(name)
        train, test = public_tables(prepared[0], name)
        answers = pd.read_csv(prepared[0] / name / "private" / "answers.csv")
        assert not {"part", "group", "label", *task.columns} & set(test.columns)
        assert set(train.columns) - set(test.columns) == {answers.columns[-1]} - {"label"} or (
            answers.columns[-1] == "label" and len(set(train.columns) - set(test.columns)) == 1
        )
        assert list(answers["id"]) == list(test["id"]) == list(range(len(test)))
        truth = pd.factorize(answers.iloc[:, -1])[0]
        for column in test.columns.drop("id"):
            # a column with repeated values that fix the answer, or that the answer fixes, tells it
            values = pd.factorize(test[column])[0]
            distinct, classes = len(set(values)), len(set(truth))
            if 1 < distinct < len(test) / 5 and classes < len(test) / 5:
                assert len(set(zip(values, truth))) > max(distinct, classes), (name, column)


def test_ids_and_row_order_say_nothing(prepared):
    for name in MICRO:
        if name in ("m-ridership", "h-demand", "h-docs"):  # in the order of time or of pixels
            continue
        answers = pd.read_csv(prepared[0] / name / "private" / "answers.csv")
        truth = pd.factorize(answers.iloc[:, -1], sort=True)[0].astype(float)
        n = len(truth)
        assert abs(np.corrcoef(truth, answers["id"])[0, 1]) < 4 / np.sqrt(n), name
        assert abs(np.corrcoef(truth[1:], truth[:-1])[0, 1]) < 4 / np.sqrt(n), name


def test_halves_partition_the_ids(prepared):
    for name in MICRO:
        answers = pd.read_csv(prepared[0] / name / "private" / "answers.csv")
        assert answers["id"].is_unique
        share = answers["part"].value_counts(normalize=True)
        assert set(share.index) == {"reward", "eval"} and share.min() > 0.45, (name, share)
        if "group" in answers:  # pages and days are not torn apart
            assert answers.groupby("group")["part"].nunique().max() == 1


def test_no_test_row_is_in_the_training_data(prepared):
    for name in MICRO:
        public = prepared[0] / name / "public"
        if (public / "train_images.npy").exists():
            train, test = (
                {image.tobytes() for image in np.load(public / f"{part}_images.npy")} for part in ("train", "test")
            )
            assert not train & test, name
        else:
            train, test = public_tables(prepared[0], name)
            columns = test.columns.drop("id")
            seen = set(map(tuple, train[columns].astype(str).to_numpy()))
            copies = sum(tuple(row) in seen for row in test[columns].astype(str).to_numpy())
            assert copies <= 0.02 * len(test), (name, copies)


def test_the_digits_of_the_two_tasks_differ(prepared):
    sets = []
    for name in ("m-digits", "m-mnist"):
        public = prepared[0] / name / "public"
        images = np.concatenate([np.load(public / f"{p}_images.npy") for p in ("train", "test")])
        if images.shape[1] == 28:
            images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).round().astype("uint8")
        sets.append({image.tobytes() for image in images})
    assert len(sets[0]) == 1800 and len(sets[1]) == 3200 and not sets[0] & sets[1]


def test_the_right_answers_score_best(prepared, monkeypatch):
    monkeypatch.setattr(tasks, "DATA", prepared[0])
    for name in MICRO:
        task = tasks.load(name)
        with open(task.private / "answers.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([task.id_column, *task.columns])
        for row in rows:
            if "label" in row:
                cells = [float(row["label"] == c) for c in task.columns]
            else:
                cells = [row[c] for c in task.columns]
            writer.writerow([row["id"], *cells])
        for part in tasks.PARTS:
            score = task.score(text.getvalue().encode(), part)
            assert score == pytest.approx(0 if task.lower_is_better else 1), name


# --- the helper of the scripts ---


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """helper(info) -> the namespace of helper.py, run in a folder with that data/info.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def make(**info):
        defaults = {"metric": "accuracy", "target": "y", "classes": None, "range": None,
                    "rows": 100, "ordered": False, "nodes": None}  # fmt: skip
        (tmp_path / "data" / "info.json").write_text(json.dumps(defaults | info))
        namespace = {"__name__": "helper"}
        exec((tasks.ROOT / "helper.py").read_text(), namespace)
        return namespace

    return make


def test_helper_scores_like_the_scorer(helper):
    rng = np.random.default_rng(0)
    binary, p = rng.integers(0, 2, 50), rng.uniform(0.01, 0.99, 50)
    many = rng.integers(0, 4, 50)
    shares = rng.dirichlet(np.ones(4), 50)
    values = rng.lognormal(size=(2, 50))
    scores = helper(classes=[0, 1, 2, 3])["SCORES"]
    used = {tasks.load(name).metric for name in MICRO}
    assert used <= set(scores)
    for name, function in scores.items():
        data = {"label": (many, rng.integers(0, 4, 50)), "probability": (binary, p),
                "distribution": (many, shares), "whole": (many, rng.integers(0, 5, 50)),
                "value": values, "above -1": values}[tasks.METRICS[name].takes]  # fmt: skip
        assert function(*data) == pytest.approx(tasks.METRICS[name].function(*data)), name


def test_validation_holds_out_copies_with_their_originals(helper, capsys):
    """Labels are random, so only a copy of a held-out row in the training rows can give them away."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100, 5)), rng.integers(0, 2, 100)
    X, y = np.concatenate([X, X + 1e-3, X - 1e-3]), np.tile(y, 3)
    helper()["validate"](KNeighborsClassifier(1), X, y)
    word, metric, score = capsys.readouterr().out.split()
    assert (word, metric) == ("validation", "accuracy") and 0.2 < float(score) < 0.8
    helper(rows=300)["validate"](KNeighborsClassifier(1), X, y)  # what a plain split would say
    assert float(capsys.readouterr().out.split()[-1]) > 0.9


def test_validation_of_ordered_rows_takes_the_last_ones(helper, capsys):
    class Recorder:
        def fit(self, X, y):
            assert list(X[:, 0]) == list(range(75))
            return self

        def predict(self, X):
            assert list(X[:, 0]) == list(range(75, 100))
            return np.zeros(len(X))

    X = np.arange(100)[:, None]
    helper(ordered=True, metric="mae")["validate"](Recorder(), X, np.ones(100))
    assert capsys.readouterr().out == "validation mae 1.0000\n"


def test_tune_sets_what_a_model_has(helper):
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    tune = helper()["tune"]
    model = tune(make_pipeline(StandardScaler(), MLPClassifier()), max_iter=7, n_estimators=3)
    assert model[-1].max_iter == 7
    # for a support vector machine, max_iter cuts the solver off
    assert tune(SVC(), max_iter=7, C=3).get_params()["max_iter"] == -1
    assert tune(make_pipeline(SVC()), max_iter=7, C=3)[-1].get_params()["C"] == 3


def test_submission_names_every_class_even_if_the_model_saw_fewer(helper, tmp_path):
    from sklearn.naive_bayes import GaussianNB

    submit = helper(metric="multi_log_loss", classes=["a", "b", "c"])["submit"]
    pd.DataFrame({"id": [0, 1]}).to_csv("data/test.csv", index=False)
    X = np.array([[0.0], [0.1], [5.0], [5.1]])
    submit(GaussianNB(), X, np.array(["c", "c", "a", "a"]), X[1:3])
    table = pd.read_csv("submission.csv")
    assert list(table.columns) == ["id", "a", "b", "c"]
    assert table["b"].sum() == 0 and table["c"][0] > 0.99 and table["a"][1] > 0.99


def test_starter_runs_in_a_fresh_process(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "DATA", prepared[0])
    task = tasks.load("m-concrete")
    for name, text in (task.sources() | task.helpers()).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data").symlink_to(task.public)
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("validation rmsle 0.")
    submission = (tmp_path / "submission.csv").read_bytes()
    for part in tasks.PARTS:
        assert task.score(submission, part) == pytest.approx(task.initial_score[part], rel=1e-3)
