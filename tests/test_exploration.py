"""benchmarks/exploration.py, whole: two collections, two fine-tuned agents, one report; and again, where nothing is left to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tasks

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tasks.load("m-concrete").is_prepared(), reason="run `make data` first"),
]


def test_data_and_agents_with_ideas_and_without_side_by_side(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/exploration.py"), "--config", str(ROOT / "configs/tiny.yaml")]
    command += ["--collect", "trajectories=16", "renamed_copies=0", "tasks=[m-concrete]"]
    command += ["--sft", "max_updates=60", "--diversity", "samples=20"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = json.loads((tmp_path / "runs/tiny-exploration.json").read_text())
    sources = ["with/data/trajectories.jsonl", "without/data/trajectories.jsonl", "with/sft", "without/sft"]
    assert [row["source"] for row in rows] == [f"runs/tiny-{source}" for source in sources]
    data_with, data_without = rows[:2]
    assert data_with["ideas"] > data_without["ideas"] and data_with["changes"] > data_without["changes"]
    written = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*/*.jsonl")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "finished already" in again.stdout
    assert {path: path.read_bytes() for path in written} == written
    assert json.loads((tmp_path / "runs/tiny-exploration.json").read_text()) == rows
    broken = subprocess.run([*command[:4], "--collect", "nonsense=1"], cwd=tmp_path, capture_output=True, text=True)
    assert broken.returncode == 2, "the code of the script that failed"
