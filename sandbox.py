"""A subprocess-based, resource-limited executor for scripts that nobody has read.

    result = run(["python", "train.py"], workspace, limits=Limits(wall_s=20))     # cold: a fresh interpreter
    with Pool(2, preload=("numpy", "sklearn")) as pool:                           # warm: imports are paid once
        future = pool.submit(["python", "train.py"], workspace, read_only=((data, "data"),))
    python sandbox.py --check                                                     # what this machine gives

    tier   when                                    what a script can reach
    ns     root, or user namespaces allowed        its workspace, its read-only directories, the interpreter and /usr;
                                                   no network, no other process, no other file
    bare   anything else, with allow_weak=True     whatever the user can: limits and tree kill only, no secrecy

A tier is chosen by really running a canary in it, which tries what must not work. In every tier the whole process
tree dies at the end of a run, limits hold for the tree, and our own failures are `internal` or `setup_error`.

What the ns tier does not stop: attacks on the kernel itself (there is no system call filter), and memory, which is
sampled every 20 ms, so a script can exceed its limit for that long. Files in /tmp, /dev/shm and the workspace live in
memory, up to disk_mb each, and are not counted as the script's memory.

Processes:   trainer -> server (imports once, one run at a time) -> [ns: gate -> init, pid 1] -> the script
The server watches limits; it dies with the trainer (its standard input closes), and everything below dies with it
(parent-death signals; in ns the kernel kills the whole pid namespace when its init dies).
"""

import argparse
import atexit
import contextlib
import ctypes
import importlib
import json
import os
import queue
import random
import resource
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path

DEVICES = ("null", "zero", "full", "random", "urandom")
BOX = "/box"  # the workspace, as a script in the ns tier sees it
SAMPLE_S = 0.02  # how often a run's memory, CPU time and processes are looked at
FLOOD_BYTES = 16 << 20  # output beyond this ends a run
MAX_ENTRIES = 4096  # files and directories that a workspace may hold
MAX_DEPTH = 8  # of directories that are copied back


@dataclass(frozen=True)
class Limits:
    """For the whole process tree of a run."""

    wall_s: float = 60.0
    cpu_s: float | None = None  # sum over all processes; None = wall_s * threads
    memory_mb: int = 2048
    processes: int = 64  # processes and threads
    disk_mb: int = 256
    file_mb: int = 128
    output_kb: int = 64  # of stdout and of stderr each; the middle is dropped
    threads: int = 1  # for BLAS and OpenMP


@dataclass(frozen=True)
class Result:
    reason: str  # ok exit signal wall cpu memory processes disk output setup_error internal
    exit_code: int  # of the script; 128 + signal when one ended it; -1 when it was stopped
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    peak_memory_mb: float
    tier: str


class SubmissionError(Exception):
    """A file that a script left cannot be read safely; the message is the reason."""


class SandboxError(ValueError):
    """This machine cannot give what was asked for; the message says what to do."""


# ------------------------------------------------------------------------------------- the trainer's side


def run(argv, workspace, *, limits=Limits(), read_only=(), hidden=(), env=None, gpus=(), tier=None) -> Result:
    """One run in an interpreter of its own. Arguments as in Pool.submit; tier None = the strongest there is."""
    with Pool(1, preload=(), tier=tier, allow_weak=tier == "bare") as pool:
        return pool.submit(
            argv, workspace, limits=limits, read_only=read_only, hidden=hidden, env=env, gpus=gpus
        ).result()


class Pool:
    """`workers` servers that run one script at a time each, with `preload` already imported.

    tier None takes the strongest that works here. Raises SandboxError when that is `bare` and allow_weak is False.
    """

    def __init__(self, workers: int, preload: Sequence[str] = (), tier: str | None = None, allow_weak: bool = False):
        self.tier = choose_tier(tier, allow_weak)
        self.preload = tuple(preload)
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.servers: set[Server] = set()
        self.closed = False
        sweep()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def submit(
        self, argv, workspace, *, limits=Limits(), read_only=(), hidden=(), env=None, gpus=()
    ) -> "Future[Result]":
        """Run argv = ["python", script, *args] in `workspace`, an existing directory; what the script leaves there
        (regular files, up to disk_mb) is in it afterwards.

        read_only: (host path, name) pairs; each directory appears as `name` in the workspace. hidden: paths that must
        not be visible; an error if one lies below what a script may read. env: extra variables; nothing is inherited.
        """
        if gpus:
            raise SandboxError("runs with GPUs are not built yet: leave gpus empty")
        if self.closed:
            raise RuntimeError("the pool is closed")
        job = {
            "argv": [str(a) for a in argv],
            "workspace": str(Path(workspace).resolve()),
            "limits": asdict(limits),
            "read_only": [(str(Path(path).resolve()), name) for path, name in read_only],
            "env": dict(env or {}),
            "tier": self.tier,
        }
        seen = [path for path, _ in job["read_only"]] + visible_paths()
        for path in map(str, (Path(p).resolve() for p in hidden)):
            if any(path == s or path.startswith(f"{s}/") for s in seen):
                raise SandboxError(f"{path} must be hidden but lies in a directory that scripts can read")
        future: Future = Future()
        self.jobs.put((job, future))
        return future

    def _work(self) -> None:
        server = None
        while (item := self.jobs.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                threads = job["limits"]["threads"]
                if server is None or server.threads != threads or not server.alive():
                    if server is not None:
                        self.servers.discard(server)
                        server.close()
                    server = Server(self.preload, threads)
                    self.servers.add(server)
                result = server.run(job)
            except OSError as error:  # the server died or could not start: our failure, not the script's
                result = failure(f"sandbox server: {error}", self.tier)
            future.set_result(result)
        if server is not None:
            server.close()

    def close(self) -> None:
        """End all servers, and with them all runs; what had not run is cancelled."""
        self.closed = True
        while not self.jobs.empty():
            item = self.jobs.get()
            if item is not None:
                item[1].cancel()
        for server in list(self.servers):
            server.close()
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def failure(text: str, tier: str, reason: str = "internal") -> Result:
    return Result(reason, -1, "", text, 0.0, 0.0, 0.0, tier)


class Server:
    """A server process and its pipe. It gets no environment of ours, so it holds no secret."""

    def __init__(self, preload: Sequence[str], threads: int):
        self.threads = threads
        command = [sys.executable, os.path.abspath(__file__), "--server", json.dumps(list(preload))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_env(threads, "/tmp"), cwd="/",
            start_new_session=True,  # a Ctrl-C is for the trainer, which then closes us
        )  # fmt: skip

    def alive(self) -> bool:
        return self.process.poll() is None

    def run(self, job: dict) -> Result:
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            self.close()
            return failure("the sandbox server died", job["tier"])
        return Result(**json.loads(line))

    def close(self) -> None:
        """The end of its input is the server's signal to kill its run and leave."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def clean_env(threads: int, home: str) -> dict[str, str]:
    """The environment of a run: the same on every machine, nothing inherited."""
    return {
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": "/tmp",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "JOBLIB_TEMP_FOLDER": "/tmp",
        **dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), str(threads)
        ),
    }


# ------------------------------------------------------------------------------- workspaces and submissions


def new_workspace() -> Path:
    """An empty directory for one run; its name says whose it is, so that `sweep` can tell when nobody's."""
    return Path(tempfile.mkdtemp(prefix=f"ml-agent-sbx-{os.getpid()}-"))


def sweep() -> None:
    """Remove the workspaces of processes that are gone (a trainer killed with SIGKILL cannot clean up)."""
    for path in Path(tempfile.gettempdir()).glob("ml-agent-sbx-*-*"):
        owner = path.name.split("-")[3]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}") and os.path.isdir("/proc/self"):
            remove(path)


def remove(path: Path) -> None:
    """Delete a workspace, whatever a script made of it: modes are opened first, links are not followed."""
    for folder, names, _ in os.walk(path, followlinks=False):
        for name in names:
            child = os.path.join(folder, name)
            if not os.path.islink(child):
                os.chmod(child, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def safe_read(workspace, name: str, max_bytes: int) -> bytes:
    """The bytes of a file that a script left, never anything else. Call it after the run has ended.

    Raises SubmissionError for a link, a special file, a hard link, or a file that is absent or too large.
    """
    parts = Path(name).parts
    if not parts or any(part in ("..", "/") for part in parts):
        raise SubmissionError(f"{name} is not a path inside the workspace")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    handle = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            inner = os.open(part, flags | (0 if last else os.O_DIRECTORY), dir_fd=handle)
            os.close(handle)
            handle = inner
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise SubmissionError(f"{name} is not a regular file")
        if info.st_nlink != 1:
            raise SubmissionError(f"{name} is a hard link")
        if info.st_size > max_bytes:
            raise SubmissionError(f"{name} is larger than {max_bytes} bytes")
        data = b""
        while len(data) <= max_bytes and (chunk := os.read(handle, min(1 << 20, max_bytes + 1 - len(data)))):
            data += chunk
        if len(data) > max_bytes:
            raise SubmissionError(f"{name} is larger than {max_bytes} bytes")
        return data
    except FileNotFoundError:
        raise SubmissionError(f"{name} was not written") from None
    except OSError as error:
        raise SubmissionError(f"{name} cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------ the choice of a tier

TIERS = ("ns", "bare")
_works: dict[str, str] = {}  # tier -> "" when the canary found nothing, else what is wrong

CANARY = """
import os, socket
hidden, pid, port = {hidden!r}, {pid}, {port}
def tries():
    yield "read a hidden file", lambda: open(hidden).read()
    yield "list a hidden directory", lambda: os.listdir(os.path.dirname(hidden))
    yield "signal the trainer", lambda: os.kill(pid, 0)
    yield "open the trainer's memory", lambda: open(f"/proc/{{pid}}/mem", "rb")
    yield "connect to the trainer's socket", lambda: socket.create_connection(("127.0.0.1", port), 1)
for what, attempt in tries():
    try:
        attempt()
        print("could", what)
    except OSError:
        pass
open("proof", "w").write("ran")
"""


def probe(tier: str) -> str:
    """"" when the tier works here and holds against the canary, else why not. The answer is kept."""
    if tier not in _works:
        _works[tier] = _probe(tier)
    return _works[tier]


def _probe(tier: str) -> str:
    if tier == "bare":
        return ""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces"
    workspace, secret = new_workspace(), new_workspace()
    (secret / "answers").write_text("42")
    (secret / "answers").chmod(0o644)
    secret.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = CANARY.format(hidden=str(secret / "answers"), pid=os.getpid(), port=port)
        (workspace / "canary.py").write_text(script)
        job = {
            "argv": ["python", "canary.py"], "workspace": str(workspace), "limits": asdict(Limits(wall_s=20)),
            "read_only": [], "env": {}, "tier": tier,
        }  # fmt: skip
        server = Server((), 1)
        try:
            result = server.run(job)
            proof = (workspace / "proof").is_file()
        except OSError as error:
            return f"the canary could not run: {error}"
        finally:
            server.close()
            remove(workspace)
            remove(secret)
    if result.reason != "ok" or not proof:
        return f"the canary did not run ({result.reason}): {result.stderr.strip().splitlines()[-1:]}"
    return result.stdout.strip().replace("\n", "; ")


def choose_tier(tier: str | None, allow_weak: bool) -> str:
    if tier is not None and tier not in TIERS:
        raise SandboxError(f"sandbox tier {tier!r} is not built; choose one of {', '.join(TIERS)}")
    wanted = tier or next(t for t in TIERS if not probe(t))
    if problem := probe(wanted):
        raise SandboxError(f"sandbox tier {wanted} does not work here: {problem}")
    if wanted == "bare" and not allow_weak:
        raise SandboxError(
            f"only the bare tier works here (ns: {probe('ns')}): it hides nothing from a script. Set "
            "sandbox.allow_weak=true if you trust the scripts, or run as root or with user namespaces"
        )
    return wanted


# ------------------------------------------------------------------------------------ the server's side


def serve(preload: list[str]) -> None:
    """Run jobs from standard input, one JSON object a line, until it closes."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for name in preload:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    buffer = b""
    while True:
        while b"\n" not in buffer:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            buffer += chunk
        line, buffer = buffer.split(b"\n", 1)
        job = json.loads(line)
        try:
            result = watch(job)
        except OSError as error:
            result = failure(f"{type(error).__name__}: {error}", job["tier"], "setup_error")
        answers.write(json.dumps(asdict(result)).encode() + b"\n")
        answers.flush()


@dataclass
class Stream:
    """One output pipe: the head and the tail of what came, and how much it was."""

    limit: int
    head: bytes = b""
    tail: bytes = b""
    seen: int = 0

    def add(self, data: bytes) -> None:
        self.seen += len(data)
        room = self.limit // 2 - len(self.head)
        self.head += data[:room]
        self.tail = (self.tail + data[room:])[-(self.limit // 2) :] if room < len(data) else self.tail

    def text(self) -> str:
        gap = self.seen - len(self.head) - len(self.tail)
        middle = f"\n[{gap} bytes left out]\n".encode() if gap else b""
        return (self.head + middle + self.tail).decode(errors="replace")


@dataclass
class Usage:
    """A tree's consumption, from samples of /proc."""

    memory: int = 0  # bytes, now
    peak: int = 0
    cpu: float = 0.0
    tasks: int = 0
    ended: dict = field(default_factory=dict)  # pid -> last CPU seconds: a dead process's time still counts


def watch(job: dict) -> Result:
    """Start a run, look after it until it ends or breaks a limit, and leave no process behind."""
    limits, tier = Limits(**job["limits"]), job["tier"]
    cpu_limit = limits.cpu_s if limits.cpu_s is not None else limits.wall_s * limits.threads
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "report")}
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        child_main(job, {name: ends[1] for name, ends in pipes.items()})  # never returns
    for _, write_end in pipes.values():
        os.close(write_end)
    streams = {name: Stream(limits.output_kb << 10) for name in ("stdout", "stderr")}
    report, usage, reason, status = b"", Usage(), "", None
    selector = selectors.DefaultSelector()
    for name, (read_end, _) in pipes.items():
        os.set_blocking(read_end, False)
        selector.register(read_end, selectors.EVENT_READ, name)
    selector.register(0, selectors.EVENT_READ, "trainer")
    next_sample = started
    while status is None:
        for key, _ in selector.select(SAMPLE_S):
            if key.data == "trainer":
                if not os.read(0, 1 << 16):  # the trainer is gone
                    kill_tree(child)
                    os._exit(1)
                continue
            data = os.read(key.fd, 1 << 16)
            if not data:
                selector.unregister(key.fd)
            elif key.data == "report":
                report += data
            else:
                streams[key.data].add(data)
        pid, wait_status = os.waitpid(child, os.WNOHANG)
        if pid:
            status = wait_status
            break
        now = time.monotonic()
        if now < next_sample:
            continue
        next_sample = now + SAMPLE_S
        sample(child, usage, limits.memory_mb << 20)
        broken = {
            "wall": now - started > limits.wall_s,
            "cpu": usage.cpu > cpu_limit,
            "memory": usage.memory > limits.memory_mb << 20,
            "processes": usage.tasks > limits.processes,
            "output": max(s.seen for s in streams.values()) > FLOOD_BYTES,
        }
        reason = next((name for name, is_broken in broken.items() if is_broken), "")
        if reason:
            break
    wall = time.monotonic() - started
    kill_tree(child, reap=status is None)
    for name, (read_end, _) in pipes.items():  # what was still in the pipes
        try:
            while data := os.read(read_end, 1 << 16):
                if name == "report":
                    report += data
                else:
                    streams[name].add(data)
        except BlockingIOError:
            pass  # a descriptor that somebody still holds: everything of the run is dead, so nothing follows
        os.close(read_end)
    selector.close()
    said = json.loads(report) if report else {}
    code = said.get("code", -1)
    if not reason:
        if "error" in said:
            reason = "setup_error"
        elif "code" not in said and tier == "ns":
            reason, said["error"] = "internal", "the sandbox's init died"
        elif tier == "bare":
            code = exit_code(status)
        reason = reason or ("ok" if code == 0 else "disk" if said.get("full") else "signal" if code > 128 else "exit")
    stderr = streams["stderr"].text() if "error" not in said else said["error"]
    cpu = max(usage.cpu, said.get("cpu", 0.0))
    peak = usage.peak / 2**20
    return Result(reason, code, streams["stdout"].text(), stderr, wall, cpu, peak, tier)


def exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def descendants(root: int) -> list[int]:
    found, stack = [], [root]
    while stack:
        pid = stack.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    stack += map(int, file.read().split())
        except OSError:
            continue  # it ended meanwhile
    return found


def sample(root: int, usage: Usage, limit: int) -> None:
    """Memory, CPU time and tasks of the tree. Memory is resident pages; only when their sum is over the limit are
    pages that processes share (a fork server's imports) divided among them."""
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    memory, tasks, pids = 0, 0, descendants(root)
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                values = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        usage.ended[pid] = (int(values[11]) + int(values[12])) / tick
        tasks += int(values[17])
        memory += int(values[21]) * page
    if memory > limit:
        memory = sum(map(proportional, pids))
    usage.memory, usage.peak = memory, max(usage.peak, memory)
    usage.cpu, usage.tasks = sum(usage.ended.values()), tasks


def proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except OSError:
        return 0


def kill_tree(root: int, reap: bool = True) -> None:
    """Kill a run's processes and wait for them. In the ns tier the first signal takes the whole pid namespace along;
    in the bare tier orphans become ours (subreaper) and are killed until there are none."""
    deadline = time.monotonic() + 5
    if reap:
        signal_quietly(root)
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid())[1:]:
            signal_quietly(pid)
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.001)


def signal_quietly(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------- below the server

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine if hasattr(os, "uname") else "", -1)
libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        libc.prctl(option, value, 0, 0, 0)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = [text.encode() or None for text in (source, target, kind)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def child_main(job: dict, pipes: dict[str, int]) -> None:
    """The forked child of the server; ends in os._exit."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(pipes[name], fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(pipes["report"], 3)
    os.closerange(4, 4096)
    if job["tier"] == "bare":
        os.close(3)
        for path, name in job["read_only"]:
            link = os.path.join(job["workspace"], name)
            if not os.path.islink(link):
                os.symlink(path, link)
        os.setsid()
        limit_resources(Limits(**job["limits"]), job["env"], job["workspace"])
        become_script(job["argv"], job["workspace"])
    try:
        gate(job)
    except OSError as error:
        os.write(3, json.dumps({"error": str(error)}).encode())
    finally:
        os._exit(1)


def gate(job: dict) -> None:
    """Enter new namespaces; the next fork is pid 1 of the new pid namespace. This process only waits for it."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(flags | (0 if uid == 0 else CLONE_NEWUSER)), "unshare")
    if uid != 0:  # inside, we are uid 1000 with all capabilities until we drop them
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    outside = os.open(job["workspace"], os.O_RDONLY | os.O_DIRECTORY)
    child = os.fork()
    if child == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            init(job, outside)
        except OSError as error:
            os.write(3, json.dumps({"error": str(error)}).encode())
        finally:
            os._exit(1)
    os.close(outside)
    os.waitpid(child, 0)
    os._exit(0)


def init(job: dict, outside: int) -> None:
    """Pid 1: build the file system, start the script, wait for it, kill the rest, copy the files back, report.

    `outside` is the only way out: a descriptor of the host's workspace, which the script does not get."""
    limits = Limits(**job["limits"])
    uid = 60_000 + int(job["workspace"].__hash__() % 5000) if os.geteuid() == 0 else os.geteuid()
    build_root(job, limits, uid)
    copy_files(outside, os.open(BOX, os.O_RDONLY | os.O_DIRECTORY), uid if os.geteuid() == 0 else None)
    if uid != os.geteuid():
        os.chown(BOX, uid, uid)
    prctl(PR_SET_DUMPABLE, 0)  # a script with our uid (user namespace) may not look into us
    script = os.fork()
    if script == 0:
        os.close(3)
        os.close(outside)
        os.setsid()
        drop_privileges(uid)
        limit_resources(limits, job["env"], BOX)
        become_script(job["argv"], BOX)
    status = None
    while status is None:
        pid, wait_status = os.waitpid(-1, 0)
        status = wait_status if pid == script else None
    try:
        os.kill(-1, signal.SIGKILL)  # everything in this pid namespace but us
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    space = os.statvfs(BOX)
    full = space.f_bavail * space.f_frsize < 64 << 10 or space.f_favail < 8
    full |= copy_files(os.open(BOX, os.O_RDONLY | os.O_DIRECTORY), outside, None, limits.file_mb << 20)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {"code": exit_code(status), "full": full, "cpu": used.ru_utime + used.ru_stime}
    os.write(3, json.dumps(report).encode())
    os._exit(0)


def visible_paths() -> list[str]:
    """What every script may read: the system's programs and libraries, and this interpreter's."""
    paths = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/ssl"]
    paths += ["/etc/alternatives", "/etc/localtime", "/etc/fonts"]
    paths += ["/sys/devices/system/cpu", "/sys/devices/system/node"]
    paths += [sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))]
    paths += [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)]  # a .venv may be a link
    return list(dict.fromkeys(path for path in paths if os.path.lexists(path)))


def build_root(job: dict, limits: Limits, uid: int) -> None:
    """A new root in memory that holds what a script may see, and nothing else."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = "/tmp"  # any directory: the new root is mounted over it, in this mount namespace only
    sources = {path: os.open(path, os.O_PATH) for path in visible_paths() if not os.path.islink(path)}
    sources |= {path: os.open(path, os.O_PATH) for path, _ in job["read_only"]}
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    links = {path: os.readlink(path) for path in visible_paths() if os.path.islink(path)}
    mount("root", root, "tmpfs", MS_NOSUID, "size=16m,mode=755")
    for path, target in links.items():
        os.makedirs(root + os.path.dirname(path), exist_ok=True)
        os.symlink(target, root + path)
    small = f"size={limits.disk_mb}m,nr_inodes={MAX_ENTRIES},mode=1777"
    for folder, options in ((BOX, small), ("/tmp", small), ("/dev/shm", small)):
        os.makedirs(root + folder, exist_ok=True)
        mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
    places = [(path, root + path) for path in sources if path not in dict(job["read_only"])]
    places += [(path, f"{root}{BOX}/{name}") for path, name in job["read_only"]]
    for path, place in [*places, *((path, root + path) for path in devices)]:
        fd = sources.get(path, devices.get(path))
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{fd}", place, flags=MS_BIND | MS_REC)
        if path not in devices:
            read_only_mount(place)
        os.close(fd)
    os.makedirs(f"{root}/proc")
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.makedirs(f"{root}/etc", exist_ok=True)
    shown = uid if os.geteuid() == 0 else 1000
    for name, text in (("passwd", f"sandbox:x:{shown}:{shown}::{BOX}:/bin/sh\n"), ("group", f"sandbox:x:{shown}:\n")):
        Path(f"{root}/etc/{name}").write_text(text)
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")
    mount("none", "/", flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def read_only_mount(place: str) -> None:
    """Make a bind mount and all below it read-only (mount_setattr: it can only take rights away)."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    at_recursive, mount_setattr = 0x8000, 442
    check(libc.syscall(mount_setattr, -100, place.encode(), at_recursive, attributes, 32), f"read-only {place}")


def copy_files(source: int, target: int, owner: int | None, large: int | None = None, depth: int = 0) -> bool:
    """Copy regular files from one directory descriptor to another, links and special files left out.

    Returns whether a file is `large` bytes long, which is as long as it could get."""
    here, found = os.fstat(source).st_dev, False
    for entry in sorted(os.listdir(source)):
        info = os.stat(entry, dir_fd=source, follow_symlinks=False)
        if info.st_dev != here:
            continue  # a read-only directory that is mounted here
        if stat.S_ISDIR(info.st_mode) and depth < MAX_DEPTH:
            with contextlib.suppress(FileExistsError):
                os.mkdir(entry, 0o700, dir_fd=target)
            if owner is not None:
                os.chown(entry, owner, owner, dir_fd=target, follow_symlinks=False)
            inner = [os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=d) for d in (source, target)]
            found |= copy_files(*inner, owner, large, depth + 1)
            for fd in inner:
                os.close(fd)
        elif stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_blocks * 512 + 4096 >= info.st_size:
            reader = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry, dir_fd=target)
            writer = os.open(entry, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=target)
            while chunk := os.read(reader, 1 << 20):
                os.write(writer, chunk)
            if owner is not None:
                os.fchown(writer, owner, owner)
            os.close(reader)
            os.close(writer)
            found |= large is not None and info.st_size >= large
    return found


def drop_privileges(uid: int) -> None:
    """No capability, now or ever again; as root, another user too."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        check(libc.capset(header, nothing), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit_resources(limits: Limits, env: dict, home: str) -> None:
    cpu = int(limits.cpu_s if limits.cpu_s is not None else limits.wall_s * limits.threads) + 1
    for name, value in (
        (resource.RLIMIT_CPU, cpu),  # a backup for one process: the server counts the tree
        (resource.RLIMIT_FSIZE, limits.file_mb << 20),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))
    if os.geteuid() != 0:
        most = limits.processes + 16  # the server counts exactly; this stops a fork bomb between two samples
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, take the script and not the trainer
    except OSError:
        pass
    os.environ.clear()
    os.environ.update(clean_env(limits.threads, home) | env)


def become_script(argv: list[str], workspace: str) -> None:
    """Run argv = [python, script, ...] as __main__ in this process, then exit as an interpreter would."""
    os.chdir(workspace)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(fd, mode, buffering=1, encoding="utf-8", errors="replace", closefd=False)
        for fd, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    sys.argv = argv[1:]
    sys.path[:0] = [workspace]
    main = types.ModuleType("__main__")
    main.__file__ = argv[1]
    sys.modules["__main__"] = main
    random.seed()  # the server's state would be the same in every run
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    code = 0
    try:
        with open(argv[1], "rb") as file:
            source = file.read()
        exec(compile(source, argv[1], "exec"), main.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            code = (stop.code or 0) & 0xFF
        else:
            print(stop.code, file=sys.stderr)
            code = 1
    except BaseException as error:  # as the interpreter itself: print, exit code 1
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ------------------------------------------------------------------------------------------------- --check


def main() -> None:
    parser = argparse.ArgumentParser(description="What the sandbox can do on this machine.")
    parser.add_argument("--check", action="store_true", help="try every tier with the canary")
    parser.add_argument("--server", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server is not None:
        serve(json.loads(args.server))
        return
    for tier in TIERS:
        problem = probe(tier)
        print(f"{tier:<6} {'works' if not problem else f'no: {problem}'}")
    print(__doc__.split("\n\n")[2])


if __name__ == "__main__":
    main()
