"""Python processes that start in a second instead of four: forked by a server that has imported what no environment
variable changes. For tests of what a process does, not of how an interpreter starts and ends.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "PIL.Image", "safetensors.torch"])
_running = []


def enter(env):
    """What a forked process does first: it takes an environment that nothing it has imported has looked at."""
    import torch

    assert not {"huggingface_hub", "timm", "timm_masterkeys"} & set(sys.modules)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)  # outputs of two processes are compared bit for bit


def _main(option, what, arguments, env, files):
    os.setsid()  # so that it can be killed with all it starts
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    enter(env)
    sys.argv = [what if option == "-m" else option, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Python:
    """``python -c CODE ...`` or ``python -m MODULE ...``; what it writes is read from ``stdout`` and ``stderr``."""

    def __init__(self, option, what, *arguments, env=None):
        files = [tempfile.NamedTemporaryFile("r") for _ in "oe"]
        given = (option, what, list(map(str, arguments)), dict(os.environ if env is None else env))
        self._process = FORKS.Process(target=_main, args=(*given, [file.name for file in files]))
        self._process.start()
        _running.append(self)
        self.stdout, self.stderr = files

    def poll(self):
        """The exit code; None while the process runs."""
        return self._process.exitcode

    def kill(self):
        """Ends it at once, as SIGKILL does, with the processes that it has started."""
        if self.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not a group of its own yet
                self._process.kill()

    def communicate(self, timeout=300):
        """What it wrote (and has not been read), after its end.

        Raises:
            subprocess.TimeoutExpired: It was killed as it took longer.
        """
        self._process.join(timeout)
        late = self.poll() is None
        self.kill()
        self._process.join()
        _running.remove(self)
        self.returncode = self.poll()
        with self.stdout, self.stderr:
            written = self.stdout.read(), self.stderr.read()
        if late:
            raise subprocess.TimeoutExpired("python", timeout, *written)
        return written


@atexit.register  # after multiprocessing's own, and so called before it, which would wait for them
def kill_running():
    """Ends what failed tests have left running."""
    for process in _running:
        process.kill()


def run(option, what, *arguments, env=None):
    """A ``Python`` that has ended, as ``subprocess.run`` gives it."""
    process = Python(option, what, *arguments, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess([option, what, *arguments], process.returncode, out, err)
