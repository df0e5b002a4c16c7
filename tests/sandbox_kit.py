"""What the sandbox tests share: a trainer for every tier of this machine, and a victim for the attacks.

A trainer is a process (this file as a program) that calls sandbox.run for the tests: as root or as a normal
user, with this interpreter or the system's. So each tier is tried as it would be used.
"""

import base64
import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHER_UID = 65533
# name: (tier, user, interpreter, highest Landlock ABI)
TRAINERS = {
    "ns": ("ns", None, "this", 6),
    "ns-user": ("ns", OTHER_UID, "system", 0),  # without the second wall
    "landlock": ("landlock", None, "this", 6),
    "landlock-own-uid": ("landlock", None, "system", 6),  # root, and an interpreter that everybody can reach
    "landlock-user": ("landlock", OTHER_UID, "system", 6),
    "landlock-weak": ("landlock", None, "this", 3),
    "bare": ("bare", None, "this", 6),
}
STRONG = ("ns", "ns-user")
LANDLOCK = ("landlock", "landlock-own-uid", "landlock-user")


def reachable(path: str) -> bool:
    """Whether any user can walk to a file."""
    return all(os.stat(p).st_mode & stat.S_IXOTH for p in Path(os.path.realpath(path)).parents)


def system_python() -> str | None:
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(python) and reachable(python) and reachable(sys.prefix if python == sys.executable else "/"):
            version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"],
                                     capture_output=True, text=True)  # fmt: skip
            if version.stdout.strip() == "True":
                return python
    return None


class Trainer:
    """A process that runs scripts in one tier. `why_not`: the reason to skip, or None."""

    def __init__(self, name: str):
        self.name = name
        self.tier, self.uid, python, abi = TRAINERS[name]
        self.why_not = self.process = None
        python = sys.executable if python == "this" else system_python()
        if self.uid is not None and os.geteuid() != 0:
            self.why_not = "only root can try another user"
        elif name == "landlock-own-uid" and os.geteuid() != 0:
            self.why_not = "only root can give a script a user of its own"
        elif python is None or not reachable(str(ROOT)):
            self.why_not = "no Python 3.11 that another user could reach"
        if self.why_not:
            return
        self.home = tempfile.mkdtemp(prefix="sandbox-test-")
        os.chmod(self.home, 0o755)
        if self.uid is not None:
            os.chown(self.home, self.uid, self.uid)
        self.process = subprocess.Popen(
            [python, "-E", "-s", __file__, self.tier, str(abi)], cwd="/", text=True, user=self.uid, group=self.uid,
            extra_groups=[] if self.uid else None, env={"TMPDIR": self.home, "API_KEY": "hunter2"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.python = python
        self.why_not = json.loads(self.process.stdout.readline())["why_not"]

    def run(self, code: str, *args, files=None, keep=(), wait=True, **kwargs):
        """Run `code` in a fresh workspace. -> a Result with .files {name: bytes} of `keep` and .names."""
        request = {"code": code, "args": [str(a) for a in args], "files": files or {}, "keep": list(keep), **kwargs}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer() if wait else None

    def answer(self):
        line = self.process.stdout.readline()
        assert line, "the trainer died"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        answer["files"] = {k: base64.b64decode(v) for k, v in answer["files"].items()}
        result = dataclasses.make_dataclass("Answer", list(answer))(**answer)
        assert result.tier == self.tier
        return result

    def close(self):
        if self.process:
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            shutil.rmtree(self.home, ignore_errors=True)


def as_trainer(tier: str, abi: int) -> None:
    """The program: one request a line on stdin, one answer a line on stdout."""
    sys.path.insert(0, str(ROOT))
    import sandbox

    sandbox.MAX_ABI = abi
    try:
        sandbox.choose_tier(tier, allow_weak=True)
        why_not = None
    except sandbox.SandboxError as error:
        why_not = str(error)
    print(json.dumps({"why_not": why_not}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        workspace = sandbox.new_workspace()
        try:
            for name, text in {"train.py": request["code"], **request["files"]}.items():
                (workspace / name).parent.mkdir(parents=True, exist_ok=True)
                (workspace / name).write_text(text)
            result = sandbox.run(
                ["python", "train.py", *request["args"]], workspace, tier=tier, allow_weak=True,
                limits=sandbox.Limits(**request.get("limits", {})), read_only=request.get("read_only", ()),
                hidden=request.get("hidden", ()),
            )  # fmt: skip
            answer = dataclasses.asdict(result) | {"names": sorted(os.listdir(workspace)), "files": {}, "refused": {}}
            for name in request["keep"]:
                try:
                    data = sandbox.safe_read(workspace, name, 1 << 20)
                    answer["files"][name] = base64.b64encode(data).decode()
                except sandbox.SubmissionError as error:
                    answer["refused"][name] = error.reason
        except Exception as error:
            answer = {"error": repr(error)}
        finally:
            sandbox.remove(workspace)
        print(json.dumps(answer), flush=True)


VICTIM = r"""
import json, os, signal, socket, sys, threading, time
home, token = sys.argv[1], sys.stdin.readline().strip()
os.environ["VICTIM_TOKEN"] = token
memory = bytearray(token.encode() * 4)
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, _: signals.append(n))
tcp = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0victim-" + str(os.getpid()))
pathname = socket.socket(socket.AF_UNIX)
pathname.bind(home + "/open/socket")
os.chmod(home + "/open/socket", 0o777)
def serve(listener):
    while True:
        listener.accept()[0].sendall(token.encode())
def datagrams():
    while True:
        udp.sendto(token.encode(), udp.recvfrom(64)[1])
for listener in (abstract, pathname):
    listener.listen()
for listener in (tcp, abstract, pathname):
    threading.Thread(target=serve, args=[listener], daemon=True).start()
threading.Thread(target=datagrams, daemon=True).start()
shm = "/dev/shm/victim-" + str(os.getpid())
with open(os.open(shm, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
    file.write(token)
print(json.dumps({"pid": os.getpid(), "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1],
                  "abstract": "victim-" + str(os.getpid()), "shm": shm}), flush=True)
for line in sys.stdin:
    print(json.dumps(signals), flush=True)
os.unlink(shm)
os._exit(0)
"""


class Victim:
    """A process of the trainer's user with a secret in its memory, environment and files, and open ports.

    .aims is what an attack script gets to know; .token is what it is after. home/: private/ (0700) with
    answers.csv, dataset/ (given read-only), open/ (0777).
    """

    def __init__(self, uid: int | None):
        self.token = "T" + os.urandom(12).hex()
        self.home = Path(tempfile.mkdtemp(prefix="sandbox-victim-"))
        self.home.chmod(0o755)
        for name in ("private", "dataset", "open"):
            (self.home / name).mkdir()
        (self.home / "private/answers.csv").write_text(self.token)
        (self.home / "dataset/train.csv").write_text("id,x,y\n1,2,3\n")
        (self.home / "private").chmod(0o755)  # as careless as it gets: only the sandbox protects it
        (self.home / "open").chmod(0o777)
        if uid is not None:
            for path in [self.home, *self.home.rglob("*")]:
                os.chown(path, uid, uid)
        self.process = subprocess.Popen(
            ["/usr/bin/python3" if uid else sys.executable, "-c", VICTIM, str(self.home)], text=True, user=uid, group=uid,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"SECRET": self.token},
        )  # fmt: skip
        self.process.stdin.write(self.token + "\n")
        self.process.stdin.flush()
        self.aims = json.loads(self.process.stdout.readline()) | {
            "answers": str(self.home / "private/answers.csv"), "private": str(self.home / "private"),
            "dataset": str(self.home / "dataset/train.csv"), "open": str(self.home / "open"),
            "socket": str(self.home / "open/socket"), "repository": str(ROOT),
        }  # fmt: skip
        self.before = self.state()

    def state(self) -> dict:
        """All that an attack might change from outside."""
        pid = self.process.pid
        with open(f"/proc/{pid}/limits") as file:
            limits = file.read()
        with open(f"/proc/{pid}/stat") as file:
            status = file.read().rpartition(")")[2].split()[0] in ("T", "t")
        files = [self.home, *sorted(self.home.rglob("*"))]
        return {
            "limits": limits, "stopped": status, "nice": os.getpriority(os.PRIO_PROCESS, pid),
            "cores": os.sched_getaffinity(pid), "policy": os.sched_getscheduler(pid),
            "files": [(str(p), p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_size) for p in files],
        }  # fmt: skip

    def harmed(self) -> bool:
        """Whether it was killed, signalled, or changed."""
        time.sleep(0.01)
        if self.process.poll() is not None:
            return True
        if self.state() != self.before:
            return True
        self.process.stdin.write("signals?\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() != "[]"

    def close(self):
        try:
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
            self.process.wait(3)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        Path(self.aims["shm"]).unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, from a full scan of /proc."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, grown = set(), {pid}
    while found != grown:
        found, grown = grown, grown | {child for child, parent in parents.items() if parent in grown}
    return sorted(found - {pid})


def settles(condition, seconds: float = 5.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


if __name__ == "__main__":
    as_trainer(sys.argv[1], int(sys.argv[2]))
