"""All tests, in two processes side by side: those of the running service mostly wait, and let the others compute.

`python -m tests.together [pytest's options]`. What the service's tests print comes in one piece at the end. One of them
that fails is run once more, alone: beside the others a server may answer too late. The others get no second chance:
what fails there for having company is broken. The exit code is 0 only when everything has passed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
SERVICE = sorted([*(_FOLDER / "end_to_end").glob("test_service*.py"), _FOLDER / "end_to_end" / "test_s3.py"])
_FAILED = 1  # pytest's exit code where tests ran and some failed


def main() -> int:
    """Run both and return the exit code."""
    options, began = sys.argv[1:], time.monotonic()
    others = [*(f"--ignore={path}" for path in SERVICE), str(_FOLDER)]
    service = [str(path) for path in SERVICE]
    with tempfile.TemporaryDirectory() as caches, tempfile.TemporaryFile() as output:
        commands = {
            name: [sys.executable, "-m", "pytest", "-o", f"cache_dir={caches}/{name}", *options, *paths]
            for name, paths in (("others", others), ("service", service))
        }
        environment = {**os.environ, "SFT_SERVICE_TESTS": os.environ.get("SFT_SERVICE_TESTS", "1")}
        aside = subprocess.Popen(commands["service"], env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            codes = {"others": subprocess.run(commands["others"], check=False).returncode}
            print(f"The tests of the service go on; {time.monotonic() - began:.0f} s so far", flush=True)
            codes["service"] = aside.wait()
        except KeyboardInterrupt:
            aside.wait()  # interrupted as well, it stops its servers
            raise
        output.seek(0)
        sys.stdout.write(output.read().decode(errors="replace"))
        print(f"Both took {time.monotonic() - began:.0f} s", flush=True)
        if codes["service"] == _FAILED:
            print("Once more, alone: what failed among the service's tests", flush=True)
            again = subprocess.run([*commands["service"], "--last-failed"], env=environment, check=False)
            codes["service"] = again.returncode
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
