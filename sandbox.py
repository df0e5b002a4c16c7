"""Runs untrusted training scripts: under limits, out of reach of all that is not theirs, none left over.

    run(["python", "train.py"], workspace, limits=Limits(wall_s=30)) -> Result       one script
    Pool(workers=4, preload=("numpy",)).submit(...) -> Future[Result]                many, warm start
    python sandbox.py --check                                                        what this machine gives

    trainer ── monitor          one a run: watches limits, pipes and the trainer; sends the result
                 └─ init        owns the tree: pid 1 of a pid namespace, or a guard that can kill it all
                      └─ payload    the script, once its walls are up (walls.py)

Tiers; the strongest is taken whose canary, a script that tries to get out, comes back with nothing:
    ns        user, mount, pid, net, ipc and uts namespaces, then Landlock and seccomp as second walls. The
              script sees /usr, its interpreter, its read-only directories, and private /box (its workspace),
              /tmp, /dev/shm and /proc, all in memory. The disk limit is exact. As root, or in a user namespace.
    landlock  no namespaces to be had (default Docker): the same list of files, no network, no signals. What
              stays visible: pids, command lines, sizes of hidden files; sockets with a path can be connected
              to. No /dev/shm (so no DataLoader workers) unless root can give the script a user of its own.
              Weak below Landlock ABI 6 (Linux 6.12): signals and abstract sockets reach the trainer.
    bare      limits and tree kill only, no secrecy: for scripts that one trusts. Also without Linux, where a
              process that leaves its parent escapes the kill.

Stopped: reading answers, other workspaces, the trainer's memory, environment or files; the network;
outliving the run or the trainer; using up memory, processes, disk, CPU time or output.
Not stopped: bugs in the kernel or a GPU driver; timing channels between runs; more cores than granted (only
their CPU seconds are counted); memory between two samples (20 to 50 ms, at 3 GB/s a core, up to the kernel's
own limit per process); with a GPU, memfds that no process maps, and the GPU's own memory. Outside ns, the disk
limit can be overshot between two samples.
"""

import contextlib
import dataclasses
import os
import queue
import re
import socket
import stat
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import syscalls
import walls
from monitor import SETUP_S
from walls import BOX, KILL_S, LINUX, receive, send
from workspace import SubmissionError, new_workspace, remove, safe_read, sweep, workspaces

__all__ = [
    "BOX", "Limits", "Pool", "Result", "SandboxError", "SubmissionError", "check", "choose_tier", "new_workspace",
    "probe", "remove", "run", "safe_read", "sweep",
]  # fmt: skip
MAX_ABI = 6  # the newest Landlock that is used; a test lowers it


@dataclass(frozen=True)
class Limits:
    """For the whole process tree of a run, except file_mb."""

    wall_s: float = 60.0
    cpu_s: float | None = None  # seconds on all cores together; None: wall_s * threads
    memory_mb: int = 2048  # resident memory and /dev/shm
    processes: int = 64  # processes and threads
    disk_mb: int = 256  # workspace and /tmp, sources included; also 1024 + 64 * disk_mb files and directories
    file_mb: int = 128  # each
    output_kb: int = 64  # kept of stdout and of stderr each: half of it from the head, half from the tail
    threads: int = 1  # that OpenMP and the BLAS libraries are told to use


@dataclass(frozen=True)
class Result:
    """reason: ok | exit (with another status than 0) | signal | wall | cpu | memory | processes | disk | output:
    the script's doing. setup_error | internal: ours; such a run says nothing about the script."""

    reason: str
    exit_code: int | None  # -N: ended by signal N; None: it was stopped
    stdout: str  # the workspace is called /box in it on every tier
    stderr: str
    wall_s: float
    cpu_s: float
    peak_memory_mb: float
    tier: str


class SandboxError(ValueError):
    """This machine cannot give what was asked for; the message says what to do."""


# ---- the trainer's side --------------------------------------------------------------------------


def run(
    argv: Sequence[str], workspace, *, limits=Limits(), read_only=(), hidden=(), env=None, gpus=(),
    tier: str | None = None, allow_weak=False,
) -> Result:  # fmt: skip
    """Run one command in an interpreter of its own; blocks until its whole process tree is dead.

    Args:
        argv: ["python", script, *arguments], where python means the interpreter that runs this.
        workspace: an existing directory with the sources: regular files, at most 16 directories deep. Later it
            holds what the script left there: regular files with one name; links and the like stay out. For one
            run at a time.
        read_only: (host path, name) pairs: that file or directory is the workspace's `name`.
        hidden: paths that must be out of reach, even below a directory that scripts see.
        env: variables on top of the deterministic environment; nothing is inherited.
        gpus: numbers N of /dev/nvidiaN. tier: ns | landlock | bare; None: the strongest that holds.

    Raises ValueError (SandboxError if it is the machine's fault). Failures of the run itself are Results.
    """
    tier = choose_tier(tier, allow_weak)
    return _run_cold(_job(argv, workspace, limits, read_only, hidden, env, gpus, tier))


class Pool:
    """Runs up to `workers` scripts at a time, warm: a server that has imported `preload` forks each run.

    Walls, environment and results are those of `run`. What cannot start warm starts cold: commands other than
    `python x.py`, and runs with variables of their own (a module may have read them while it was imported).
    `preload` modules must not start threads nor keep files open. `tier`: the one in use.
    """

    def __init__(self, workers: int, preload: Sequence[str] = (), tier: str | None = None, allow_weak=False):
        self.tier, self.preload = choose_tier(tier, allow_weak), tuple(preload)
        sweep()
        self._jobs, self._lock = queue.SimpleQueue(), threading.Lock()
        self._servers, self._running, self._closed = {}, set(), False
        self._server((1, (), self.tier != "landlock"))  # so that a preload that cannot work fails here
        # Daemons, unlike a ThreadPoolExecutor's: a trainer that ends does not wait for its experiments.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, argv, workspace, *, limits=Limits(), read_only=(), hidden=(), env=None, gpus=()
    ) -> "Future[Result]":
        """`run`, in the background. Wrong arguments raise here, not in the future."""
        job = _job(argv, workspace, limits, read_only, hidden, env, gpus, self.tier)
        job["warm"] = len(argv) > 1 and job["argv"][0] == sys.executable and argv[1].endswith(".py") and not env
        future: Future = Future()
        if self._closed:
            raise RuntimeError("the pool is closed")
        self._jobs.put((future, job, (limits.threads, tuple(gpus), job["shm"])))
        return future

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, *arguments = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._run(*arguments))
                except BaseException as error:  # for whoever waits; this thread goes on
                    future.set_exception(error)

    def _server(self, key: tuple, broken: "_Server | None" = None) -> "_Server":
        # Libraries read their number of threads, say, when they are loaded: one server for each environment
        with self._lock:
            server = self._servers.get(key)
            if server is None or server is broken:
                env = _environment(self.tier, "/tmp", *key)
                server = self._servers[key] = _Server(self.preload, env)
            return server

    def _run(self, job: dict, key: tuple) -> Result:
        if not job["warm"]:
            return _run_cold(job, self._running)
        ours, theirs = _pair()
        with ours, theirs:
            try:
                server = self._server(key)
                try:
                    server.fork(theirs)
                except OSError:  # it died; the kernel may have taken its memory
                    self._server(key, server).fork(theirs)
            except (OSError, ValueError) as error:
                return _failure(job, f"no warm server: {error}")
            theirs.close()
            return _exchange(ours, job, self._running)

    def close(self) -> None:
        """Stop what runs (those futures give `internal`), cancel what waits, end the servers."""
        self._closed = True
        while not self._jobs.empty():
            with contextlib.suppress(queue.Empty):
                self._jobs.get_nowait()[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            while thread.is_alive():  # again and again: one may just be about to start a run
                for sock in list(self._running):
                    _cancel(sock)
                thread.join(0.05)
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class _Server:
    """The trainer's end of a warm server. The process gets a script's environment, so it holds no secret."""

    def __init__(self, preload: tuple, env: dict):
        self.lock = threading.Lock()
        self.control, theirs = _pair()
        with theirs:
            self.process = _spawn([], "server", theirs, env, preload)
        answer = self.control.recv(4096)
        if answer != b"ready":
            self.close()
            raise ValueError(f"preload: {answer.decode() or 'the server died'}")

    def fork(self, theirs: socket.socket) -> None:
        """A new monitor, at the other end of `theirs`. Raises OSError if the server is gone."""
        with self.lock:
            socket.send_fds(self.control, [b"x"], [theirs.fileno()])

    def close(self) -> None:
        _cancel(self.control)
        self.control.close()
        self.process.wait()


# Sockets whose end tells a monitor or a server that the trainer is dead. Forks of the trainer must not keep
# them open: a data loader's worker can outlive a killed trainer.
_LIFELINES: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [sock.close() for sock in list(_LIFELINES)])


def _pair() -> tuple[socket.socket, socket.socket]:
    """(ours, theirs): their end notices when ours is closed, by our death if need be."""
    ours, theirs = socket.socketpair()
    _LIFELINES.add(ours)
    return ours, theirs


def _spawn(flags: list, role: str, end: socket.socket, env: dict, arguments=()):
    import subprocess

    # A new process, not a fork of the trainer, which may hold threads, CUDA and gigabytes; its own session, since
    # a Ctrl-C is the trainer's to handle; no PDEATHSIG, which would fire when the calling *thread* ends.
    here = os.path.dirname(os.path.abspath(__file__))
    start = f"import sys; sys.path.insert(0, {here!r}); import monitor; monitor.main()"
    command = [sys.executable, *flags, "-c", start, role, str(end.fileno()), workspaces(), *arguments]
    null = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=null, stdout=null, stderr=null, cwd="/", env=env, pass_fds=[end.fileno()],
        start_new_session=True,
    )  # fmt: skip


def _run_cold(job: dict, running: set | None = None) -> Result:
    ours, theirs = _pair()
    with ours:
        with theirs:
            process = _spawn(["-E", "-s", "-S"], "monitor", theirs, {})
        try:
            return _exchange(ours, job, running if running is not None else set())
        finally:
            _cancel(ours)
            process.wait()


def _exchange(sock: socket.socket, job: dict, running: set) -> Result:
    """Send the job to its monitor and wait for the result."""
    running.add(sock)
    try:
        sock.settimeout(job["limits"]["wall_s"] + SETUP_S + 4 * KILL_S)
        send(sock, job)
        return Result(**receive(sock))
    except (OSError, EOFError, ValueError) as error:
        return _failure(job, f"the monitor was lost: {error}")
    finally:
        running.discard(sock)


def _cancel(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.send(b"q")


def _failure(job: dict, text: str) -> Result:
    return Result("internal", None, "", text, 0.0, 0.0, 0.0, job["tier"])


def _job(argv, workspace, limits: Limits, read_only, hidden, env, gpus, tier: str) -> dict:
    """Everything that a monitor has to know, in plain values. Raises ValueError."""
    argv, workspace = [str(a) for a in argv], os.path.realpath(workspace)
    if not argv or not os.path.isdir(workspace):
        raise ValueError(f"a run needs a command and an existing directory, not {argv} in {workspace}")
    for name, value in dataclasses.asdict(limits).items():
        if value is not None and not value > 0:
            raise ValueError(f"the limit {name} must be positive, not {value}")
    if re.fullmatch(r"python[\d.]*", os.path.basename(argv[0])):
        argv[0] = sys.executable
    read_only = [(os.path.realpath(path), os.path.normpath(name)) for path, name in read_only]
    for path, name in read_only:
        if not os.path.exists(path) or name.startswith(("/", "..")) or name == ".":
            raise ValueError(f"read_only ({path}, {name}): the path must exist, the name be inside the workspace")
    parents = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable))))
    prefixes = [(os.path.realpath(p), p) for p in sorted(set(parents))]
    hidden = [os.path.realpath(path) for path in hidden]
    needed = [path for path, _ in prefixes + read_only] + [workspace]
    for path in hidden:
        if tier != "bare" and any(walls.below(path, seen) for seen in needed):
            raise SandboxError(f"{path} is to be hidden but lies in a directory that the script needs: move it")
    hidden.append(os.path.dirname(os.path.realpath(__file__)))  # this repository, wherever it is
    if tier == "landlock":  # a list of what is allowed cannot make exceptions
        for path in hidden:
            if any(walls.below(path, seen) for seen in walls.SYSTEM):
                raise SandboxError(f"{path} lies in a system directory, where Landlock cannot hide it: move it")
    devices = [f"/dev/nvidia{n}" for n in gpus]
    for path in devices:
        if not os.path.exists(path):
            raise SandboxError(f"there is no GPU {path}")
    if gpus:
        devices += [f"/dev/{name}" for name in walls.GPU_DEVICES if os.path.exists(f"/dev/{name}")]
    home = "/tmp" if tier == "ns" else f"{workspaces()}/scratch-{os.urandom(8).hex()}"
    uid = _free_uid(tier, needed)
    shm = tier != "landlock" or uid is not None
    environment = _environment(tier, home, limits.threads, gpus, shm)
    if limits.cpu_s is None:
        limits = dataclasses.replace(limits, cpu_s=limits.wall_s * limits.threads)
    return {
        "argv": argv, "workspace": workspace, "limits": dataclasses.asdict(limits), "read_only": read_only,
        "hidden": hidden, "prefixes": prefixes, "devices": devices, "gpu": bool(gpus), "tier": tier,
        "box": BOX if tier == "ns" else workspace, "home": home, "warm": False,
        "env": environment | {k: str(v) for k, v in (env or {}).items()}, "shm": shm,
        "uid": uid, "abi": min(syscalls.landlock_abi(), MAX_ABI),
    }  # fmt: skip


def _free_uid(tier: str, needed: list[str]) -> int | None:
    """As root: the first of a range of user ids of which the script gets one of its own (the monitor's pid is
    added), unless, in the landlock tier, such a user could not walk to the files that it needs."""
    if os.geteuid() != 0 or tier == "bare":
        return None
    for path in needed if tier == "landlock" else ():
        while path != "/":
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return None
    with open("/proc/self/uid_map") as file:
        wide = any(int(first) == 0 and int(length) > 1 << 31 for first, _, length in map(str.split, file))
    return 0x7A000000 if wide else 60001  # no system hands out the first; a rootless container lacks it


def _environment(tier: str, home: str, threads: int, gpus: tuple, shm: bool) -> dict:
    """A script's environment, the same on every machine but for the path of the interpreter."""
    env = {
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": home, "TMPDIR": home, "JOBLIB_TEMP_FOLDER": home, "MPLCONFIGDIR": f"{home}/.matplotlib",
        "XDG_CACHE_HOME": f"{home}/.cache", "TORCH_HOME": f"{home}/.torch", "HF_HOME": f"{home}/.huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/.inductor", "CUDA_CACHE_PATH": f"{home}/.nv",
        "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", "USER": "sandbox", "LOGNAME": "sandbox",
        "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",  # what was printed before a timeout is kept
        "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
        env[f"{name}_NUM_THREADS"] = str(threads)
    env["LOKY_MAX_CPU_COUNT"] = env["PYTHON_CPU_COUNT"] = str(threads)
    if not shm:  # joblib would try, and warn: serial it is
        env["JOBLIB_MULTIPROCESSING"] = "0"
    if not gpus or tier == "bare":  # elsewhere only the granted devices exist, and count from 0
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return env


# ---- the choice of a tier, and the check ---------------------------------------------------------

CANARY = r"""
import hashlib, os, re, socket, sys
answers, pid, abstract, port, digest = sys.argv[1:]
def secret(data):
    found = re.findall(rb"TOKEN=([0-9a-f]{32})", data)
    return any(hashlib.sha256(token).hexdigest() == digest for token in found)
def read(path, start=0, size=-1):
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)
def memory():
    for line in read(f"/proc/{pid}/maps").decode().splitlines():
        if "[stack]" in line:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            return read(f"/proc/{pid}/mem", low, high - low)
def connect(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)
        return sock.recv(64)
for name, attempt in {
    "a hidden file": lambda: read(answers),
    "the environment of a process": lambda: read(f"/proc/{pid}/environ"),
    "the memory of a process": memory,
    "an abstract socket": lambda: connect(socket.AF_UNIX, "\0" + abstract),
    "the network": lambda: connect(socket.AF_INET, ("127.0.0.1", int(port))),
}.items():
    try:
        if secret(attempt() or b""):
            print("REACHED", name)
    except (OSError, OverflowError):
        pass
print("DONE")
os.kill(int(pid), 9)
"""
EVERYTHING = {
    "a hidden file", "the environment of a process", "the memory of a process", "an abstract socket",
    "the network", "a signal to a process",
}  # fmt: skip


@dataclass(frozen=True)
class Tier:
    """usable: it works here, and lets through no more than it says. weak: only with allow_weak=True."""

    name: str
    usable: bool
    weak: bool
    why: str


_tiers: dict[tuple, Tier] = {}


def probe(name: str) -> Tier:
    """Try a tier for real, once a process: its canary attacks a victim process, a hidden file and listeners."""
    if name not in ("ns", "landlock", "bare"):
        raise ValueError(f"the sandbox tier must be ns, landlock or bare, not {name!r}")
    if (name, MAX_ABI) not in _tiers:
        abi = min(syscalls.landlock_abi(), MAX_ABI)
        if name != "bare" and not (LINUX and syscalls.SUPPORTED):
            tier = Tier(name, False, False, "needs Linux on x86_64 or aarch64")
        elif name == "landlock" and not abi:
            tier = Tier(name, False, False, "no Landlock in this kernel (Linux 5.13 and CONFIG_SECURITY_LANDLOCK)")
        else:
            known = EVERYTHING if name == "bare" else set()
            if name == "landlock" and abi < 6:
                known = {"an abstract socket", "a signal to a process"}
            error, reached = _release_canary(name)
            text = f"the canary reached {', '.join(sorted(reached)) or 'nothing'}"
            tier = Tier(name, not error and reached <= known, bool(known), error or text)
        _tiers[name, MAX_ABI] = tier
    return _tiers[name, MAX_ABI]


def _release_canary(tier: str) -> tuple[str, set[str]]:
    """-> (why it could not run, what it reached)"""
    import hashlib
    import secrets
    import subprocess

    token = secrets.token_hex(16)
    digest, box, private = hashlib.sha256(token.encode()).hexdigest(), new_workspace(), new_workspace()

    def tell(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed below
            while True:
                with listener.accept()[0] as sock:
                    sock.sendall(f"TOKEN={token}".encode())

    abstract = socket.socket(socket.AF_UNIX)
    with abstract, socket.create_server(("127.0.0.1", 0)) as tcp:
        abstract.bind(f"\0{digest[:16]}" if LINUX else str(private / "socket"))
        abstract.listen()
        for listener in (abstract, tcp):
            threading.Thread(target=tell, args=[listener], daemon=True).start()
        victim = subprocess.Popen(["sleep", "60"], env={"TOKEN": token})
        try:
            private.chmod(0o755)
            (private / "answers").write_text(f"TOKEN={token}")
            (box / "canary.py").write_text(CANARY)
            aims = [private / "answers", victim.pid, digest[:16], tcp.getsockname()[1], digest]
            job = _job(["python", "canary.py", *aims], box, Limits(), (), [private], None, (), tier)
            result = _run_cold(job)
            reached = {line[8:] for line in result.stdout.splitlines() if line.startswith("REACHED ")}
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.wait(0.05)
                reached.add("a signal to a process")
        finally:
            victim.kill()
            victim.wait()
            for listener in (abstract, tcp):
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
            remove(str(box))
            remove(str(private))
    if "DONE" not in result.stdout:
        return f"the canary could not run ({result.reason}): {result.stderr.strip()[-200:]}", reached
    return "", reached


def choose_tier(tier: str | None = None, allow_weak: bool = False) -> str:
    """The given tier if it is usable, or the strongest that is. Raises SandboxError, ValueError."""
    tried = []
    for name in [tier] if tier else ["ns", "landlock", "bare"]:
        if name == "bare" and not allow_weak:
            tried.append("bare hides nothing from a script")
            continue
        found = probe(name)
        if found.usable and (allow_weak or not found.weak):
            return name
        tried.append(f"{name}: {found.why}")
    raise SandboxError(
        f"no sandbox here that can hold a hostile script ({'; '.join(tried)}). Run as root or allow user "
        "namespaces; for scripts that you trust, set allow_weak=True (sandbox.allow_weak=true)"
    )


def check() -> int:
    """Print what this machine gives. -> exit status: 0 if a tier can hold hostile scripts."""
    abi, user = syscalls.landlock_abi(), "root" if os.geteuid() == 0 else "not root"
    print(f"{os.uname().sysname} {os.uname().release}, Landlock ABI {abi}, {user}\n")
    found = [probe(name) for name in ("ns", "landlock", "bare")]
    for tier in found:
        print(f"{tier.name:9s} {'no' if not tier.usable else 'weak' if tier.weak else 'yes':5s} {tier.why}")
    print("\n" + __doc__[__doc__.index("Tiers;") :])
    return 0 if any(tier.usable and not tier.weak for tier in found) else 1


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["--check"] else "usage: python sandbox.py --check")
