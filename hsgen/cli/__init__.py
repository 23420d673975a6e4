"""The `hsgen` command: parse the arguments, make one library call, print.

stdout is the result, stderr is everything else.  Exit status: 0 fine, 1 failure, 2 a wrong spec or
wrong usage; of `diff` as of any diff: 0 the same, 1 different, 2 an error.  What loads networkx or
jinja2 is imported by the command that uses it, so that `hsgen check` stays quick; only what looks at
a capture, or times, loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence

# in the order of `hsgen --help`: each adds its commands
from hsgen.cli import looking, compiling, measuring, searching, specs, records  # isort: skip
from hsgen.cli.app import app
from hsgen.cli.output import complain, status_of
from hsgen.errors import HsgenError

__all__ = ["app", "compiling", "looking", "main", "measuring", "records", "searching", "specs"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status.
    """
    try:
        app(args=list(argv) if argv is not None else None, prog_name="hsgen")
    except HsgenError as error:
        complain(str(error))
        return status_of(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
