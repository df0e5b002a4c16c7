"""What a sandboxed run costs, cold and warm, and what the warm start is worth.

    python benchmarks/bench_sandbox.py [--seconds 20]

Prints, for each tier that this machine gives: milliseconds over a bare `subprocess.run` of the same empty script
(aims: cold <= 40, warm <= 20), empty runs per second with all cores, and experiments per minute of a micro task's
starter script, cold and warm (aim: three times as many). A bare run is timed beside every sandboxed one, so that
a busy machine slows both; the quartile is of the pairs' differences.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sandbox
import tasks

TASK = "m-concrete"
# The same work where the micro tasks are not prepared.
STAND_IN = """
import numpy as np, pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.pipeline import make_pipeline
X = np.random.default_rng(0).normal(size=(600, 10))
model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, X[:, 0] > 0)
pd.DataFrame({"y": model.predict(X)}).to_csv("submission.csv")
"""


def pairs(one, other, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of `one` and `other`, called in turn."""
    times = [], []
    one(), other()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < 5:
        for function, record in zip((one, other), times):
            began = time.perf_counter()
            function()
            record.append(time.perf_counter() - began)
    return times


def over(bare: list[float], boxed: list[float]) -> str:
    low, middle, high = (1e3 * q for q in statistics.quantiles([b - a for a, b in zip(bare, boxed)], n=4))
    floor = 1e3 * (min(boxed) - min(bare))
    return f"{middle:6.1f} ms   quartiles {low:.1f} to {high:.1f}, between the fastest {floor:.1f}, n = {len(bare)}"


def rate(submit, count: int) -> float:
    """Runs per second of `submit(i) -> future or result` over `count` runs, all cores busy."""
    began = time.perf_counter()
    results = [future.result() for future in [submit(i) for i in range(count)]]
    assert all(r.reason == "ok" for r in results), next(r for r in results if r.reason != "ok")
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each tier, about")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    task = tasks.load(TASK)
    files = {"train.py": STAND_IN}
    kwargs = {}
    if task.is_prepared():
        files = {**task.sources(), **task.helpers()}
        kwargs = {"read_only": [(task.public, "data")], "limits": sandbox.Limits(**task.limits)}
    python = f"Python {sys.version.split()[0]}"
    print(f"{os.uname().sysname} {os.uname().release}, {cores} cores, load {os.getloadavg()[0]:.1f}, {python}")
    empty, boxes = sandbox.new_workspace(), [sandbox.new_workspace() for _ in range(2 * cores)]
    (empty / "train.py").write_text("")
    for box in boxes:
        for name, text in files.items():
            (box / name).write_text(text)

    command, share = ["python", "train.py"], args.seconds / 8
    environment = sandbox._environment("bare", "/tmp", 1, (), True)

    def bare():
        subprocess.run([sys.executable, "train.py"], cwd=empty, env=environment, check=True, capture_output=True)

    for tier in ("ns", "landlock", "bare"):
        if not sandbox.probe(tier).usable:
            print(f"\n{tier}: {sandbox.probe(tier).why}")
            continue
        how = {"tier": tier, "allow_weak": True}
        pool = sandbox.Pool(cores, preload=tasks.PRELOAD, **how)
        with ThreadPoolExecutor(cores) as threads, pool, sandbox.Pool(cores, **how) as light:
            print(f"\n{tier}, over a bare subprocess.run of an empty script")
            print("  cold", over(*pairs(bare, lambda: sandbox.run(command, empty, **how), 2 * share)))
            print("  warm", over(*pairs(bare, lambda: light.submit(command, empty).result(), share)), "(no imports)")
            print("  warm", over(*pairs(bare, lambda: pool.submit(command, empty).result(), share)), "(tasks' imports)")
            count = int(8 * cores * share) + cores
            cold = rate(lambda i: threads.submit(sandbox.run, command, empty_of(i), **how), count)
            warm = rate(lambda i: pool.submit(command, empty_of(i)), count)
            print(f"  empty runs a second, {cores} cores: {cold:.0f} cold, {warm:.0f} warm")
            name = TASK if task.is_prepared() else "a stand-in"
            cold = 60 * rate(
                lambda i: threads.submit(sandbox.run, command, boxes[i % len(boxes)], **how, **kwargs), 2 * cores
            )
            warm = 60 * rate(lambda i: pool.submit(command, boxes[i % len(boxes)], **kwargs), 20 * cores)
            print(f"  experiments a minute ({name}): {cold:.0f} cold, {warm:.0f} warm: {warm / cold:.1f} times as many")
    for box in (empty, *boxes, *empties.values()):
        sandbox.remove(box)


empties: dict[int, Path] = {}


def empty_of(i: int) -> Path:
    """A few workspaces, so that parallel runs do not share one."""
    box = empties.get(i % 64) or empties.setdefault(i % 64, sandbox.new_workspace())
    (box / "train.py").write_text("")
    return box


if __name__ == "__main__":
    main()
