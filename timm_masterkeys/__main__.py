"""``python -m timm_masterkeys`` is the command ``timm-masterkeys``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
