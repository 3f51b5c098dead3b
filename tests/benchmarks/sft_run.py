"""`sft run` in a process of its own, in a fresh home, as a user starts it: its report, its seconds, its log."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_END_SECONDS = 60.0  # after a signal: a checkpoint is written first
_started: list["SftRun"] = []


@dataclass
class SftRun:
    """A run that was started."""

    process: subprocess.Popen[bytes]
    log: Path
    report_path: Path
    home: Path
    began: float = field(default_factory=time.perf_counter)

    def wait(self, limit: float) -> dict[str, Any]:
        """Wait for the end and return the report, with `whole_seconds` of the process.

        Raises:
            RuntimeError: it took too long, or failed; the message has the end of its log.
        """
        try:
            code = self.process.wait(max(0.0, limit - (time.perf_counter() - self.began)))
        except subprocess.TimeoutExpired:
            self.end()
            raise RuntimeError(f"no end within {limit:.0f} s: {self.last_lines()}") from None
        seconds = time.perf_counter() - self.began
        if code != 0:
            raise RuntimeError(f"exit code {code}: {self.last_lines()}")
        report: dict[str, Any] = json.loads(self.report_path.read_text(encoding="utf-8"))
        return {**report, "whole_seconds": round(seconds, 1)}

    def end(self) -> None:
        """Interrupt the run as Ctrl-C does; after a minute kill what is left of its process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def last_lines(self, number: int = 8) -> str:
        """Return the end of the log in one line."""
        lines = self.log.read_text(errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-number:] if line.strip())[-1500:]

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints that the training has left."""
        return sorted(self.home.glob("runs/*/train/checkpoints/step-*"))


def clean_environment(folder: Path) -> dict[str, str]:
    """Return an environment with a home and a Prefect database in this folder, and none of the caller's servers.

    Nothing in it makes a run faster: what a run needs for its speed it sets itself.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "SFT_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}


def start_run(config: dict[str, Any], folder: Path, *arguments: str, **variables: str) -> SftRun:
    """Start `sft run` on settings.

    Args:
        config: written as YAML into the folder.
        folder: gets config, report, log and, unless it is there, the home.
        arguments: further ones of the command.
        variables: of the environment, further ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, report, log = folder / "run.yaml", folder / "report.json", folder / "run.log"
    report.unlink(missing_ok=True)
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--report", str(report), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**clean_environment(folder), **variables}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    _started.append(run := SftRun(process, log, report, folder / "home"))
    return run


def end_with_this_process() -> None:
    """Have this process, when it is told to end (SIGTERM), end the runs that it started: they hold a GPU."""

    def end(number: int, frame: object) -> None:
        for run in _started:
            if run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGTERM)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)
