"""`python -m coupfast` is the command `coupfast`."""

import sys

from coupfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
