"""The processes of the sandbox between the trainer and a script (see sandbox.py); trusted, outside the walls.

    monitor FD BASE            one run: its job comes through the socket FD, its result goes back
    server FD BASE MODULE...   imports the modules, then forks a monitor for each socket it is sent
    (BASE is the directory of all workspaces, to be swept if the trainer dies)

A monitor enforces the limits by sampling and by its pipes, kills the tree when its script ends, when a limit is
reached or when the trainer is gone, and brings the outputs home.
"""

import atexit
import builtins
import contextlib
import errno
import gc
import importlib
import importlib.machinery
import os
import select
import signal
import socket
import sys
import time
from types import SimpleNamespace

import syscalls
import walls
from walls import BOX, LINUX, receive, send
from workspace import make_locked, sweep

SETUP_S = 30.0  # patience with walls that go up on a busy machine
FLOOD_BYTES = 16 << 20  # of output: more is an attack, not a log
# How the stderr of a script ends that ran into a kernel's limit before the monitor saw it there. A script can
# fake such a line: that wins nothing which really running into the limit would not.
LAST_WORDS = {
    "MemoryError": "memory",
    "can't start new thread": "processes",
    "[Errno 11] Resource temporarily unavailable": "processes",
    "[Errno 28] No space left on device": "disk",
    "[Errno 27] File too large": "disk",
}


def run_job(lifeline: socket.socket, base: str) -> dict:
    """Take one job, run it to its end, send the result. Returns (the job) only in the payload of a warm run."""
    try:
        job = receive(lifeline)
    except (EOFError, OSError):
        os._exit(0)  # the trainer is gone already
    try:
        outcome = supervise(job, lifeline, base)
    except BaseException as error:  # the boundary: whatever goes wrong out here is `internal`
        outcome = {
            "reason": "internal", "exit_code": None, "stdout": "", "stderr": f"{type(error).__name__}: {error}",
            "wall_s": 0.0, "cpu_s": 0.0, "peak_memory_mb": 0.0,
        }  # fmt: skip
    if outcome is None:
        return job
    with contextlib.suppress(OSError):  # the trainer may be gone
        send(lifeline, outcome | {"tier": job["tier"]})
    with contextlib.suppress(ChildProcessError):
        os.wait()  # init; in a container nobody else might
    os._exit(0)


def supervise(job: dict, lifeline: socket.socket, base: str) -> dict | None:
    """Start init, enforce the limits, kill the tree, tidy up. -> fields of the Result; None in the payload."""
    limits, ns = SimpleNamespace(**job["limits"]), job["tier"] == "ns"
    if job["uid"] is not None:  # pids are unique among what runs, and so become the ids
        job["uid"] += os.getpid() % (1 << 22 if job["uid"] > 1 << 16 else 4000)
    if ns:
        walls.enter_pid_namespace()
    else:
        make_locked(job["home"])
        if LINUX:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    (out, out_end), (err, err_end), (control, control_end) = os.pipe(), os.pipe(), socket.socketpair()
    pid = os.fork()
    if pid == 0:
        for mine in (lifeline, control):
            mine.close()
        os.close(out)
        os.close(err)
        walls.init(job, limits, control_end, out_end, err_end)
        job["control"] = control_end
        return None
    control_end.close()
    os.close(out_end)
    os.close(err_end)

    streams = {out: Stream(limits.output_kb << 9), err: Stream(limits.output_kb << 9)}
    meter = Meter(pid, job, limits)
    poll = select.poll()
    for fd in (lifeline.fileno(), control.fileno(), *streams):
        poll.register(fd, select.POLLIN)
    reason, message, status, alive, lost = "", "", None, [], False
    started = stopped = None  # when the script did
    deadline, next_sample = time.monotonic() + SETUP_S, float("inf")
    while not reason:
        now = time.monotonic()
        if now >= next_sample:
            reason = meter.sample()
            near = meter.memory > limits.memory_mb << 19
            next_sample = time.monotonic() + (0.02 if near else 0.05)
        if now >= deadline:
            reason = reason or ("setup_error" if started is None else "wall")
        if reason:
            break
        for fd, _ in poll.poll(1000 * max(0.0, min(deadline, next_sample) - now) + 1):
            if fd == lifeline.fileno():
                reason, message = "internal", "cancelled"
                lost = not lifeline.recv(1)  # else it was told to stop
            elif fd == control.fileno():
                try:
                    what, *rest = receive(control, meter.fds)
                except (EOFError, ConnectionError):  # init is gone: it ended the tree, or met its own end
                    reason = "ended"
                    continue
                if what == "started":
                    started = time.monotonic()
                    deadline, next_sample = started + limits.wall_s, started + 0.02
                    walls.prefer_as_victim(pid)
                elif what == "ended":
                    stopped, next_sample = time.monotonic(), float("inf")
                    status, cpu_s, peak, alive = rest
                    meter.cpu, meter.peak = max(meter.cpu, cpu_s), max(meter.peak, peak)
                    reason = "ended"
                elif what == "failed":
                    reason, message = "setup_error", rest[0]
            elif data := os.read(fd, 1 << 16):
                streams[fd].add(data)
                if sum(s.seen for s in streams.values()) > FLOOD_BYTES:
                    reason = "output"
            else:
                poll.unregister(fd)
    stopped = stopped or time.monotonic()
    if status is None:
        alive = walls.kill_tree(pid, control, ns)
    if alive:
        message += f" cannot be killed: {alive}"
    for fd, stream in streams.items():  # what is left in the pipes, now that nobody writes
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while stream.seen <= FLOOD_BYTES and (data := os.read(fd, 1 << 16)):
                stream.add(data)
    code = None
    if reason == "ended" and status is None:
        reason, message = "internal", "the init process was lost"
    elif reason == "ended":
        code = os.waitstatus_to_exitcode(status)
        reason = verdict(code, streams[err].tail or streams[err].head, meter)
    walls.collect(job, meter.fds)
    if lost:  # nobody else will remove the workspaces
        sweep(base, patience=0.3)
    texts = [stream.text() for stream in streams.values()]
    if not ns:
        for path, name in (job["home"], "/tmp"), (job["workspace"], BOX):
            texts = [text.replace(path.encode(), name.encode()) for text in texts]
    return {
        "reason": reason, "exit_code": code, "stdout": texts[0].decode(errors="replace"),
        "stderr": texts[1].decode(errors="replace") + message, "wall_s": stopped - (started or stopped),
        "cpu_s": meter.cpu, "peak_memory_mb": meter.peak / 2**20,
    }  # fmt: skip


def verdict(code: int, stderr: bytes, meter: "Meter") -> str:
    """The reason for the end of a script that was not stopped."""
    if code == 0:
        return "ok"
    last_line = stderr.decode(errors="replace").strip().rpartition("\n")[2]
    for words, reason in LAST_WORDS.items():
        if code > 0 and words in last_line:
            full = reason == "disk" and meter.shared_bytes() > 0.9 * (meter.limits.memory_mb << 20)
            return "memory" if full else reason  # /dev/shm is memory
    if code == -signal.SIGXCPU or meter.cpu > meter.limits.cpu_s:
        return "cpu"
    if code == -signal.SIGXFSZ or meter.disk_full(look_now=True):
        return "disk"
    return "exit" if code > 0 else "signal"


class Stream:
    """One pipe of a script: the head and the tail of what came through, `half` bytes each, and how much it was."""

    def __init__(self, half: int):
        self.half, self.head, self.tail, self.seen = half, b"", b"", 0

    def add(self, data: bytes) -> None:
        self.seen += len(data)
        room = self.half - len(self.head)
        self.head += data[:room]
        if len(data) > room:
            self.tail = (self.tail + data[room:])[-self.half :]

    def text(self) -> bytes:
        cut = self.seen - len(self.head) - len(self.tail)
        return self.head + (b"\n[... %d bytes cut ...]\n" % cut if cut else b"") + self.tail


class Meter:
    """What the tree below `init_pid` uses. cpu: seconds so far; memory, peak: bytes."""

    def __init__(self, init_pid: int, job: dict, limits: SimpleNamespace):
        self.init_pid, self.job, self.limits = init_pid, job, limits
        self.fds: list[int] = []  # ns: the run's disk and its shared memory
        self.cpu = self.memory = self.peak = self.next_walk = 0.0
        self.own: dict[tuple, float] = {}  # (pid, start) -> CPU seconds, the dead included

    def sample(self) -> str:
        """Measure; the limit that is exceeded, or nothing."""
        limits, shared, table = self.limits, self.shared_bytes(), walls.processes(self.init_pid)
        top = table.pop(self.init_pid, None)
        self.memory = shared + sum(p.rss for p in table.values())
        if self.memory > limits.memory_mb << 20:  # pages shared by forks were counted once for each
            self.memory = shared + sum(proportional(pid, p.rss) for pid, p in table.items())
        self.peak = max(self.peak, self.memory)
        # A child's time is in its parent's `waited`, if the parent waits; if not, in our last sample of it.
        self.own |= {(pid, p.start): p.cpu for pid, p in table.items()}
        waited = sum(p.waited for p in table.values()) + (top.waited if top else 0)
        self.cpu = max(self.cpu, sum(p.cpu for p in table.values()) + waited, sum(self.own.values()))
        if self.memory > limits.memory_mb << 20:
            return "memory"
        if sum(p.tasks for p in table.values()) > limits.processes:
            return "processes"
        if self.disk_full():
            return "disk"
        return "cpu" if self.cpu > limits.cpu_s else ""

    def shared_bytes(self) -> int:
        """In /dev/shm."""
        uid = self.job["uid"]
        if self.fds:
            return used(self.fds[1])[0]
        if self.job["tier"] == "landlock" and uid is not None:
            return sum(e.stat(follow_symlinks=False).st_blocks << 9 for e in walls.shared_memory(uid))
        return 0

    def disk_full(self, look_now: bool = False) -> bool:
        size, entries = self.limits.disk_mb << 20, walls.max_entries(self.limits)
        if self.fds:
            now = used(self.fds[0])
            return now[0] > size - 8192 or now[1] >= entries
        began = time.monotonic()
        if self.job["tier"] == "ns" or (began < self.next_walk and not look_now):
            return False
        full = exceeds([self.job["workspace"], self.job["home"]], size, entries)
        self.next_walk = time.monotonic() + 20 * (time.monotonic() - began)  # at most 5 % of the time
        return full


def used(fd: int) -> tuple[int, int]:
    """Bytes and entries in use on a tmpfs."""
    s = os.fstatvfs(fd)
    return (s.f_blocks - s.f_bfree) * s.f_frsize, s.f_files - s.f_ffree


def proportional(pid: int, rss: int) -> int:
    """Bytes of memory, each shared page divided among its users; `rss` where that is not for us to know."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError):  # it ended: its memory is gone
        return 0
    except PermissionError:
        return rss


def exceeds(todo: list[str], size: int, entries: int) -> bool:
    """Whether directories hold more than that together; one with paths too long to look at does."""
    while todo:
        try:
            with os.scandir(todo.pop()) as listing:
                for entry in listing:
                    size -= entry.stat(follow_symlinks=False).st_blocks << 9
                    entries -= 1
                    if size < 0 or entries < 0:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return True  # else: it vanished, or was closed to us, while the script works
    return False


# ---- warm start ----------------------------------------------------------------------------------


def serve(control: socket.socket, base: str, preload: list[str]) -> socket.socket:
    """Import, then fork a monitor for each request. Returns only in those forks, with their lifeline."""
    try:
        for name in preload:
            importlib.import_module(name)
        if "threading" in sys.modules and sys.modules["threading"].active_count() > 1:
            raise ImportError(f"one of {preload} starts threads, which a fork would lose")
        for fd in os.listdir("/proc/self/fd") if LINUX else ():
            with contextlib.suppress(FileNotFoundError):  # the one that lists the others
                target = os.readlink(f"/proc/self/fd/{fd}")
                if int(fd) > 2 and int(fd) != control.fileno():
                    raise ImportError(f"one of {preload} keeps {target} open, which runs would share")
    except Exception as error:  # a module may raise anything
        control.send(f"{type(error).__name__}: {error}".encode()[:4096])
        os._exit(1)
    gc.collect()
    gc.freeze()  # the collector then leaves the pages alone that all runs share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a monitor
    control.send(b"ready")
    while True:
        try:
            word, fds, _, _ = socket.recv_fds(control, 1, 1)
        except ConnectionError:
            word, fds = b"", []
        if not fds:
            if not word:  # the trainer is dead
                sweep(base, patience=0.3)
            os._exit(0)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            return socket.socket(fileno=fds[0])
        os.close(fds[0])


def become(job: dict) -> None:
    """In the payload of a warm run: what `python script.py ...` would do. Does not return."""
    control = job["control"]
    try:
        path = os.path.join(job["box"], job["argv"][1])
        known = prepare_interpreter(job, path)
        send(control, ["started"])
    except BaseException as error:  # the boundary: this was not the script's doing
        send(control, ["failed", f"{type(error).__name__}: {error}"])
        os._exit(1)
    control.close()
    code = 0
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        text = f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        print(text, file=sys.stderr)
        os._exit(2)
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(sys.modules["__main__"]))
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:  # printed as the interpreter does, without this frame
        error = error.with_traceback(error.__traceback__.tb_next)
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    finish(code or 0, known, job["box"])


def prepare_interpreter(job: dict, path: str) -> set[str]:
    """The state of a fresh interpreter, but for the server's imports. -> the names of those"""
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"][1:]
    sys.path.insert(0, os.path.dirname(path))
    for name in ("monitor", "syscalls", "walls", "workspace"):  # a script may have modules of these names
        sys.modules.pop(name)
    importlib.invalidate_caches()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None  # found anew, in the new environment
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = job["box"]
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # else all runs of a server would draw the same numbers
    known = set(sys.modules)
    main = type(sys)("__main__")
    main.__file__, main.__cached__, main.__annotations__ = path, None, {}
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    return known


def finish(code: int, known: set[str], box: str) -> None:
    """End the script as the interpreter would: wait for threads, call exit functions, drop its own modules (which
    closes their files). Imported libraries are left standing: to take them down takes 0.1 s."""
    threading = sys.modules.get("threading")
    if threading:
        threading._shutdown()
    atexit._run_exitfuncs()
    for name in {*sys.modules} - known | {"__main__"}:
        module = sys.modules.get(name)
        if isinstance(module, type(sys)) and (getattr(module, "__file__", None) or "").startswith(box + "/"):
            vars(sys.modules.pop(name)).clear()
    sys.last_type = sys.last_value = sys.last_traceback = None
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a script may close or replace them
            stream.flush()
    os._exit(code & 0xFF)


def socket_from(fd: int) -> socket.socket:
    sock = socket.socket(fileno=os.dup(fd))  # a low number: the trainer may have thousands open
    os.close(fd)
    return sock


def main() -> None:
    role, lifeline, base = sys.argv[1], socket_from(int(sys.argv[2])), sys.argv[3]
    del sys.path[0]  # this repository is not for scripts to import
    if role == "server":
        lifeline = serve(lifeline, base, sys.argv[4:])
    become(run_job(lifeline, base))
