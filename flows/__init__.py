"""What runs after what."""

import sys

from flows.session import is_interactive, prepare_session
from tasks.lean_imports import shorten_imports

shorten_imports()
if is_interactive():
    prepare_session()
elif "prefect" in sys.modules:  # a worker's process of a run has it before it imports the flow
    from flows.run_page import prepare_page

    prepare_page()
