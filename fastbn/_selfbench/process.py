"""The side that starts a library's process and asks it: a line of JSON is answered by one."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from .machine import wait_for_sleep

WORKER = Path(__file__).with_name("worker.py")
# For an answer, compilation included.
TIMEOUT_S = 600.0


class ProcessEnded(RuntimeError):
    """The process of a library has ended, or does not answer."""


class Process:
    """The process of one library.

    It imports `module`, which is also looked for in `folder`, and calls its function `start` with
    the settings; what that returns answers (see serving.py).
    """

    # The process that was asked last: its threads may spin for a while.
    asked_last: ClassVar[Process | None] = None

    def __init__(
        self,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        folder: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        # How long it was asked nothing, and how long its threads had CPUs meanwhile.
        self.idle_wall = self.idle_cpu = 0.0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        what = {"module": module, "settings": settings, "folder": folder}
        self.process = subprocess.Popen(
            # By its path: as a module of the package it would import fastbn, and its OpenMP.
            [sys.executable, "-P", str(WORKER), json.dumps(what)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        if Process.asked_last is self:
            Process.asked_last = None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):  # It has ended, and left a request unread.
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join()
        self.process.stdout.close()
        self.errors.close()

    def is_there(self) -> bool:
        """Tell whether the process has not ended."""
        return self.process.poll() is None

    def about(self) -> dict[str, Any]:
        """What the library is, or why it is unavailable; its first answer."""
        try:
            return self._answer(TIMEOUT_S)
        except ProcessEnded as end:
            return {"unavailable": str(end)}

    def request(self, do: str, timeout_s: float = TIMEOUT_S, **message: Any) -> dict[str, Any]:
        """Let it do something, and return the answer.

        First wait until another process, if that was asked last, sleeps.
        """
        assert self.process.stdin is not None
        asked_last, Process.asked_last = Process.asked_last, self
        if asked_last is not None and asked_last is not self and asked_last.is_there():
            wait_for_sleep(asked_last.process.pid)
        try:
            self.process.stdin.write(json.dumps({"do": do, **message}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise ProcessEnded(self._last_words()) from None
        answer = self._answer(timeout_s)
        wall, cpu = answer.pop("idle")
        self.idle_wall += wall
        self.idle_cpu += cpu
        return answer

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=timeout_s)
        except queue.Empty:
            self.process.kill()
            raise ProcessEnded(
                f"the process of {self.name} gave no answer in {timeout_s:g} s"
            ) from None
        if not line:
            raise ProcessEnded(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """How it has ended, and the end of what it wrote to standard error."""
        code = self.process.wait()
        self.errors.seek(0)
        words = " ".join(line.strip() for line in self.errors.read().split("\n")[-4:]).strip()
        told = f": {words[-300:]}" if words else ""
        return f"the process of {self.name} has ended with {code}{told}"
