"""How the threads of a process wait for work, which has to be said before torch is loaded.

OpenMP's threads look for work in a loop, for a while, before they sleep. Where another process
wants the core meanwhile, that costs more than the work itself. The command line asks for threads
that sleep at once; a program that imports the library decides for itself.

Importing this module says so where the process is the command line. It is the first import of
`hos_ext`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import PurePath

POLICY = "OMP_WAIT_POLICY"
SAID = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by any of them the user has decided


def is_command(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether a process is the command line of hos_ext.

    Args:
        argv: of the process, `sys.argv`. While `python -m` looks for its module it begins with
            "-m", whatever the module is.
        orig_argv: `sys.orig_argv`, what Python itself was given.
    """
    if argv[:1] == ["-m"]:
        given = list(orig_argv)
        module = given[given.index("-m") + 1] if "-m" in given else ""
        return module.partition(".")[0] == __name__.partition(".")[0]
    return bool(argv) and PurePath(argv[0]).stem in ("hos-ext", "hos-ext-script")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Asks for threads that sleep while they wait, unless the user has said how they wait."""
    if not any(name in environment for name in SAID):
        environment[POLICY] = "passive"


if is_command(sys.argv, sys.orig_argv):
    wait_passively()
