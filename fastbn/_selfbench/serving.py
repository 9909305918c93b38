"""What answers in a library's process: a line of JSON for a line of JSON.

The first line tells what the library is, or why it is unavailable.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

Answer = Callable[[dict[str, Any]], None]


class Unsupported(Exception):
    """The library cannot do something; the message says why."""


class Server(Protocol):
    """Answers requests: `do` is the name of one of its methods, the rest are its arguments."""

    def about(self) -> dict[str, Any]:
        """What the library is."""


def main(argument: str) -> None:
    """Start a library as `Process` asks for, and serve until standard input ends."""
    answer = line_writer()
    what = json.loads(argument)
    if what["folder"]:
        # Last: an installed fastbn comes before the folder of a checkout, which may not be built.
        sys.path.append(what["folder"])
    try:
        server: Server = importlib.import_module(what["module"]).start(**what["settings"])
        about = server.about()
    except Exception as error:  # Whatever a broken installation raises.
        answer({"unavailable": reason(error)})
        return
    answer(about)
    serve(server, answer)


def line_writer() -> Answer:
    """What writes answers to standard output; all else that is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    return answer


def serve(server: Server, answer: Answer) -> None:
    """Answer until standard input ends. An answer tells how busy the process was before it."""
    gc.disable()
    gc.freeze()  # What the library has imported need not be searched by a later collection.
    idle_wall, idle_cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = [time.perf_counter() - idle_wall, time.process_time() - idle_cpu]
        message = json.loads(line)
        method = getattr(server, message.pop("do"))
        answer({**method(**message), "idle": idle})
        idle_wall, idle_cpu = time.perf_counter(), time.process_time()


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"
