"""`python -m fastbn` shows the configuration, `python -m fastbn bench` measures this machine."""

from __future__ import annotations

import argparse
import json
import math
import sys

from fastbn import _selfbench
from fastbn._config import show_config


def main(arguments: list[str]) -> None:
    """Do what the arguments of a command line ask for."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.command == "bench":
        result = _selfbench.measure(options.seconds or _selfbench.SECONDS)
        print(json.dumps(result, indent=1) if options.json else _selfbench.report(result))
    elif options.seconds:
        command_line.error("--seconds is for the benchmark: python -m fastbn bench --seconds ...")
    elif options.json:
        print(json.dumps(show_config("dicts"), indent=1))
    else:
        show_config()


def positive(text: str) -> float:
    """A number greater than 0."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m fastbn", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=["bench"],
        help="time batch normalization against the speed of memory, and torch if it is installed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seconds",
        type=positive,
        help="how long the benchmark measures, besides starting and preparing "
        f"(default: {_selfbench.SECONDS:g})",
    )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
