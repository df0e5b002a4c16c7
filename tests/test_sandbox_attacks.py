"""Attacks on the trainer, its files and its kernel, on every tier that this machine gives.

Each is a script that knows where to aim. It has succeeded when it prints the victim's secret or PWNED, or when
the victim was harmed. What a tier may let through is what the head of sandbox.py says. And each succeeds on the
bare tier: so it could succeed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sandbox_kit as kit
import syscalls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")

PRELUDE = r"""
import ctypes, errno, json, mmap, os, resource, socket, sys, time
A = json.loads(sys.argv[1])
pid, proc = A["pid"], "/proc/%d" % A["pid"]
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return libc.syscall(ctypes.c_long(A["numbers"][name]), *args), ctypes.get_errno()
def through(name, *args):  # the call got as far as the kernel's own judgement of its arguments
    result, number = call(name, *args)
    if result >= 0 or number not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        print("PWNED", name, result, number)
    else:
        print("no:", os.strerror(number))
    return result
def show(attempt):
    try:
        print("GOT", attempt())
    except (OSError, ValueError) as error:
        print("no:", error)
def did(attempt):
    try:
        attempt()
        print("PWNED")
    except (OSError, ValueError) as error:
        print("no:", error)
def read(path, start=0, size=-1):
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)
def connect(family, kind, address, message=b""):
    with socket.socket(family, kind) as sock:
        sock.settimeout(1)
        sock.connect(address)
        sock.send(message) if message else None
        return sock.recv(64)
"""

# name: the script, or (the script, the tiers that let it through beside bare)
LANDLOCK = {*kit.LANDLOCK, "landlock-weak"}
SAME_USER_WEAK = {"landlock-weak"}
READING = {
    "read the answers": "show(lambda: read(A['answers']))",
    "list the private directory": "show(lambda: os.listdir(A['private'])) or did(lambda: os.listdir(A['private']))",
    "read through a symbolic link": "os.symlink(A['private'], 'link'); show(lambda: read('link/answers.csv'))",
    "read through a hard link": "show(lambda: (os.link(A['answers'], 'hard'), read('hard')))",
    "read through the victim's root": "show(lambda: read(proc + '/root' + A['answers']))",
    "read through the victim's directory": "show(lambda: read(proc + '/cwd' + '/..' * 9 + A['answers']))",
    "read through dots": "show(lambda: read('../' * 30 + A['answers'][1:]))",
    "stat the answers": ("did(lambda: os.stat(A['answers']))", LANDLOCK),
    "read the repository": "did(lambda: read(A['repository'] + '/sandbox.py'))",
    "read shared memory": "show(lambda: read(A['shm']))",
    "read the environment": "show(lambda: read(proc + '/environ'))",
    "read the memory map": "did(lambda: read(proc + '/maps'))",
    "read memory": """
def heap():
    for line in read(proc + '/maps').decode().splitlines():
        if '[heap]' in line or '[stack]' in line:
            low, high = (int(x, 16) for x in line.split()[0].split('-'))
            print('GOT', read(proc + '/mem', low, high - low))
show(heap)""",
    "process_vm_readv": """
for line in read('/proc/self/maps').decode().splitlines():
    if '[stack]' in line: low = int(line.split()[0].split('-')[0], 16)
buffer = ctypes.create_string_buffer(8)
local = (ctypes.c_ulong * 2)(ctypes.addressof(buffer), 8)
remote = (ctypes.c_ulong * 2)(low, 8)
through('process_vm_readv', pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)""",
    "ptrace": "if through('ptrace', 16, pid, 0, 0) == 0: os.waitpid(pid, 0x40000000); call('ptrace', 17, pid, 0, 0)",
    "steal a descriptor": """
fd, _ = call('pidfd_open', pid, 0)
through('pidfd_getfd', fd, 0, 0) if fd >= 0 else print('no pidfd')""",
    "read the command line": ("show(lambda: read(proc + '/cmdline')) or did(lambda: read(proc + '/cmdline'))", LANDLOCK),
    "find the pid": ("str(pid) in os.listdir('/proc') and print('PWNED')", LANDLOCK),
}
WRITING = {
    "write to an open directory": "did(lambda: open(A['open'] + '/x', 'w'))",
    "write to /var/tmp": "did(lambda: os.close(os.open('/var/tmp', os.O_TMPFILE | os.O_RDWR, 0o600)))",
    "open /etc/passwd for writing": "did(lambda: open('/etc/passwd', 'r+'))",
    "plant a module in the interpreter": """
folder = next(p for p in sys.path if p.startswith((sys.prefix, '/usr')) and os.path.isdir(p))
did(lambda: os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)))""",
    "append to the data set": "did(lambda: open('data/train.csv', 'a').write('9,9,9'))",
    "append to the data set by its path": "did(lambda: open(A['dataset'], 'a').write('9,9,9'))",
    "truncate the data set": "did(lambda: os.truncate('data/train.csv', 3))",
    "rename the data set": "did(lambda: os.rename('data/train.csv', 'data/other.csv'))",
    "remove the data set": "did(lambda: os.unlink(os.path.realpath('data/train.csv')))",
    "chmod the answers": "show(lambda: os.chmod(A['answers'], 0o777))",
    "touch the data set": "show(lambda: os.utime('data/train.csv', (1, 1)))",
    "hard link to the data set": "did(lambda: os.link(A['dataset'], 'mine.csv'))",
    "open a kernel setting for writing": "did(lambda: open('/proc/sys/kernel/core_pattern', 'r+'))",
    "open a cgroup for writing": """
tops = [t for t, _, names in os.walk('/sys/fs/cgroup') if 'cgroup.procs' in names][:3]
for top in tops: did(lambda: open(top + '/cgroup.procs', 'r+'))""",
    "be spared when memory runs out": """
time.sleep(0.1)
did(lambda: os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-900'))""",
}
TROUBLING = {
    "signal the victim": ("did(lambda: os.kill(pid, 10))", SAME_USER_WEAK),
    "stop the victim": ("did(lambda: os.kill(pid, 19))", SAME_USER_WEAK),
    "kill the victim": ("did(lambda: os.kill(pid, 9))", SAME_USER_WEAK),
    "kill the victim by descriptor": (
        "fd, _ = call('pidfd_open', pid, 0)\nif fd >= 0 and call('pidfd_send_signal', fd, 9, 0, 0)[0] == 0: print('PWNED')",
        SAME_USER_WEAK,
    ),
    "take the victim's descriptors": "did(lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (50, 50)))",
    "pin the victim to a core": "did(lambda: os.sched_setaffinity(pid, {max(os.sched_getaffinity(0))}))",
    "slow the victim down": "did(lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))",
    "make the victim idle": "did(lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))",
    "raise one's own limits": """
which = resource.RLIMIT_NOFILE
did(lambda: resource.setrlimit(which, (2048, 2048)))""",
}
NETWORK = {
    "connect by TCP": "show(lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', A['tcp'])))",
    "ask by UDP": "show(lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', A['udp']), b'?'))",
    "listen to the world": "did(lambda: socket.create_server(('0.0.0.0', 0)))",
    "an abstract socket": (
        "show(lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, chr(0) + A['abstract']))", SAME_USER_WEAK
    ),
    "a socket with a path": ("show(lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, A['socket']))", LANDLOCK),
    "a netlink socket": "did(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))",
    "a packet socket": "did(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))",
    "io_uring": "through('io_uring_setup', 0, 0)",
}  # fmt: skip
KERNEL = {
    "unshare": "through('unshare', 0x04000000)",
    "clone into namespaces": "if through('clone', 0x04000000 | 17, 0, 0, 0, 0) == 0: os._exit(0)",
    "clone3": "result, number = call('clone3', 0, 0)\nif number != errno.ENOSYS: print('PWNED', number)",
    "mount": "through('mount', b'none', b'/nonexistent', b'nothing', 0, 0)",
    "the new mount calls": "through('fsopen', b'tmpfs', 0)",
    "pivot_root": "through('pivot_root', b'.', b'.')",
    "chroot": "through('chroot', b'.')",
    "setns": "through('setns', -1, 0)",
    "keyctl": "through('keyctl', 0, -3, 0)",
    "bpf": "through('bpf', 0, 0, 0)",
    "perf": "through('perf_event_open', bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "through('userfaultfd', 1)",
    "System V memory": "result = through('shmget', 0, 4096, 0o1600)\nif result >= 0: call('shmctl', result, 0, 0)",
    "POSIX queues": "through('mq_open', b'attack', 0, 0, 0)",
    "memory without a process": "through('memfd_create', b'x', 0)",
    "a file by its handle": "through('open_by_handle_at', -1, 0, 0)",
    "the kernel's log": "through('syslog', 10, 0, 0)",
    "load a module": "through('init_module', 0, 0, b'')",
    "reboot (without the magic)": "through('reboot', 0, 0, 0, 0)",
    "become another user": "did(lambda: os.setuid(12345))",
    "make a device": "did(lambda: (os.mknod('device', 0o20600, os.makedev(1, 3)), os.unlink('device')))",
    "calls of another architecture": """
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid); int 0x80; ret
print('start', flush=True)
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
if function() == os.getpid(): print('PWNED')""",
}
GROUPS = {"reading": READING, "writing": WRITING, "troubling": TROUBLING, "network": NETWORK, "kernel": KERNEL}
ATTACKS = {name: attack for group in GROUPS.values() for name, attack in group.items()}
MORE_NUMBERS = {"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424)}
# What even without walls only root can do, and, of root, only one with CAP_SYS_RESOURCE.
NEED_ROOT = {
    "write to /var/tmp", "open /etc/passwd for writing", "plant a module in the interpreter",
    "open a kernel setting for writing", "open a cgroup for writing", "be spared when memory runs out",
    "raise one's own limits", "a packet socket", "unshare", "clone into namespaces", "mount", "the new mount calls",
    "pivot_root", "chroot", "setns", "bpf", "perf", "userfaultfd", "a file by its handle", "the kernel's log",
    "load a module", "reboot (without the magic)", "become another user", "make a device", "io_uring",
}  # fmt: skip


@pytest.fixture(scope="module", params=kit.TRAINERS)
def trainer(request):
    trainer = kit.Trainer(request.param)
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def numbers():
    tables = syscalls.REFUSED | syscalls.ABSENT | syscalls.MEMFD | MORE_NUMBERS | {"clone": syscalls.CLONE}
    return {name: syscalls.number(row) for name, row in tables.items()}


@pytest.fixture(scope="module")
def victims(trainer):
    """The living victim of this trainer, if it has one."""
    alive = []
    yield alive
    for victim in alive:
        victim.close()


@pytest.fixture
def victim(trainer, victims):
    """Unharmed at the start of each test; a new one only after harm, to save time."""
    if trainer.why_not:
        pytest.skip(trainer.why_not)
    if victims and victims[0].harmed():
        victims.pop().close()
    if not victims:
        victims.append(kit.Victim(trainer.uid))
    return victims[0]


def possible(name: str, output: str) -> bool:
    """Whether an attack can work here at all; a kernel without modules, say, has no call to load one."""
    with open("/proc/self/status") as file:
        capabilities = int(re.search(r"CapEff:\s*(\w+)", file.read())[1], 16)
    if name in ("be spared when memory runs out", "raise one's own limits") and not capabilities >> 24 & 1:
        return False
    missing = "Function not implemented" in output or "No such file" in output
    return not missing and (os.geteuid() == 0 or name not in NEED_ROOT)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, trainer, victim, numbers):
    attack = ATTACKS[name]
    code, leaks = (attack, set()) if isinstance(attack, str) else attack
    if name == "calls of another architecture" and syscalls.MACHINE != "x86_64":
        pytest.skip("of x86_64 only")
    result = trainer.run(
        PRELUDE + code, json.dumps(victim.aims | {"numbers": numbers}),
        read_only=[[str(victim.home / "dataset"), "data"]], hidden=[victim.aims["private"]],
        limits={"wall_s": 10},
    )  # fmt: skip
    harmed = victim.harmed()
    succeeded = victim.token in result.stdout or "PWNED" in result.stdout or harmed
    told = f"{result.stdout}\n{result.stderr}\nharmed: {harmed}"
    assert result.reason in ("ok", "signal", "exit"), told
    if trainer.name == "bare":
        if not succeeded and not possible(name, result.stdout):
            pytest.skip(f"not possible on this machine even without walls: {result.stdout.strip()}")
        assert succeeded, f"an attack that cannot succeed shows nothing\n{told}"
    elif trainer.name in leaks:
        assert succeeded, f"the tier is better than it says: say so\n{told}"
    else:
        assert not succeeded, told
        assert result.reason == "ok" or "architecture" in name, told  # it was refused, it did not just crash


def test_the_filter_refuses_every_call_of_its_table(trainer, numbers):
    """Arguments are nonsense, so that nothing can happen even without a filter; the kernel's own answer to them
    is rarely EPERM."""
    if trainer.why_not or trainer.name == "bare":
        pytest.skip(trainer.why_not or "bare has no filter")
    wrong = trainer.run(
        PRELUDE.replace("A = ", "A = {'pid': 0, 'numbers': json.loads(sys.argv[1])} #").replace("%d\" % A", "%d\" % A")
        + """
for name, number in A['numbers'].items():
    if number is not None and name not in ('clone', 'pidfd_open', 'pidfd_send_signal'):
        result = call(name, -1, -1, -1, -1, -1, -1)
        if result[0] != -1 or result[1] not in (errno.EPERM, errno.ENOSYS):
            print(name, result)
""",
        json.dumps(numbers),
    )
    assert (wrong.reason, wrong.stdout) == ("ok", "")


def test_nothing_is_inherited(trainer):
    """Neither variables nor descriptors of the trainer (it has API_KEY, and dozens of descriptors here)."""
    if trainer.why_not:
        pytest.skip(trainer.why_not)
    result = trainer.run("import os\nprint(dict(os.environ))\nprint(sorted(map(int, os.listdir('/proc/self/fd'))))")
    assert "hunter2" not in result.stdout and "PYTHONHASHSEED" in result.stdout
    assert result.stdout.splitlines()[1] == "[0, 1, 2, 3]"  # 3 lists the others


def test_shared_memory_does_not_stay(trainer):
    if trainer.why_not or trainer.name == "bare":
        pytest.skip(trainer.why_not or "bare does not clean /dev/shm")
    name = f"/dev/shm/left-{os.getpid()}"
    trainer.run(f"open({name!r}, 'w').write('x')")
    assert not os.path.exists(name)


def test_private_directories_are_private(trainer):
    if trainer.name not in kit.STRONG or trainer.why_not:
        pytest.skip(trainer.why_not or "of the ns tier")
    result = trainer.run(
        "import os\nfor p in ('/', '/tmp', '/dev/shm', '/root', '/home', '/srv', '/etc'):\n"
        "    print(p, sorted(os.listdir(p)) if os.path.exists(p) else None)\n"
        "print(sorted(n for n in os.listdir('/proc') if n.isdigit()), os.uname().nodename)"
    )
    seen = dict(re.findall(r"(/\S*) (\[.*\]|None)", result.stdout))
    assert seen["/tmp"] == seen["/dev/shm"] == "[]"
    assert "passwd" in seen["/etc"] and "shadow" not in seen["/etc"]
    assert result.stdout.splitlines()[-1] == "['1', '2'] sandbox"
    parents = {p for prefix in (sys.prefix, sys.base_prefix) for p in map(str, Path(prefix).parents)}
    for path in ("/root", "/home", "/srv"):  # at most the way to the interpreter
        assert seen[path] == "None" or path in parents


def test_the_victim_can_be_harmed():
    """The fixture itself: without a sandbox every kind of damage shows."""
    for what in ("kill -USR1 {pid}", "kill -STOP {pid}", "kill -9 {pid}", "renice -n 5 -p {pid}", "touch {answers}"):
        victim = kit.Victim(None)
        assert not victim.harmed()
        subprocess.run(what.format(**victim.aims).split(), check=True, capture_output=True)
        assert victim.harmed(), what
        victim.close()
