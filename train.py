"""The project's command line: ``python train.py --help``."""

import sys

from qm_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
