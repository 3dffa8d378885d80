"""The command `hos-ext`: train, resume, denoise, chains, evaluate, info, push and demo.

A command checks its arguments, calls `runs`, `results`, `evaluation` or `demo`, and writes files
whole; it replaces what is there only with --force. An error is one line; `errors` has the exit
codes.

One file is one command. To add a command, write `cli/NAME.py` with a function `NAME`, whose
parameters are its arguments and whose docstring is its help, and add NAME to `COMMANDS`. What
several commands share is in `common`. The files of commands import typer, so they are imported
when a command line runs, and a missing typer is named in one line.
"""

import importlib
import inspect
import sys
import warnings
from typing import Any

from ...checks import require
from .errors import CODES, explain

# In the order of --help. Each names a file of this folder, and the function in it.
COMMANDS = ("train", "resume", "denoise", "chains", "generate", "evaluate", "info", "push", "demo")

_HELP = f"""Train second-order score models, denoise with uncertainty, run chains, generate.

Start with: hos-ext demo (minutes), or with your own data:

  hos-ext train --data parquet:mnist/train.parquet --out runs/mnist

  hos-ext denoise runs/mnist noisy.png --raw-sigma 50

hos-ext COMMAND --help explains each.

{CODES}"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs `hos-ext` and exits."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code.

    Args:
        arguments: the words after `hos-ext`; none shows the help.

    Returns:
        The exit code, see `errors`. What went wrong is one line on stderr, as is what may be.
    """
    lines = warnings.formatwarning
    warnings.formatwarning = _warning_line  # type: ignore[assignment]
    try:
        typer = require("cli", "typer")
        command = typer.main.get_command(_application(typer))
        # Not standalone: typer would print usage errors as several lines in a box.
        code = command.main(arguments or ["--help"], prog_name="hos-ext", standalone_mode=False)
        if code != 130:
            return code or 0
        message = "stopped"
    except SystemExit as done:  # the shell asked for completions, or for the script of them
        return done.code if isinstance(done.code, int) else 0
    except (KeyboardInterrupt, Exception) as error:
        message, code = explain(error)
        if message.startswith("No such command"):
            message += f" It must be one of {', '.join(COMMANDS)}."
    finally:
        warnings.formatwarning = lines
    print("hos-ext: " + " ".join(message.split()), file=sys.stderr)
    return int(code)


def _warning_line(message: Any, *_: Any) -> str:
    """A warning without the line of code that raised it."""
    return f"hos-ext: warning: {' '.join(str(message).split())}\n"


def _application(typer: Any) -> Any:
    """All commands as one application of typer."""
    application = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    output = importlib.import_module(".output", __name__)
    application.callback(help=_HELP)(output.start)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = getattr(module, name)
        help_text = _paragraphs(inspect.getdoc(command) or "")
        application.command(name, help=help_text)(output.takes_output(command))
    return application


def _paragraphs(text: str) -> str:
    """A docstring with one line a paragraph, so that the terminal alone breaks lines."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part[:1] == " " else " ".join(part.split()) for part in parts)
