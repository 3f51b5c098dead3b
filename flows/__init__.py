"""What runs after what."""

from flows.session import is_interactive, prepare_session
from tasks.lean_imports import shorten_imports

shorten_imports()
if is_interactive():
    prepare_session()
