"""kvplan for Python: the command line as a function, and the C interface of the CUDA runtime (kvplan.runtime).

    import kvplan
    plan = kvplan.run("inspect", "plan", "--json")      # a command's JSON document, as a dict
    kvplan.run("plan", "--profile", "prof", "--bits", 3.25, "--out", "plan")
"""
import json
import os
import pathlib
import subprocess
import sys

from ._version import __version__

__all__ = ["Error", "PROGRAM", "__version__", "run", "runtime_library"]

_FOLDER = pathlib.Path(__file__).parent
#: The kvplan program of this package.
PROGRAM = _FOLDER / "bin" / "kvplan"


class Error(RuntimeError):
    """A command that failed: `code` is its exit code, the text what it said."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def run(*arguments, progress=False):
    """Runs a command. Its result: a dict where "--json" is among the arguments, else its text. `progress` shows the command's
    progress on stderr. Raises Error when it fails."""
    arguments = [str(a) for a in arguments]
    done = subprocess.run([str(PROGRAM), *arguments], stdout=subprocess.PIPE, stderr=None if progress else subprocess.PIPE, text=True)
    if done.returncode:
        raise Error(done.returncode, (done.stderr or f"kvplan {arguments[0]} failed").strip().removeprefix("kvplan: "))
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def runtime_library():
    """The CUDA runtime of this package as a kvplan.runtime.Library. Raises Error(7) where the wheel was built without CUDA."""
    from . import runtime
    path = _FOLDER / "lib" / "libkvplan_runtime.so"
    if not path.exists():
        raise Error(7, "this kvplan was built without CUDA; build the wheel from a build with -DKVPLAN_CUDA=ON")
    return runtime.Library(path)


def _main():
    """The `kvplan` script: becomes the program."""
    os.execv(PROGRAM, ["kvplan", *sys.argv[1:]])
