"""`python -m eval`: the verbs of this room: metrics · report · submit."""

import sys

from eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
