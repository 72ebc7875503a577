"""The console script ``timm-masterkeys``: it reads the command line before torch and timm are imported.

``import timm_masterkeys`` registers the ``.mk8`` names, so it imports torch and timm, which takes seconds. Python runs
a package's ``__init__`` before it imports a module of the package, such as ``timm_masterkeys.cli``. Therefore this
script puts the package into ``sys.modules`` without running its ``__init__``; the command line is read, and only then
the ``__init__`` runs. So ``--help`` and wrong usage are answered at once, and Ctrl-C during the imports gives one line.

``python -m timm_masterkeys`` does the same without this advantage: there Python has run the ``__init__`` already.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Runs the command line of this process; returns the exit code."""
    spec = find_spec("timm_masterkeys")
    assert spec and spec.loader
    package, run_init = module_from_spec(spec), spec.loader.exec_module
    sys.modules["timm_masterkeys"] = package
    from timm_masterkeys.cli import main

    return main(before_command=lambda: run_init(package))


if __name__ == "__main__":
    sys.exit(main())
