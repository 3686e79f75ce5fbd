"""Scripts of the repository as processes that need not import torch first: forked from one that has.

A real start costs 2.5 to 7 s of imports, a forked one 0.05 s. While `subprocess.Popen` is replaced (conftest.py does it
in every test process), a command `python SCRIPT ...` or `python -m MODULE ...` of ours becomes a fork of the server, a
rank that a forked launcher starts becomes a fork of that launcher. To the code and to the tests it is a process like
any other: its own pid, parent, session, working directory, environment, /proc/PID/cmdline, signals and exit code.
Everything else is started as usual, and so is everything under REAL_PROCESSES=1 or within `real_processes()`.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "FORK_SERVER"  # the environment variable with the server's socket
MODULES = {"accelerate.commands.launch", "torch.distributed.run", "train.run"}
WORKER = "import sys;exec(eval(sys.stdin.readline()))"  # how pytest-xdist starts a worker
PRELOADED = """
torch torch.distributed.run torch._dynamo torch.distributed.fsdp torch.utils.tensorboard accelerate.commands.launch
matplotlib.pyplot scipy.stats webdataset
numba simplejpeg nvidia.dali.fn pipeline.read.loader pipeline.read.portable pipeline.verify pipeline.write.build
train.build train.loop train.cli train.preflight train.classifier train.evaluation
tools.make_shards tools.check_shards tools.evaluate tools.predict tools.export tools.replay
"""
ROOM = 65536  # bytes for a process's command line and environment as /proc shows them
AT_IMPORT = ("PYTHON", "LANG", "LC_", "CXX", "NUMBA")  # what is read when Python or a package is loaded
STARTED = dict(os.environ)
Real = subprocess.Popen


class _Mode:
    real = os.environ.get("REAL_PROCESSES", "") == "1"
    forked = False  # this process is one of the server's


@contextlib.contextmanager
def real_processes() -> Iterator[None]:
    before, _Mode.real = _Mode.real, True
    try:
        yield
    finally:
        _Mode.real = before


def ours(argv: object, env: dict[str, str]) -> bool:
    """Whether the command is a script of this repository, started by this Python in the same way as this process."""
    if isinstance(argv, (str, bytes)) or _Mode.real:
        return False
    words = [os.fspath(word) for word in argv]
    if len(words) < 2 or words[0] != sys.executable:
        return False
    if any(env.get(name) != STARTED.get(name) for name in {*env, *STARTED} if name.startswith(AT_IMPORT)):
        return False
    words = words[2:] if words[1] == "-u" else words[1:]
    if words[0] in ("-m", "-c"):
        return words[1] in {*MODULES, WORKER}
    script = Path(words[0])
    return script.is_absolute() and script.exists() and script.resolve().is_relative_to(ROOT)


def cores_for(argv: list[object]) -> list[int]:
    """The cores of the process: one if two workers share them, so that its threads do not wait for each other.

    A launcher's ranks divide all cores.
    """
    cores, worker = sorted(os.sched_getaffinity(0)), os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or _Mode.forked or "-m" in argv:
        return cores
    return [cores[int(worker.removeprefix("gw")) % len(cores)]]


class Popen(Real):
    """subprocess.Popen that forks scripts of this repository."""

    _status: socket.socket | None = None

    def _execute_child(self, *args: object) -> None:
        given = inspect.signature(Real._execute_child).bind(self, *args).arguments
        env = dict(os.environ if given["env"] is None else given["env"])
        odd = given["preexec_fn"] or given["shell"] or given["executable"] or given["pass_fds"]
        if odd or not ours(given["args"], env):
            super()._execute_child(*args)
            return
        job = {
            "argv": [os.fspath(word) for word in given["args"]],
            "env": env,
            "cwd": os.fspath(given["cwd"] or os.getcwd()),
            "session": bool(given["start_new_session"]),
            "cores": cores_for(given["args"]),
        }
        ends = zip((given["p2cread"], given["c2pwrite"], given["errwrite"]), range(3))
        fds = [end if end != -1 else standard for end, standard in ends]
        if _Mode.forked:
            # Python ignores what a signal's handler raises within the hooks of os.fork
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a launcher has threads, which wait
                self.pid = os.fork()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if not self.pid:
                become(job, fds)
        else:
            self._ask(job, fds)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))

    def _ask(self, job: dict, fds: list[int]) -> None:
        if ADDRESS not in os.environ:
            start()
        self._status = socket.socket(socket.AF_UNIX)
        self._status.connect("\0" + os.environ[ADDRESS])
        text = json.dumps(job).encode()
        self._status.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        self._status.sendall(len(text).to_bytes(4, "big") + text)
        self.pid = self._number()

    def _number(self) -> int:
        data = receive(self._status, 4)
        return int.from_bytes(data, "big") if len(data) == 4 else signal.SIGKILL  # the server has ended

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        found = self.pid, self._number()
        self._status.close()
        return found

    def _internal_poll(self, *args: object, **options: object) -> int | None:
        if self._status is None or self._status.fileno() < 0:  # closed by the garbage collector
            return super()._internal_poll(*args, **options)
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
        return self.returncode


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


PROGRAM = f"""#!{sys.executable} -S
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import fork_server
words = [os.path.abspath(word) if word.endswith(".py") and os.path.exists(word) else word for word in sys.argv[1:]]
if sys.argv[0].endswith("accelerate"):
    words = ["-m", "accelerate.commands.launch", *words[1:]]
sys.exit(fork_server.Popen([sys.executable, *words]).wait())
"""


def write_programs(folder: Path, *names: str) -> Path:
    """python, python3 or accelerate for shell scripts: programs that ask the server for forks. Signals reach none."""
    if ADDRESS not in os.environ:
        start()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    return folder


# The server


def start() -> None:
    """Starts a server for this process and for those that inherit its environment; it ends with this process."""
    listening = socket.socket(socket.AF_UNIX)
    address = f"imagenet-express-{os.getpid()}"
    listening.bind("\0" + address)
    listening.listen(64)
    os.environ[ADDRESS] = address
    argv = [sys.executable, __file__, str(listening.fileno()), " " * ROOM]
    env = os.environ | {"ROOM_FOR_ENVIRONMENT": " " * ROOM}
    server = Real(argv, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], cwd=ROOT, env=env, start_new_session=True)
    atexit.register(server.communicate)  # closes its stdin
    listening.close()


def serve(listening: socket.socket) -> None:
    """Forks for each request one that forks the process and waits for it, until stdin is closed."""
    while True:
        ready, _, _ = select.select([sys.stdin, listening], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if user == os.getuid() and not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            attend(connection)
        connection.close()


def attend(connection: socket.socket) -> None:
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_LEN(3 * 4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    job = json.loads(receive(connection, int.from_bytes(receive(connection, 4), "big")))
    pid = os.fork()
    if not pid:
        connection.close()
        become(job, list(fds))
    for fd in (*fds, 0, 1, 2):
        os.close(fd)
    with contextlib.suppress(OSError):  # the process that asked may have ended
        connection.sendall(pid.to_bytes(4, "big"))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(4, "big"))
    os._exit(0)


def become(job: dict, fds: list[int]) -> None:
    """Turns this fork into the requested process, runs it and exits."""
    _Mode.forked, code = True, 1
    try:
        if job["session"]:
            os.setsid()
        os.sched_setaffinity(0, job["cores"])
        high = [os.dup(fd) for fd in fds]  # above 2, so that none is overwritten before it is used
        for standard, fd in enumerate(high):
            os.dup2(fd, standard)
        for fd in {*high, *(fd for fd in fds if fd > 2)}:
            os.close(fd)
        open_streams()
        # Also if the tests were started by `&` or nohup, whose processes ignore SIGINT, SIGQUIT and SIGHUP
        for number in ("INT", "QUIT", "HUP", "TERM", "USR1", "CHLD"):
            signal.signal(getattr(signal, f"SIG{number}"), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        tempfile.tempdir = None  # found for the server, whose TMPDIR may be another
        show(job)
        code = run(job["argv"][1:])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def open_streams() -> None:
    """The standard streams, as Python opens them: the server's were made for other files."""
    options = {"encoding": sys.stdout.encoding, "closefd": False}
    sys.stdin = sys.__stdin__ = os.fdopen(0, **options)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", **options)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", **options)


def show(job: dict) -> None:
    """Overwrites the memory that /proc/PID shows as command line and environment."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begins = [int(fields[45]), int(fields[47])]  # arg_start and env_start
    ends = [int(fields[46]), int(fields[48])]
    texts = [job["argv"], [f"{name}={value}" for name, value in job["env"].items()]]
    with contextlib.suppress(OSError), open("/proc/self/mem", "r+b", buffering=0) as memory:  # not in every sandbox
        for begin, end, words in zip(begins, ends, texts):
            text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - begin - 1]
            memory.seek(begin)
            memory.write(text.ljust(end - begin, b"\0"))


def run(argv: list[str]) -> int:
    """The exit code of a script that is run as `python` would."""
    import torch

    # What the library reads when it is loaded, which was in the server
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    if argv[0] == "-u":
        argv = argv[1:]
        sys.stdout.reconfigure(write_through=True)
    interrupted = False
    try:
        if argv[0] == "-c":  # a worker asks the server itself
            _Mode.forked, sys.argv = False, argv[:1]
            exec(argv[1], {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], os.getcwd()
            sys.modules.pop(argv[1], None)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
            runpy.run_path(argv[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code
    except BaseException as err:
        interrupted, code = isinstance(err, KeyboardInterrupt), 1
        sys.excepthook(*sys.exc_info())
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return int(code or 0) & 255


def warm() -> None:
    """Does once what most processes do first: resolves the command line's types and loads compiled code."""
    import numpy as np
    import simplejpeg
    import torch

    from pipeline.read import make_backend
    from pipeline.write import cuts, resize
    from train import cli

    cli.parse(["demo", "--data.shards", "x"])
    for dtype in ("float32", "uint8"):
        make_backend.prepare("portable", dtype, torch.device("cpu"))
    resize.prepare()
    cuts.find(simplejpeg.encode_jpeg(np.zeros((32, 32, 3), np.uint8)), check_one_in=1)


def main() -> None:
    sys.modules["tests.fork_server"] = sys.modules["__main__"]
    subprocess.Popen = Popen  # before anything imports it by name
    sys.path[0] = str(ROOT)
    listening = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    serve(listening)


if __name__ == "__main__":
    main()
