"""A process that has imported what commands import, and is forked for each of them: they begin at once.

Nine tenths of what a short command computes are its imports. For what commands do, not for how they start: one of each
kind is started as a person starts it before others are forked. Folder and environment are those that it is opened with.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_PROGRAM = """
import json, os, sys

from flows.console import prepare_environment

prepare_environment(cache=True)
from tasks import garbage

with garbage.importing():  # else each of its forks goes through all of it when it ends
    import flows.chatting, flows.cleaning, flows.cli, flows.exporting, flows.record_cleaning, flows.stages

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    words, files = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
else:
    sys.exit()
answers.close()
for number, name in enumerate(files):
    os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
sys.stdin, sys.argv = open(0), words
flows.cli.main()
"""


class WarmProcess:
    """Runs commands of `sft`, one after another, each in a fork of itself."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *, typed_in: str, seconds: float) -> "subprocess.CompletedProcess[str]":
        """Run a command of words alone, and return how it ended and what it wrote.

        Raises:
            TimeoutError: it took longer, and was killed with this process.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            for file, text in zip(files, (typed_in, "", ""), strict=True):
                file.write_text(text)
            job = json.dumps([shlex.split(command), [str(file) for file in files]])
            alarm = threading.Timer(seconds, os.killpg, (self._process.pid, signal.SIGKILL))
            alarm.start()
            print(job, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            alarm.cancel()
            if not answer:
                raise TimeoutError(f"{command}\n{files[2].read_text()}")
            return subprocess.CompletedProcess(command, int(answer), files[1].read_text(), files[2].read_text())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
