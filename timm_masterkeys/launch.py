"""Runs a script, such as timm's train.py, validate.py or benchmark.py, unchanged, with the ``.mk8`` names registered.

    python -m timm_masterkeys.launch SCRIPT [ARGS ...]
    torchrun --nproc-per-node 2 -m timm_masterkeys.launch train.py --model convnext_atto.mk8 ...

Arguments, working directory, exit code and Ctrl-C are as if the script ran alone.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Imports the plugin and runs the script named by the first argument as ``__main__``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if len(sys.argv) > 1 else sys.stderr)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        print(f"timm_masterkeys.launch: error: no such script: '{script}'", file=sys.stderr)
        sys.exit(2)
    import timm_masterkeys  # noqa: F401  # registers the names

    del sys.argv[0]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
