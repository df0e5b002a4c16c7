"""The inside of a sandboxed run: the init process that owns its tree, and the walls around the payload.

See sandbox.py for what the tiers promise. Everything here runs in processes that live for one run; each step
narrows what the process can do, and any step that fails ends the run before its script has started.
Below: init and payload, the file system of the ns tier, the process tree, messages.
"""

import contextlib
import marshal
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from types import SimpleNamespace

import syscalls as sc
from workspace import copy_tree, remove

LINUX = sys.platform == "linux"
BOX = "/box"  # the workspace in the ns tier
HAS_CHILDREN = os.path.exists("/proc/thread-self/children")  # CONFIG_PROC_CHILDREN; gVisor, say, lacks it
KILL_S = 5.0  # patience with killed processes (a driver can hold one)
SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/ld.so.conf.d", "/etc/nsswitch.conf", "/etc/localtime", "/etc/alternatives", "/etc/ssl/certs",
    "/etc/fonts", "/sys/devices/system/cpu", "/sys/devices/system/node",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GPU_DEVICES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
GPU_SYSTEM = ("/sys/bus/pci", "/sys/devices", "/sys/module/nvidia", "/etc/OpenCL")


def max_entries(limits: SimpleNamespace) -> int:
    return 1024 + 64 * limits.disk_mb


# ---- init and payload ----------------------------------------------------------------------------


def enter_pid_namespace() -> None:
    """In the monitor: its next child is pid 1 of a new pid namespace, which dies with that child."""
    uid, gid = os.geteuid(), os.getegid()
    sc.unshare(sc.CLONE_NEWPID | (sc.CLONE_NEWUSER if uid else 0))
    if uid:  # not uid 0 inside either: that would give the script capabilities there
        for name, text in ("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def init(job: dict, limits: SimpleNamespace, control: socket.socket, out: int, err: int) -> None:
    """Own the tree until its script ends or `control` closes, then end it all.

    Tells the monitor: ["root"] with descriptors of the run's disk and shared memory (ns), ["started"],
    ["ended", wait status, CPU seconds, peak bytes, pids that would not die], or ["failed", why].
    Returns only in the payload of a warm run, behind all walls but with `control`; else the process ends.
    """
    ns, scoped = job["tier"] == "ns", False
    try:
        if ns:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # for pid 1 of a namespace that means: ignored
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        if ns:
            send(control, ["root"], build_root(job, limits))
        else:
            prepare_workspace(job)
            if LINUX:
                sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)  # orphans stay in the tree
            if job["tier"] == "landlock" and job["abi"] >= 6:
                enter_guard_domain()
                scoped = True
        script = os.fork()
        if script == 0:
            payload(job, limits, control, out, err)
            return
    except BaseException as error:  # the boundary: without all of its walls no script starts
        with contextlib.suppress(OSError):
            send(control, ["failed", f"{type(error).__name__}: {error}"])
        os._exit(1)
    os.close(out)
    os.close(err)
    ended = None
    with contextlib.suppress(OSError):  # a monitor that is gone is no reason not to kill
        while ended is None:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == script:
                peak = usage.ru_maxrss * (1024 if LINUX else 1)
                ended = ["ended", status, usage.ru_utime + usage.ru_stime, peak]
            elif pid == 0 and control in select.select([wake, control], [], [])[0]:
                break  # the monitor closed it, or is dead
            elif pid == 0:
                os.read(wake, 4096)
    alive = kill_descendants(scoped or ns)
    if ended:
        send(control, [*ended, alive])
    os._exit(0)


def enter_guard_domain() -> None:
    """A Landlock domain whose signals reach only what is born in it: kill(-1) then ends the tree, fork bomb or
    not, and nothing else, whoever its user is."""
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    sc.landlock(None, 6)
    with contextlib.suppress(PermissionError):
        os.kill(os.getppid(), 0)
        raise OSError("Landlock does not hold back signals")


def payload(job: dict, limits: SimpleNamespace, control: socket.socket, out: int, err: int) -> None:
    """Put up the walls around this process and become the script; returns instead when the start is warm."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ) if not job["warm"] else ():
        signal.signal(number, signal.SIG_DFL)  # the interpreter ignores them itself
    null = os.open("/dev/null", os.O_RDWR)
    for fd, source in enumerate((null, out, err)):
        os.dup2(source, fd)
    os.chdir(job["box"])
    os.umask(0o022)
    os.nice(5)
    walled = job["tier"] != "bare"
    lonely = job["uid"] is not None or (job["tier"] == "ns" and os.geteuid() != 0)
    set_kernel_limits(limits, job["gpu"], lonely)
    if walled:
        sc.drop_capabilities(job["uid"])
        sc.prctl(sc.PR_SET_DUMPABLE, 1)  # as after an exec: it may look into its own /proc/self
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
        if job["abi"]:
            sc.landlock(landlock_rules(job), job["abi"])
        same_user = job["tier"] == "landlock" and job["uid"] is None
        sc.seccomp(same_user, job["gpu"], job["abi"] or 3)
    if LINUX:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)  # of init; should that be killed together with the monitor
    os.closerange(3, control.fileno())
    os.closerange(control.fileno() + 1, 4096)
    if job["warm"]:
        return
    send(control, ["started"])
    os.execvpe(job["argv"][0], job["argv"], job["env"])  # which closes control


def set_kernel_limits(limits: SimpleNamespace, gpu: bool, lonely: bool) -> None:
    """Backstops per process, a little above what the monitor enforces for the tree.

    lonely: nothing but this run has its user id, so that the kernel's count of processes is the run's.
    """
    caps = {
        "CORE": 1,  # 0 would not stop a core_pattern that is a pipe
        "FSIZE": limits.file_mb << 20, "NOFILE": 1024, "CPU": int(limits.cpu_s) + 2, "MSGQUEUE": 0, "RTPRIO": 0,
    }  # fmt: skip
    if not gpu:
        # Not RLIMIT_AS: address space costs nothing, and BLAS and torch hang when there is too little of it.
        caps |= {"MEMLOCK": 8 << 20, "DATA": int(1.25 * limits.memory_mb + 256) << 20}
    if lonely:
        caps["NPROC"] = limits.processes + 8
    elif LINUX and os.geteuid() != 0:  # the user's other processes count
        tasks = 0
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                    tasks += len(os.listdir(f"/proc/{entry.name}/task"))
        caps["NPROC"] = tasks + limits.processes + 8
    for name, value in caps.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))


def landlock_rules(job: dict) -> list[tuple[str, int]]:
    rules = [(path, sc.READ_WRITE) for path in (*DEVICES, *job["devices"])]
    # The CUDA driver names its threads in /proc; root could write to /proc/sys there, capabilities or not.
    rules.append(("/proc", sc.READ_WRITE if job["gpu"] and os.geteuid() != 0 else sc.READ_ONLY))
    if job["tier"] == "ns":  # the mounts have decided already: this is the second wall
        return [*rules, ("/", sc.READ_ONLY), *((path, sc.READ_WRITE) for path in (BOX, "/tmp", "/dev/shm"))]
    # joblib asks cgroups for the number of cores
    seen = [*SYSTEM, "/sys/fs/cgroup", *(GPU_SYSTEM if job["gpu"] else ())]
    seen += [path for path, _ in job["prefixes"] + job["read_only"]]
    writable = [job["workspace"], job["home"]]
    if job["uid"] is not None:  # else the trainer's segments would be open, too
        writable.append("/dev/shm")
    return [*rules, *((path, sc.READ_ONLY) for path in seen), *((path, sc.READ_WRITE) for path in writable)]


# ---- the workspace outside namespaces ------------------------------------------------------------


def prepare_workspace(job: dict) -> None:
    """Links to the read-only directories, and the script's user as the owner."""
    for path, name in job["read_only"]:
        name = os.path.join(job["workspace"], name)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        if os.path.islink(name):
            os.unlink(name)
        os.symlink(path, name)
    for top in (job["workspace"], job["home"]) if job["uid"] is not None else ():
        os.chown(top, job["uid"], job["uid"])
        for _, folders, files, fd in os.fwalk(top):
            for name in folders + files:
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) or (stat.S_ISREG(info.st_mode) and info.st_nlink == 1):
                    os.chown(name, job["uid"], job["uid"], dir_fd=fd, follow_symlinks=False)


def collect(job: dict, fds: list[int]) -> None:
    """In the monitor, after the tree is dead: outputs home, everything else away."""
    if job["tier"] == "ns":
        if fds:
            kept = {name for _, name in job["read_only"]}
            box = os.open("box", os.O_RDONLY, dir_fd=fds[0])
            copy_tree(box, os.open(job["workspace"], os.O_RDONLY), kept, mirror=True)
        return
    for _, name in job["read_only"]:
        name = os.path.join(job["workspace"], name)
        if os.path.islink(name):
            os.unlink(name)
    remove(job["home"])
    if job["tier"] == "landlock" and job["uid"] is not None:
        for entry in shared_memory(job["uid"]):
            remove(entry.path)


def shared_memory(uid: int) -> list[os.DirEntry]:
    """What a user has in the host's /dev/shm."""
    return [e for e in os.scandir("/dev/shm") if e.stat(follow_symlinks=False).st_uid == uid]


# ---- the file system of the ns tier --------------------------------------------------------------


def build_root(job: dict, limits: SimpleNamespace) -> list[int]:
    """A new root in memory with only what the script may see. -> descriptors of its disk and its /dev/shm."""
    plain = sc.MS_NOSUID | sc.MS_NODEV
    uid = job["uid"]
    seen = [p for p in (*SYSTEM, *(GPU_SYSTEM if job["gpu"] else ())) if os.path.exists(p)]
    links = {p: os.readlink(p) for p in seen if os.path.islink(p) and p.count("/") == 1}  # /bin -> usr/bin
    binds = [(os.path.realpath(p), p) for p in seen if p not in links]
    sc.unshare(sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS)
    socket.sethostname("sandbox")
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    # The first of two pivots moves the whole host aside to /old; so nothing covers what lies below /tmp.
    sc.mount("tmpfs", "/tmp", "tmpfs", plain, "mode=755")
    os.mkdir("/tmp/new")
    os.mkdir("/tmp/old")
    sc.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    sc.mount("tmpfs", "/new", "tmpfs", plain, "mode=755")

    for source, target in binds:
        bind(source, target)
    for target, link in links.items():
        os.symlink(link, f"/new{target}")
    # The workspace and /tmp share one quota; /dev/shm has its own, and counts as memory.
    owner = uid if uid is not None else -1
    for name, mb in ("disk", limits.disk_mb), ("dev/shm", limits.memory_mb):
        os.makedirs(f"/new/{name}", exist_ok=True)
        options = f"mode=1777,size={mb}m,nr_inodes={max_entries(limits)}"
        sc.mount("tmpfs", f"/new/{name}", "tmpfs", plain, options)
    disk, shm = (os.open(f"/new/{name}", os.O_RDONLY) for name in ("disk", "dev/shm"))
    for name in ("box", "tmp"):
        os.makedirs(f"/new/{name}", exist_ok=True)
        os.mkdir(f"/new/disk/{name}")
        os.chown(f"/new/disk/{name}", owner, owner)
        sc.mount(f"/new/disk/{name}", f"/new/{name}", None, sc.MS_BIND)
    covers = []
    for path in job["hidden"]:
        if os.path.isdir(f"/new{path}"):
            sc.mount("tmpfs", f"/new{path}", "tmpfs", plain, "mode=755")
            covers.append(path)
        elif os.path.exists(f"/new{path}"):
            sc.mount("/old/dev/null", f"/new{path}", None, sc.MS_BIND)
    for source, target in job["prefixes"]:
        if not os.path.exists(f"/new{target}"):  # /usr, say, is there already
            bind(source, target)
    for path in covers:
        make_read_only(f"/new{path}")

    for path in (*DEVICES, *job["devices"]):
        bind(path, path, read_only=False)
    for i, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{i}", f"/new/dev/{name}")
    os.symlink("/proc/self/fd", "/new/dev/fd")
    os.mkdir("/new/proc")
    sc.mount("proc", "/new/proc", "proc", plain | sc.MS_NOEXEC)
    if not job["gpu"]:
        make_read_only("/new/proc", sc.MS_NOEXEC)
    os.makedirs("/new/etc", exist_ok=True)
    inside = uid if uid is not None else 1000
    for name, text in ("passwd", f"sandbox:x:{inside}:{inside}::/tmp:/bin/sh\n"), ("group", f"sandbox:x:{inside}:\n"):
        with open(f"/new/etc/{name}", "w") as file:
            file.write(text)

    workspace, box = (os.open(path, os.O_RDONLY) for path in (f"/old{job['workspace']}", "/new/box"))
    copy_tree(workspace, box, {name for _, name in job["read_only"]}, owner)
    for path, name in job["read_only"]:
        bind(path, f"{BOX}/{name}")
    sc.unmount("/new/disk")
    os.rmdir("/new/disk")

    os.chdir("/new")
    sc.pivot_root(".", ".")
    sc.unmount(".")  # the host is gone
    os.chdir("/")
    sc.mount(None, "/", None, sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | plain)
    return [disk, shm]


def bind(source: str, target: str, read_only: bool = True) -> None:
    """/old + source, a file or a directory, appears as /new + target."""
    source, target = f"/old{source}", f"/new{target}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    sc.mount(source, target, None, sc.MS_BIND | sc.MS_REC)
    if read_only:
        make_read_only(target)


def make_read_only(path: str, flags: int = 0) -> None:
    """For a mount and all mounts below it. Flags are only added, so that no locked one is in the way."""
    flags |= sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV
    try:
        sc.mount_setattr(path, flags)
    except OSError:  # before Linux 5.12, or refused by an old container runtime: mount by mount
        with open("/old/proc/self/mountinfo") as file:
            points = [line.split()[4].encode().decode("unicode_escape") for line in file]
        for point in points:
            if below(point, path):
                kept = os.statvfs(point).f_flag & (sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
                sc.mount(None, point, None, sc.MS_REMOUNT | sc.MS_BIND | flags | kept)


def below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


# ---- the process tree ----------------------------------------------------------------------------


def processes(root: int) -> dict[int, SimpleNamespace]:
    """The living processes below `root`, and root: pid -> tasks, cpu (own seconds), waited (those of children
    that ended), rss (bytes), start."""
    if not HAS_CHILDREN:
        return processes_by_ps(root)
    table, todo = {}, [root]
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")
    while todo:
        pid = todo.pop()
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                f = file.read().rpartition(b")")[2].split()  # a process can have brackets in its name
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    todo += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):  # it just ended
            continue
        if f[0] != b"Z":
            user, system, child_user, child_system = (int(t) / tick for t in f[11:15])
            table[pid] = SimpleNamespace(
                tasks=int(f[17]), cpu=user + system, waited=child_user + child_system,
                rss=int(f[21]) * page, start=int(f[19]),
            )  # fmt: skip
    return table


def processes_by_ps(root: int) -> dict[int, SimpleNamespace]:
    """The same where /proc does not tell; threads are not counted."""
    import subprocess

    table, parents = {}, {}
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss=,time="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, parent, rss, clock = line.split()
        days, _, clock = clock.rpartition("-")  # [days-][hours:]minutes:seconds
        cpu = sum(float(part) * 60**i for i, part in enumerate(reversed(clock.split(":"))))
        cpu += 86400 * int(days or 0)
        parents[int(pid)] = int(parent)
        table[int(pid)] = SimpleNamespace(tasks=1, cpu=cpu, waited=0.0, rss=int(rss) << 10, start=0)
    found, grown = set(), {root}
    while found != grown:
        found, grown = grown, grown | {pid for pid, parent in parents.items() if parent in grown}
    return {pid: table[pid] for pid in found & table.keys()}


def prefer_as_victim(init_pid: int) -> None:
    """When memory runs out, the kernel shall take the script, not the trainer. Not for the script to undo."""
    for pid in processes(init_pid) if LINUX else ():
        if pid != init_pid:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write("1000")


def kill_tree(init_pid: int, control: socket.socket, ns: bool) -> list[int]:
    """In the monitor: end everything. -> pids that would not die in time."""
    control.close()  # an order to init
    if ns:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init_pid, signal.SIGKILL)  # takes its pid namespace along
    deadline = time.monotonic() + 2 * KILL_S
    while not (gone := reaped(init_pid)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    if not gone:
        return [init_pid]
    return [] if ns else kill_descendants()  # what an init left that was itself killed


def kill_descendants(scoped: bool = False) -> list[int]:
    """Kill until no descendant of this process is left; orphans are among them, for it is their subreaper.

    scoped: kill(-1) reaches descendants only (pid 1 of a namespace, enter_guard_domain). -> pids that live on
    """
    deadline = time.monotonic() + KILL_S
    while not (gone := reaped()) and time.monotonic() < deadline:
        if scoped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            tree = set(processes(os.getpid())) - {os.getpid()}
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, a fork bomb cannot outrun us
                for pid in tree:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
        time.sleep(0.0005)
    return [] if gone else list(processes(os.getpid()))


def reaped(pid: int = -1) -> bool:
    """Whether that child (or every child) is gone, zombies collected."""
    try:
        while os.waitpid(pid, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


# ---- messages between the processes of a run -----------------------------------------------------


def send(sock: socket.socket, message, fds=()) -> None:
    data = marshal.dumps(message)
    data = struct.pack("I", len(data)) + data
    sent = socket.send_fds(sock, [data], fds) if fds else 0
    sock.sendall(data[sent:])


def receive(sock: socket.socket, fds: list | None = None):
    """One message; descriptors that come along are appended to `fds`. Raises EOFError when there is none."""
    data, wanted = b"", 4
    while len(data) < wanted:
        if fds is None:
            part = sock.recv(wanted - len(data))
        else:
            part, new, _, _ = socket.recv_fds(sock, wanted - len(data), 4)
            fds += new
        if not part:
            raise EOFError("it closed")
        data += part
        if wanted == 4 == len(data):
            wanted += struct.unpack("I", data)[0]
    return marshal.loads(data[4:])
