"""All tests, in groups of which four run side by side: the running service's mostly wait, and let others compute.

`python -m tests.together [pytest's options]`. Each group is a pytest of its own, and whoever is done takes the next.
The service's group goes first where a core is wanted by several; the others take what it leaves. At its end each group
is printed with how long all had run by then and with the processor seconds that it took, servers that live on by
themselves left out: no group should be so long that it is left alone at the end. What the first place runs is seen at
once, the others' output in one piece at the end. The GPU kernels are tested in Triton's interpreter, where
`make test-kernels` would find it. A test of the service that fails is run once more, alone: beside the others a server
may answer too late. The others get no second chance: what fails there for having company is broken. The exit code is 0
only when everything has passed.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_FOLDER = Path(__file__).resolve().parent
_TRITON = _FOLDER.parent / ".triton"
_RUNS, _STAGES = _FOLDER / "end_to_end", _FOLDER / "tasks"
SERVICE = sorted([*_RUNS.glob("test_service*.py"), _RUNS / "test_s3.py"])
_COMMANDS = sorted([*_RUNS.glob("test_shard*.py"), *(_RUNS / f"test_{name}.py" for name in ("bad_input", "resume"))])
_PAGES = [_RUNS / f"test_{name}.py" for name in ("demo", "docs_commands")]
_PIPELINES = sorted({*_RUNS.glob("test_*.py")} - {*SERVICE, *_COMMANDS, *_PAGES})
_TRAINING = [_STAGES / name for name in ("training", "families")]
# Whatever takes the parrot, a model that is trained once a group, is in one group.
_MODELS = [_STAGES / name for name in ("decoder", "evaluation", "exporting", "merging", "proving", "serving")]
_PROVING = _FOLDER / "flows" / "test_proving.py"
KERNELS = sorted((_STAGES / "decoder").glob("test_*kernels.py"))
GROUPS = {
    # The longest first, and what mostly waits beside what computes. The last ones are short: they end together.
    "service": [str(path) for path in SERVICE],
    "training": [str(path) for path in _TRAINING],
    "flows": [*(f"--ignore={path}" for path in (_RUNS, _STAGES, _PROVING)), str(_FOLDER)],
    "pipelines": [str(path) for path in _PIPELINES],
    "models": [*map(str, _MODELS), str(_PROVING)],
    "pages": [str(path) for path in _PAGES],
    "stages": [*(f"--ignore={path}" for path in (*_MODELS, *_TRAINING)), str(_STAGES)],
    "commands": [str(path) for path in _COMMANDS],
    "kernels": [str(path) for path in KERNELS],
}
_NUM_PLACES = 4
_NICENESS = 5
"""The niceness of all groups but the service's: that one has three times their share of a core."""
_YIELDING = ["nice", "-n", str(_NICENESS)]
_FAILED, _NONE_CHOSEN = 1, 5  # pytest's exit codes: some tests failed; there was none to run
_LOOK_SECONDS = 0.2


@dataclass
class _Place:
    """Where one group runs at a time."""

    output: IO[bytes] | None
    """Of what runs here; None lets it through."""
    name: str = ""
    process: subprocess.Popen[bytes] | None = None


def main() -> int:
    """Run the groups and return the exit code."""
    options, began = sys.argv[1:], time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no group is left running
    with ExitStack() as stack:
        caches = stack.enter_context(tempfile.TemporaryDirectory())
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_NUM_PLACES - 1)]
        commands = {
            name: [sys.executable, "-m", "pytest", "-o", f"cache_dir={caches}/{name}", *options, *paths]
            for name, paths in GROUPS.items()
            if name != "kernels" or (_TRITON / ".installed").is_file()
        }
        codes = _run_groups(commands, (_Place(None), *map(_Place, outputs)), began)
        for output in outputs:
            output.seek(0)
            sys.stdout.write(output.read().decode(errors="replace"))
        print(f"All groups took {time.monotonic() - began:.0f} s", flush=True)
        if codes["service"] == _FAILED:
            print("Once more, alone: what failed among the service's tests", flush=True)
            again = subprocess.run([*commands["service"], "--last-failed"], env=_environment("service"), check=False)
            codes["service"] = again.returncode
    if "kernels" not in codes:
        print("The GPU kernels were not tested: Triton is not in .triton (make test-kernels brings it)", flush=True)
    chosen = [code for code in codes.values() if code != _NONE_CHOSEN]
    return max(chosen, default=_NONE_CHOSEN)


def _run_groups(commands: dict[str, list[str]], places: tuple[_Place, ...], began: float) -> dict[str, int]:
    """Run all groups, in each place one after another, and return their exit codes."""
    waiting, codes = list(commands), dict[str, int]()
    try:
        while len(codes) < len(commands):
            for place in places:
                before = _processor_seconds()
                if place.process is not None and (code := place.process.poll()) is not None:
                    codes[place.name], place.process = code, None
                    took = f"{_processor_seconds() - before:.0f} processor seconds"
                    print(
                        f"\n{place.name}: exit code {code} after {time.monotonic() - began:.0f} s, {took}", flush=True
                    )
                if place.process is None and waiting:
                    place.name = waiting.pop(0)
                    place.process = subprocess.Popen(
                        [*([] if place.name == "service" else _YIELDING), *commands[place.name]],
                        env=_environment(place.name),
                        stdout=place.output,
                        stderr=place.output,
                    )
            time.sleep(_LOOK_SECONDS)
    except BaseException as end:
        for place in places:
            if place.process is not None:
                if not isinstance(end, KeyboardInterrupt):  # which reaches all that run in the terminal by itself
                    place.process.send_signal(signal.SIGINT)
                place.process.wait()  # it stops its servers first
        raise
    return codes


def _processor_seconds() -> float:
    """Return what all ended groups took, with the processes that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment(group: str) -> dict[str, str]:
    """Return what a group runs with: the service's short tests are asked for, and each group has its share of cores.

    Hundreds of interpreters are started: our modules are compiled once, and not by each of them.
    """
    share = max(1, (os.cpu_count() or 1) // 2)
    values = {"SFT_SERVICE_TESTS": "1", "OMP_NUM_THREADS": str(share), **os.environ}
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    if group == "kernels":
        path = os.pathsep.join(filter(None, (str(_TRITON), values.get("PYTHONPATH"))))
        values |= {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return values


if __name__ == "__main__":
    sys.exit(main())
