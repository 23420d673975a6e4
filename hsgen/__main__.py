"""`python -m hsgen` is `hsgen`."""

import sys

from hsgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
