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
import threading
from concurrent.futures import ThreadPoolExecutor

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


def _main(option, what, arguments, env, pipes):
    os.setsid()  # so that it can be killed with all it starts
    for number, pipe in enumerate(pipes, 1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    enter(env)
    sys.argv = [what if option == "-m" else option, *arguments]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Python:
    """``python -c CODE ...`` or ``python -m MODULE ...`` as a ``subprocess.Popen`` whose output is read as text."""

    def __init__(self, option, what, *arguments, env=None):
        ends = [FORKS.Pipe(duplex=False) for _ in "oe"]
        given = (option, what, list(map(str, arguments)), dict(os.environ if env is None else env))
        self._process = FORKS.Process(target=_main, args=(*given, [writer for _, writer in ends]))
        self._process.start()
        _running.append(self)
        for _, writer in ends:
            writer.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in ends)
        for reader, _ in ends:
            reader.close()

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
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.kill()))
        timer.daemon = True
        timer.start()
        try:
            with ThreadPoolExecutor() as pool, self.stdout, self.stderr:
                written = tuple(pool.map(lambda stream: stream.read(), (self.stdout, self.stderr)))
            self._process.join()
        finally:
            timer.cancel()
        _running.remove(self)
        self.returncode = self.poll()
        if late.is_set():
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
