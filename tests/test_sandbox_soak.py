"""Hundreds of mixed runs, with trainers and monitors killed at random: nothing may be left of any of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sandbox
import sandbox_kit as kit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# What the scripts do; all of it ends, or is ended, within a second.
SCRIPTS = [
    "print('ok')",
    "open('out', 'w').write('x' * 100000)",
    "raise SystemExit(3)",
    "import os; os.kill(os.getpid(), 11)",
    "import time; time.sleep(30)",
    "while True: pass",
    "x = []\nwhile True: x.append(bytearray(8 << 20))",
    "while True: print('x' * 1000)",
    "for i in range(40): open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20)) if os.path.exists('/box') else 0",
    "import os\nfor _ in range(40):\n    if os.fork() == 0: os.setsid(); import time; time.sleep(30)",
    "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\n        time.sleep(30)\n    os._exit(0)\ntime.sleep(.1)",
    "import multiprocessing as m\nif os.path.exists('/box'): a, b = m.Lock(), m.Queue()\nimport time; time.sleep(.3)",
    "import os\nos.makedirs('d/' * 30); os.mkfifo('fifo'); os.symlink('/', 'link'); os.chmod('d', 0)",
]

TRAINER = """
import json, os, random, sys, threading
sys.path.insert(0, {root!r})
import sandbox
tier, seed, count, scripts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
rng = random.Random(seed)
sandbox.choose_tier(tier, allow_weak=True)
sandbox.remove(sandbox.new_workspace())
def fds(): return len(os.listdir("/proc/self/fd"))
before = fds(), threading.active_count()
limits = sandbox.Limits(wall_s=.7, memory_mb=150, disk_mb=16, processes=16, output_kb=4)
with sandbox.Pool(3, tier=tier, allow_weak=True) as pool:
    waiting = []
    for i in range(count):
        box = sandbox.new_workspace()
        (box / "train.py").write_text("import os\\n" + rng.choice(scripts))
        env = {{"COLD": "1"}} if rng.random() < .3 else None
        waiting.append((pool.submit(["python", "train.py"], box, limits=limits, env=env), box))
    for future, box in waiting:
        print(json.dumps([future.result().reason, future.result().stderr[-100:]]), flush=True)
        sandbox.remove(box)
print(json.dumps({{"leaked": [a - b for a, b in zip((fds(), threading.active_count()), before)]}}), flush=True)
"""


def processes_below(base: str) -> list[int]:
    """Monitors, servers and all their forks have the directory of workspaces in their command line; scripts that
    were started cold have it, or the box, as their working directory."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "cmdline").read_text().replace("\0", " ") + os.readlink(f"{entry.path}/cwd")
                state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if base in text and state != "Z":
                found.append(int(entry.name))
    return found


def soak(tier: str, total: int, seed: int, base: Path) -> dict:
    """Run trainers until `total` runs have been started; a third of them are killed. -> counts of reasons"""
    rng, reasons, started = random.Random(seed), {}, 0
    base.mkdir()
    while started < total:
        count = rng.randrange(10, 30)
        started += count
        command = [sys.executable, "-c", TRAINER.format(root=str(kit.ROOT)), tier, str(rng.random())[2:9], str(count)]
        trainer = subprocess.Popen(
            [*command, json.dumps(SCRIPTS)], env={"TMPDIR": str(base)}, stdout=subprocess.PIPE, text=True
        )
        fate = rng.choice(["lives", "is killed", "loses monitors"])
        if fate != "lives":
            time.sleep(rng.uniform(0.5, 2.0))
            for _ in range(3):
                below = kit.descendants(trainer.pid)
                monitors = [p for p in below if is_monitor(p, trainer.pid)]
                if monitors and (fate == "loses monitors" or rng.random() < 0.5):
                    victim = rng.choice(monitors)
                    try:
                        os.kill(victim, signal.SIGKILL)
                        reasons["monitors killed"] = reasons.get("monitors killed", 0) + 1
                    except ProcessLookupError:
                        pass
                time.sleep(rng.uniform(0, 0.3))
            if fate == "is killed":
                trainer.kill()
                reasons["trainers killed"] = reasons.get("trainers killed", 0) + 1
        output, _ = trainer.communicate(timeout=120)
        lines = output.splitlines()
        for line in lines:
            row = json.loads(line) if line.endswith(("]", "}")) else None  # killed in the middle of a line
            if isinstance(row, dict):
                assert max(row["leaked"]) <= 0, "descriptors or threads of the trainer"
            elif row:
                reasons[row[0]] = reasons.get(row[0], 0) + 1
                assert row[0] != "setup_error", row
                assert row[0] != "internal" or fate != "lives", row
        if fate != "is killed":
            assert trainer.returncode == 0 and lines[-1].startswith("{")
    return reasons


def is_monitor(pid: int, trainer: int) -> bool:
    """A child of the trainer or of its server that is not the server: so not an init, nor a script."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        text = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return "monitor.main" in text and (
        (parent == trainer and "\0server\0" not in text) or (above == trainer and "\0server\0" in text)
    )


def shmem_mb() -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("tier", ["ns", "landlock", "bare"])
@pytest.mark.parametrize("total", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_is_left(tier, total, tmp_path):
    if not sandbox.probe(tier).usable:
        pytest.skip(sandbox.probe(tier).why)
    base = tmp_path / "base"
    before = Path("/proc/mounts").read_text(), set(os.listdir("/dev/shm")), shmem_mb()
    reasons = soak(tier, total, seed=total, base=base)
    print(tier, reasons)
    assert kit.settles(lambda: not processes_below(str(base)), 6), processes_below(str(base))
    subprocess.run(  # the next trainer
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(kit.ROOT)!r}); import sandbox; sandbox.sweep()"],
        env={"TMPDIR": str(base)}, check=True,
    )  # fmt: skip
    assert [list(p.iterdir()) for p in base.iterdir()] == [[]]
    assert Path("/proc/mounts").read_text() == before[0]
    assert not {name for name in set(os.listdir("/dev/shm")) - before[1] if not name.startswith("victim-")}
    assert kit.settles(lambda: shmem_mb() < before[2] + 100)
    assert reasons["ok"] and reasons["wall"] and reasons["memory"] and len(reasons) >= 6
