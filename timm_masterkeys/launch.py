"""Runs a script, such as timm's train.py, validate.py or benchmark.py, unchanged, with the ``.mk8`` names registered.

    python -m timm_masterkeys.launch SCRIPT [ARGS ...]
    torchrun --nproc-per-node 2 -m timm_masterkeys.launch train.py --model convnext_atto.mk8 ...

Arguments, working directory, exit code and Ctrl-C are as if the script ran alone. The names are registered also in
processes that the script starts with ``torch.multiprocessing.spawn`` or a ``DataLoader``.
"""

# A spawned process imports the main module of its parent under the name "__mp_main__". multiprocessing finds that
# module by ``__main__.__spec__``, which is this module's here (a script that runs alone has None). So the process
# imports this module, and with it the package; then this module runs the script, by the path in the environment.

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

SCRIPT_VARIABLE = "TIMM_MASTERKEYS_LAUNCHED"  # the script's path, for processes that it spawns


def main() -> None:
    """Imports the plug-in and runs the script named by the first argument as ``__main__``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if len(sys.argv) > 1 else sys.stderr)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        print(f"timm_masterkeys.launch: error: no such script: '{script}'", file=sys.stderr)
        sys.exit(2)
    import timm_masterkeys  # noqa: F401  # registers the names

    path = os.path.abspath(script)  # as Python names a script, so that it can find itself from another folder
    os.environ[SCRIPT_VARIABLE] = path
    del sys.argv[0]
    sys.path[0] = str(Path(script).resolve().parent)
    module = ModuleType("__main__")
    module.__file__, module.__spec__ = path, __spec__
    sys.modules["__main__"] = module
    exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a process that the script has spawned
    globals().update(runpy.run_path(os.environ[SCRIPT_VARIABLE], run_name="__mp_main__"))
