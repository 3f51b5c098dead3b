"""All tests, in two processes side by side: those of the running service mostly wait, and let the others compute.

`python -m tests.together [pytest's options]`. What the service's tests print comes in one piece at the end; the exit
code is 0 only when both processes passed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
SERVICE = sorted([*(_FOLDER / "end_to_end").glob("test_service*.py"), _FOLDER / "end_to_end" / "test_s3.py"])


def main() -> int:
    """Run both and return the exit code."""
    options, began = sys.argv[1:], time.monotonic()
    pytest = [sys.executable, "-m", "pytest", *options]
    with tempfile.TemporaryFile() as output:
        aside = subprocess.Popen(
            [*pytest, *map(str, SERVICE)],
            env={**os.environ, "SFT_SERVICE_TESTS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = subprocess.run(
                [*pytest, *(f"--ignore={path}" for path in SERVICE), str(_FOLDER)], check=False
            ).returncode
            print(f"The tests of the service go on; {time.monotonic() - began:.0f} s so far", flush=True)
            aside_code = aside.wait()
        except KeyboardInterrupt:
            aside.wait()  # interrupted as well, it stops its servers
            raise
        output.seek(0)
        sys.stdout.write(output.read().decode(errors="replace"))
    print(f"Both took {time.monotonic() - began:.0f} s")
    return code or aside_code


if __name__ == "__main__":
    sys.exit(main())
