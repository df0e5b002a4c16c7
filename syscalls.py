"""The Linux calls that sandbox.py is built from, through ctypes: tables first, then thin wrappers.

Numbers are the kernel's own and never change (arch/*/entry/syscalls; from 424 on all machines agree).
Every wrapper raises OSError with the errno of the call. Nothing here decides a policy except the two
tables of what a sandboxed script may not call.
"""

import contextlib
import ctypes
import os
import struct
import sys

MACHINE = os.uname().machine if sys.platform == "linux" else ""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(MACHINE, 0)
SUPPORTED = bool(AUDIT_ARCH) and struct.calcsize("P") == 8 and sys.byteorder == "little"

# name: (x86_64, aarch64); None where the machine does not have the call.
# 1. Refused with EPERM: none of them is needed to train a model, and each reaches the kernel's
#    configuration, another process, or memory that the limits cannot see.
REFUSED = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # the kernel itself
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "delete_module": (176, 106), "finit_module": (313, 273), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
    "vhangup": (153, 58), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42),
    # memory that outlives its process or that no counter shows
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "memfd_secret": (447, 447),
    # watching files that cannot be read
    "inotify_add_watch": (254, 27),
}  # fmt: skip
# 2. Answered with ENOSYS, so that callers fall back to the older call, which the filter can judge.
#    io_uring would open sockets behind the filter's back; clone3 hides its flags in memory.
ABSENT = {
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "clone3": (435, 435),
}  # fmt: skip
# 3. Refused unless a GPU is granted (the CUDA driver needs it): memory that no process has mapped.
MEMFD = {"memfd_create": (319, 279)}
# 4. Judged by an argument: the family of a socket, the namespace flags of clone.
CLONE, SOCKET, SOCKETPAIR = (56, 220), (41, 198), (53, 199)
# 5. Only on oneself, where the script shares its user with the trainer: the arguments that must be 0.
SELF_ONLY = {
    (302, 261): [0],  # prlimit64
    (203, 122): [0],  # sched_setaffinity: on oneself it stays, else torch sees one core
    (144, 119): [0],  # sched_setscheduler
    (142, 118): [0],  # sched_setparam
    (314, 274): [0],  # sched_setattr
    (141, 140): [0, 1],  # setpriority: which (a process, not all of a user's) and who
    (251, 30): [0, 1],  # ioprio_set: `which` is never 0, so never
}
# 6. Pretended to succeed, same case: Landlock does not govern them, shutil.copytree wants them.
PRETENDED = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
TRUNCATE = (76, 45)  # by path: refused where Landlock does not govern it yet (ABI below 3)

# Calls that the sandbox makes itself and that have no wrapper in Python 3.11.
NUMBERS = {
    "pivot_root": (155, 41), "capset": (126, 91), "seccomp": (317, 277), "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}  # fmt: skip

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEW_ANY = 0x7E020000  # these and CLONE_NEWCGROUP
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
AF_UNIX, EPERM, EACCES, ENOSYS = 1, 1, 13, 38

_libc = ctypes.CDLL(None, use_errno=True)


def number(row: tuple) -> int | None:
    return row[0 if MACHINE == "x86_64" else 1]


def _check(result: int, what: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


def call(name: str, *args) -> int:
    """A raw system call; integers are passed as longs, bytes as pointers."""
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _check(_libc.syscall(ctypes.c_long(number(NUMBERS[name])), *args), name)


def prctl(option: int, *args: int) -> int:
    # variadic: each argument a long, and all five given, since the kernel checks the unused ones
    args = [ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *args), f"prctl {option}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [os.fsencode(t) if t is not None else None for t in (source, target, kind)]
    result = _libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(options) or None)
    _check(result, f"mount {source or ''} on {target}")


def unmount(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    call("pivot_root", os.fsencode(new), os.fsencode(old))


def mount_setattr(path: str, flags: int) -> None:
    """Add MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC to a mount and all mounts below it (Linux 5.12)."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)  # the MOUNT_ATTR_ bits of these four equal the MS_ bits
    call("mount_setattr", -100, os.fsencode(path), 0x8000, attributes, len(attributes))


def drop_capabilities(uid: int | None) -> None:
    """No capability, now or after an exec; and become user `uid` where one is given (as root)."""
    for capability in range(64):
        with contextlib.suppress(OSError):  # beyond the last capability, or not ours to drop
            prctl(PR_CAPBSET_DROP, capability)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


# Landlock: access rights of the file system, by bit
EXECUTE, WRITE, READ, READ_DIR, MAKE_CHAR, MAKE_BLOCK = 1, 2, 4, 8, 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
READ_ONLY = EXECUTE | READ | READ_DIR
READ_WRITE = 0xFFFF & ~(MAKE_CHAR | MAKE_BLOCK)
_OF_FILES = EXECUTE | WRITE | READ | _TRUNCATE | _IOCTL


def landlock_abi() -> int:
    """0 without Landlock. 1: Linux 5.13, 2: 5.19, 3: 6.2, 4: 6.7 (TCP), 5: 6.10, 6: 6.12 (signals)."""
    try:
        return call("landlock_create_ruleset", None, 0, 1) if SUPPORTED else 0
    except OSError:
        return 0


def landlock(rules: list[tuple[str, int]] | None, abi: int) -> None:
    """Restrict this thread, for ever: what no rule allows is denied.

    Args:
        rules: (path, rights); a path that does not exist is skipped. None governs signals alone:
            processes of this domain and of those nested in it stay within reach, others do not.
    """
    handled = 0xFFFF & {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}.get(abi, 0xFFFF)
    network = 3 if abi >= 4 else 0  # bind and connect TCP
    scoped = 3 if abi >= 6 else 0  # abstract sockets 1, signals 2
    if rules is None:
        handled, network, scoped = 0, 0, 2
    attributes = struct.pack("QQQ", handled, network, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = call("landlock_create_ruleset", attributes[:size], size, 0)
    for path, rights in rules or ():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights &= handled if os.path.isdir(path) else handled & _OF_FILES
        # struct landlock_path_beneath_attr is packed: a __u64 and an __s32
        call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def seccomp(same_user: bool, gpu: bool, abi: int) -> None:
    """Install the filter of the tables above on this thread and all it starts; no way back.

    Args:
        same_user: the script runs as the trainer's own user, outside a namespace: tables 5 and 6.
        gpu: memfd_create stays. abi: Landlock's; below 3 it does not govern truncate.
    """
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
    allow, kill, errno = 0x7FFF0000, 0x80000000, 0x00050000
    program = []

    def add(code: int, k: int, yes: int = 0, no: int = 0) -> None:
        program.append(struct.pack("HBBI", code, yes, no, k))

    def answer(rows, value: int) -> None:
        for row in rows:
            if number(row) is not None:
                add(equal, number(row), 0, 1)
                add(give, errno | value)

    def by_argument(row, indices: list, test: int, k: int, on_match: int, otherwise: int) -> None:
        # the low half of an argument is enough: all of these are 32-bit integers to the kernel
        add(equal, number(row), 0, 3 * len(indices) + 1)
        for index in indices:
            add(load, 16 + 8 * index)
            add(test, k, 1, 0)
            add(give, otherwise)
        add(give, on_match)

    add(load, 4)
    add(equal, AUDIT_ARCH, 1, 0)
    add(give, kill)  # a 32-bit call (int 0x80) would be read with the wrong table
    add(load, 0)
    if MACHINE == "x86_64":
        add(at_least, 0x40000000, 0, 1)
        add(give, kill)  # x32
    answer(ABSENT.values(), ENOSYS)
    answer(REFUSED.values(), EPERM)
    if not gpu:
        answer(MEMFD.values(), EPERM)
    if abi < 3:
        answer([TRUNCATE], EPERM)
    by_argument(CLONE, [0], any_bit, CLONE_NEW_ANY, errno | EPERM, allow)
    for row in (SOCKET, SOCKETPAIR):
        by_argument(row, [0], equal, AF_UNIX, allow, errno | EACCES)
    if same_user:
        answer(PRETENDED.values(), 0)
        for row, indices in SELF_ONLY.items():
            by_argument(row, indices, equal, 0, allow, errno | EPERM)
    add(give, allow)

    code = ctypes.create_string_buffer(b"".join(program))
    fprog = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    speculation_stays = 4  # SPEC_ALLOW: without it kernels before 5.16 slow every filtered process
    call("seccomp", 1, speculation_stays, fprog)
