"""Child processes that answer JSON lines and may be killed: for compilers that hang or crash.

Started afresh (never forked), each in a process group of its own, so that what a child starts dies
with it.  Nothing is pickled, and the caller's `__main__` is not imported again.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from hsgen import store

Failed = Literal["timeout", "crash", "error"]
JsonObject = dict[str, Any]  # one line of text, checked where it is read
Environment = Callable[[Path], Mapping[str, str]]

LAST_WORDS = 2000


class WorkerError(Exception):
    """A child gave no answer: it was late, or it died."""

    def __init__(self, kind: Failed, message: str) -> None:
        super().__init__(message)
        self.kind: Failed = kind


class Worker:
    """One child, started when first asked and again after it died.  For one thread at a time.

    Args:
        command: arguments of this Python.
        environment: what the child's environment is, given a folder that is its own.
    """

    def __init__(self, command: Sequence[str], environment: Environment) -> None:
        self._command = (sys.executable, *command)
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._starting = threading.Lock()
        self._stopped = False

    def ask(self, request: JsonObject, timeout: float) -> JsonObject:
        """Send one line, wait for one line.

        Raises:
            WorkerError: late or dead; the child and all that it started are gone.
        """
        try:
            with self._starting:
                process = self._process or self._start()
            deadline = time.monotonic() + timeout
            self._send(process, json.dumps(request).encode() + b"\n", deadline)
            return json.loads(self._receive(process, deadline))
        except WorkerError as error:
            said = self._last_words()
            self.close()
            raise WorkerError(error.kind, f"{error} {said}".strip()) from error
        except (OSError, ValueError, EOFError) as error:
            message = self._obituary(error)
            self.close()
            raise WorkerError("crash", message) from error

    def stop(self) -> None:
        """Kill the child, or the one that another thread is about to start, and start no more."""
        with self._starting:
            self._stopped = True
            self.kill()

    def kill(self) -> None:
        """End the child's process group; a thread that waits for its answer learns it at once."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child and forget what it wrote."""
        self.kill()
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._stopped:
            raise WorkerError("crash", "stopped before it began")
        home = store.private_directory()
        if home is None:
            raise WorkerError("error", "no folder is writable, and compilers need temporary files")
        self._folder = tempfile.TemporaryDirectory(dir=home, ignore_cleanup_errors=True)
        self._log = tempfile.TemporaryFile(dir=home)  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(self._environment(Path(self._folder.name))),
            start_new_session=True,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "both were asked for"
            os.set_blocking(pipe.fileno(), False)
        return self._process

    def _send(self, process: subprocess.Popen[bytes], line: bytes, deadline: float) -> None:
        assert process.stdin is not None
        pipe, view = process.stdin.fileno(), memoryview(line)
        while view:
            _wait(pipe, select.POLLOUT, deadline)
            view = view[os.write(pipe, view) :]

    def _receive(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        pipe, parts = process.stdout.fileno(), list[bytes]()
        while not (parts and parts[-1].endswith(b"\n")):
            _wait(pipe, select.POLLIN, deadline)
            part = os.read(pipe, 1 << 20)
            if not part:
                raise EOFError("no answer")
            parts.append(part)
        return b"".join(parts)

    def _obituary(self, error: Exception) -> str:
        """How the child ended, and the end of what it had to say."""
        status = "it stopped"
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                status = _describe(self._process.wait(1.0))
        return f"{status} ({error}) {self._last_words()}".strip()

    def _last_words(self) -> str:
        """The end of what the child had to say."""
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LAST_WORDS))
        return self._log.read().decode(errors="replace").strip()


class Pool:
    """Some workers side by side; leaving the block kills them.

    Each answer keeps its request's place.
    """

    def __init__(self, command: Sequence[str], environment: Environment, count: int) -> None:
        self._workers = [Worker(command, environment) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.close()

    def ask_all(
        self, requests: Sequence[JsonObject], timeout: float
    ) -> Iterator[JsonObject | WorkerError]:
        """Answer or failure of each request, in order."""
        idle = queue.SimpleQueue[Worker]()
        for worker in self._workers:
            idle.put(worker)

        def ask(request: JsonObject) -> JsonObject | WorkerError:
            worker = idle.get()
            try:
                return worker.ask(request, timeout)
            except WorkerError as error:
                return error
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self._workers), "hsgen-worker") as threads:
            try:
                yield from threads.map(ask, requests)
            except BaseException:  # an interrupt: do not wait for compilers
                for worker in self._workers:
                    worker.stop()
                raise


def _wait(pipe: int, event: int, deadline: float) -> None:
    waiting = select.poll()  # select() itself refuses descriptors above 1023
    waiting.register(pipe, event)
    left = deadline - time.monotonic()
    if left <= 0 or not waiting.poll(left * 1000):
        raise WorkerError("timeout", "no answer in time; killed with all that it had started")


def _describe(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
