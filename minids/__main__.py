"""`python -m minids COMMAND` is `minids COMMAND`."""

import sys

from minids.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
