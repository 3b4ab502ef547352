"""Closes this process off, then becomes the Python interpreter on one program. A script for `sandbox`, with the standard library alone.

    python -I -S sandbox_child.py '{"seconds": 5, "memory": 268435456, "closed": true}' PROGRAM.py ARGUMENTS

Limits: processor time, memory, no file written, few open files, no core. Landlock (kernel 5.13 and later, docs.kernel.org/userspace-api/landlock.html)
leaves nothing to read but the interpreter, the system's libraries and the program. A seccomp filter refuses system calls by which a program reaches
beyond itself: new processes and threads, sockets, signals, other processes' memory, modes and owners of files, namespaces, io_uring (which would do
all that past the filter). Both hold for the process and whatever it becomes; neither needs privileges. A root user's capabilities are given up.

It is our own, since the landlock package closes files alone (tests/test_sandbox.py shows what that leaves open) and bubblewrap needs user namespaces,
which containers and many distributions forbid.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

LACKING = 97
"""exit code where `closed` is asked and the kernel cannot"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""audit numbers of linux/audit.h"""
# System calls refused: name, number on x86_64, number on aarch64 (None: it has none).
REFUSED = (
    *(("clone", 56, 220), ("fork", 57, None), ("vfork", 58, None), ("clone3", 435, 435)),
    *(("socket", 41, 198), ("socketpair", 53, 199), ("io_uring_setup", 425, 425)),
    *(("kill", 62, 129), ("tkill", 200, 130), ("tgkill", 234, 131), ("rt_sigqueueinfo", 129, 138), ("pidfd_open", 434, 434)),
    *(("pidfd_send_signal", 424, 424), ("ptrace", 101, 117), ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271)),
    *(("truncate", 76, 45), ("chmod", 90, None), ("fchmod", 91, 52), ("fchmodat", 268, 53), ("fchmodat2", 452, 452)),
    *(("chown", 92, None), ("fchown", 93, 55), ("lchown", 94, None), ("fchownat", 260, 54), ("utime", 132, None), ("utimes", 235, None)),
    *(
        ("futimesat", 261, None),
        ("utimensat", 280, 88),
        ("setxattr", 188, 5),
        ("lsetxattr", 189, 6),
        ("fsetxattr", 190, 7),
        ("setxattrat", 463, 463),
    ),
    *(
        ("removexattr", 197, 14),
        ("lremovexattr", 198, 15),
        ("fremovexattr", 199, 16),
        ("removexattrat", 466, 466),
        ("unshare", 272, 97),
        ("setns", 308, 268),
    ),
    *(("setpriority", 141, 140), ("sched_setaffinity", 203, 122), ("sched_setscheduler", 144, 119), ("ioprio_set", 251, 30)),
    *(("keyctl", 250, 219), ("add_key", 248, 217), ("request_key", 249, 218), ("bpf", 321, 280), ("perf_event_open", 298, 241)),
    *(("userfaultfd", 323, 282), ("shmget", 29, 194), ("msgget", 68, 186), ("semget", 64, 190), ("mq_open", 240, 180)),
)
PRLIMIT64 = {"x86_64": 302, "aarch64": 261}
CAPSET = {"x86_64": 126, "aarch64": 91}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ, LIST, RUN = 1 << 2, 1 << 3, 1 << 0
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    wanted, program = json.loads(sys.argv[1]), os.path.realpath(sys.argv[2])
    python = os.path.realpath(sys.executable)
    seconds, memory = max(1, round(wanted["seconds"])), wanted["memory"]
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a run that is killed leaves no program behind
    for name, most in (("CPU", seconds), ("AS", memory), ("FSIZE", 0), ("NOFILE", 32), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    lacking = [name for name, close in (("landlock", closed_files), ("seccomp", closed_calls)) if not close(program)]
    if wanted["closed"] and lacking:
        print(" and ".join(lacking), flush=True)
        sys.exit(LACKING)
    # As -I, but for the one variable without which sets come in another order each time.
    os.execve(python, [python, "-s", "-P", "-S", "-B", program, *sys.argv[3:]], {"PYTHONHASHSEED": "0"})


def closed_files(program: str) -> bool:
    """Whether Landlock now leaves only the interpreter, system libraries and the program to read, and nothing to write."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    # Rights by version of the interface: 13 at first, then renames, truncation and device control.
    handled = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    ruleset = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", handled), ctypes.c_size_t(8), 0)
    for path in (sys.base_prefix, *SYSTEM, program):
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            rights = READ | RUN | (LIST if os.path.isdir(path) else 0)
            if libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, fd), 0):
                return False
            os.close(fd)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def closed_calls(program: str) -> bool:
    """Whether capabilities are gone and the seccomp filter is in place."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(CAPSET[machine], struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)):
        return False
    code = filter_of(machine)
    buffer = ctypes.create_string_buffer(code)
    # struct sock_fprog: a count of instructions and their address.
    return libc.prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)), 0, 0) == 0


def filter_of(machine: str) -> bytes:
    """The classic BPF program: refused calls fail with EPERM, all others pass; a call in another architecture's numbers ends the process."""
    load, equal, greater, back = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    numbers = [number for _, *by_machine in REFUSED if (number := by_machine[machine == "aarch64"]) is not None]
    program = [
        op(load, 4),
        op(equal, ARCHITECTURES[machine], 1),
        op(back, kill),
        op(load, 0),
        op(greater, 0x40000000, 0, 1),
        op(back, refuse),
    ]
    for number in numbers:
        program += [op(equal, number, 0, 1), op(back, refuse)]
    # prlimit64 on oneself (process 0) is how the C library reads its limits; on others it is refused. Arguments begin at byte 16.
    program += [op(equal, PRLIMIT64[machine], 0, 3), op(load, 16), op(equal, 0, 1), op(back, refuse), op(back, allow)]
    return b"".join(program)


if __name__ == "__main__":
    main()
