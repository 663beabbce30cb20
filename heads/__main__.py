"""`python -m heads`: the whole of `headstart`, as this room may use the others."""

import sys

from heads.cli import main

if __name__ == "__main__":
    sys.exit(main())
