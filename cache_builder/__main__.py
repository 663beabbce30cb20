"""`python -m cache_builder`: the verbs of this room: build · triplets · info · verify · export · import."""

import sys

from cache_builder.cli import main

if __name__ == "__main__":
    sys.exit(main())
