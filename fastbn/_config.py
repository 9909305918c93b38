"""What this build and this machine are, as `show_config` tells."""

from __future__ import annotations

from typing import Any, Literal, overload

from fastbn import _core
from fastbn._threads import get_num_threads, why_so_many_threads
from fastbn._version import __version__


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Print version, compiler, OpenMP runtime, instruction set in use, and threads and why so many.

    ``python -m fastbn`` does so, too.

    Parameters
    ----------
    mode : "stdout" or "dicts", default "stdout"
        Whether to print, or to return a dict.

    Returns
    -------
    dict or None
        With "dicts": version, compiler, openmp, instruction_set, instruction_sets (those that this
        machine could use), threads and threads_reason.

    Raises
    ------
    ValueError
        If there is no such mode.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    >>> fastbn.show_config("dicts")["instruction_set"] in ("base", "avx2", "avx512")
    True
    """
    platform = _core.platform()
    shown = {
        "version": __version__,
        "compiler": platform["compiler"],
        "openmp": platform["openmp"],
        "instruction_set": platform["isa"],
        "instruction_sets": list(platform["isas"]),
        "threads": get_num_threads(),
        "threads_reason": why_so_many_threads(),
    }
    if mode == "dicts":
        return shown
    if mode != "stdout":
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    print(f"fastbn {shown['version']}")
    print(f"compiler: {shown['compiler']}")
    print(f"OpenMP: {shown['openmp']}")
    print(
        f"instruction set: {shown['instruction_set']} (of {', '.join(shown['instruction_sets'])})"
    )
    print(f"threads: {shown['threads']} ({shown['threads_reason']})")
    return None
