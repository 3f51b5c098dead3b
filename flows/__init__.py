"""What runs after what."""

from flows.session import is_interactive, prepare_session

if is_interactive():
    prepare_session()
