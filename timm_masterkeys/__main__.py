"""``python -m timm_masterkeys`` is the command ``timm-masterkeys``."""

import sys

from .cli import main

sys.exit(main())
