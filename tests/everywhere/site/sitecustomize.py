"""Takes from Python what the system named by SIMULATED_SYSTEM, "macos" or "windows", does not have.

Put on PYTHONPATH, it is run at the start of each Python, that of a server's workers too. What is imported first keeps
what it found then: the tests are of this project's modules, and not of the standard library. ``os.name``, paths and
the event loop's inside stay those of Linux.
"""

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

SYSTEM = os.environ["SIMULATED_SYSTEM"]
_FIRST = """asyncio asyncio.subprocess argparse array atexit collections concurrent.futures.thread contextlib ctypes
dataclasses email.message functools getpass heapq html http.client http.server importlib.metadata importlib.util
inspect ipaddress json logging.config mimetypes mmap multiprocessing.connection multiprocessing.reduction
multiprocessing.resource_tracker multiprocessing.spawn multiprocessing.util pathlib pickle platform queue random re
secrets select selectors shutil signal socket socketserver ssl string struct subprocess tempfile threading traceback
types typing unittest.mock urllib.request uuid weakref zlib""".split()
_PACKAGES = """anyio anyio._backends._asyncio cv2 google.protobuf.descriptor_pb2 google.protobuf.message_factory
grpc grpc.aio grpc_reflection.v1alpha.reflection h11 numpy numpy.random prometheus_client starlette
uvicorn watchfiles""".split()


def _drop(module: Any, names: str) -> None:
    """Removes the names, and for "NAME_*" all that begin so."""
    for name in names.split():
        every = [one for one in vars(module) if one.startswith(name[:-1])] if name.endswith("*") else [name]
        for one in every:
            vars(module).pop(one, None)


def _import(names: Iterable[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


def _refuse(*arguments: Any, **more: Any) -> Any:
    raise NotImplementedError("not by the usual event loop of this system")


def _without_linux() -> None:
    import mmap
    import resource
    import select
    import selectors
    import signal
    import socket
    import time

    _drop(
        os,
        "memfd_create MFD_* eventfd* EFD_* timerfd_* TFD_* sched_getaffinity sched_setaffinity sched_setscheduler "
        "sched_getscheduler sched_getparam sched_setparam sched_param pidfd_open PIDFD_* pipe2 splice SPLICE_* "
        "getrandom GRND_* posix_fadvise POSIX_FADV_* posix_fallocate copy_file_range unshare setns CLONE_* getresuid "
        "getresgid setresuid setresgid O_DIRECT O_TMPFILE O_PATH O_NOATIME waitid fdatasync",
    )
    _drop(
        socket,
        "SO_PEERCRED SO_PASSCRED SCM_CREDENTIALS SO_PEERSEC SO_BINDTODEVICE SO_PRIORITY SO_MARK SO_DOMAIN SO_PROTOCOL "
        "MSG_CMSG_CLOEXEC SOCK_CLOEXEC SOCK_NONBLOCK MSG_NOSIGNAL MSG_MORE MSG_ERRQUEUE MSG_CONFIRM TCP_USER_TIMEOUT "
        "TCP_QUICKACK TCP_CORK TCP_DEFER_ACCEPT TCP_LINGER2 TCP_INFO AF_NETLINK AF_PACKET AF_VSOCK AF_ALG AF_CAN "
        "AF_TIPC NETLINK_* PACKET_* VMADDR_* ALG_* CAN_* TIPC_*",
    )
    _drop(select, "epoll EPOLL*")
    _drop(selectors, "EpollSelector")
    if hasattr(os, "process_cpu_count"):  # which asks for the affinity, where there is one
        os.process_cpu_count = os.cpu_count
    _drop(
        mmap,
        "MADV_REMOVE MADV_DONTFORK MADV_DOFORK MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_MERGEABLE MADV_HWPOISON "
        "MADV_POPULATE* MAP_POPULATE",
    )
    _drop(signal, "SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD sigwaitinfo sigtimedwait pidfd_send_signal")
    _drop(resource, "prlimit RLIMIT_NICE RLIMIT_RT* RLIMIT_OFILE RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RUSAGE_THREAD")
    _drop(time, "CLOCK_BOOTTIME CLOCK_TAI")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "there is no such folder on this system", arguments[0])

    sys.addaudithook(hook)


def _be_macos() -> None:
    import fcntl
    import multiprocessing.reduction
    import selectors
    import socket
    import tempfile

    waitid, killpg, bind, connect = os.waitid, os.killpg, socket.socket.bind, socket.socket.connect
    peek = os.P_PID, os.WEXITED | os.WNOHANG | os.WNOWAIT

    def strict_killpg(group: int, number: int) -> None:
        try:
            ended = waitid(peek[0], group, peek[1])
        except ChildProcessError:
            ended = None
        if ended:
            raise PermissionError(1, "a process that has ended")
        killpg(group, number)

    def not_abstract(call: Any) -> Any:
        def checked(self: socket.socket, address: Any) -> Any:
            if self.family == socket.AF_UNIX and address[:1] in ("\0", b"\0"):
                raise OSError(2, "there are no abstract names on this system")
            return call(self, address)

        return checked

    _without_linux()
    _drop(fcntl, "F_ADD_SEALS F_GET_SEALS F_SEAL_* F_NOTIFY DN_* F_SETPIPE_SZ F_GETPIPE_SZ F_SETLEASE F_GETLEASE")
    os.killpg = strict_killpg
    socket.socket.bind, socket.socket.connect = not_abstract(bind), not_abstract(connect)  # type: ignore[method-assign]
    selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc, assignment]
    multiprocessing.reduction.ACKNOWLEDGE = True  # as it says of this system
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]
    sys.platform = "darwin"


def _be_windows() -> None:
    import asyncio
    import mmap
    import select
    import selectors
    import signal
    import socket

    def socketpair(*_: Any) -> tuple[socket.socket, socket.socket]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            one = socket.create_connection(listener.getsockname())
            return one, listener.accept()[0]

    asyncio.new_event_loop().close()  # the kind of loop is chosen by the system, once
    _without_linux()
    for (
        name
    ) in "fcntl resource pwd grp termios pty tty syslog posix readline crypt spwd nis _posixshmem uvloop".split():
        sys.modules[name] = None  # type: ignore[assignment]
    _drop(
        os,
        "fork* register_at_fork geteuid getuid getegid getgid getgroups initgroups setuid setgid killpg setsid getsid "
        "getpgid getpgrp setpgid setpgrp sysconf* confstr* pathconf* uname mkfifo mknod pread* pwrite* readv writev "
        "sendfile wait wait3 wait4 WNOHANG WUNTRACED WIF* WEXIT* WTERM* WSTOP* statvfs fstatvfs chown fchown lchown "
        "chroot nice getpriority setpriority getloadavg O_CLOEXEC O_NONBLOCK O_SYNC O_DSYNC O_NOCTTY O_DIRECTORY "
        "O_NOFOLLOW sched_* tcgetpgrp tcsetpgrp ttyname ctermid openpty posix_* POSIX_* lockf F_LOCK F_TLOCK sync "
        "fchdir EX_*",
    )
    _drop(
        socket,
        "AF_UNIX SO_REUSEPORT SCM_* CMSG_* send_fds recv_fds MSG_DONTWAIT MSG_EOR MSG_EOF MSG_CTRUNC",
    )
    _drop(select, "poll POLL* PIPE_BUF")
    _drop(selectors, "PollSelector")
    _drop(
        signal,
        "SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGPIPE SIGALRM SIGCHLD SIGSTOP SIGTSTP SIGCONT SIGTTIN SIGTTOU SIGBUS "
        "SIGTRAP SIGSYS SIGURG SIGVTALRM SIGPROF SIGWINCH SIGXCPU SIGXFSZ SIGIO pthread_kill pthread_sigmask "
        "sigpending sigwait setitimer getitimer ITIMER_* alarm pause siginterrupt SIG_BLOCK SIG_UNBLOCK SIG_SETMASK",
    )
    _drop(mmap, "PROT_* MAP_* MADV_*")
    socket.socketpair = socketpair  # type: ignore[assignment]
    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc, assignment]
    # Its usual loop watches no descriptors.
    loop = asyncio.SelectorEventLoop
    for name in ("add_reader", "remove_reader", "add_writer", "remove_writer", "add_signal_handler"):
        setattr(loop, name, _refuse)
    sys.platform = "win32"


_import(_FIRST)
if "tiny_model_server.worker" not in sys.orig_argv:  # which needs none of them, and starts more quickly so
    _import(_PACKAGES)
{"macos": _be_macos, "windows": _be_windows}[SYSTEM]()
