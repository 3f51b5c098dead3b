"""Chat templates compiled so that functions of ours join the texts that they write.

Jinja does not promise this: a compiled template finds its functions for joining by name among its globals.
"""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, Template

Join = Callable[..., Any]


def compile_with_joins(
    environment: Environment, source: str, *, concat: Join, str_join: Join, markup_join: Join, **names: Any
) -> Template:
    """Compile a template in an environment, which is changed.

    Args:
        environment: an overlay of one's own.
        source: of the template.
        concat: joins the pieces that a block or the whole template has written.
        str_join: joins what stands between `~` signs.
        markup_join: the same where markup may be among it.
        names: further globals of the compiled template, such as `str`.
    """
    environment.concat = concat  # type: ignore[method-assign]
    template = environment.from_string(source)
    template.root_render_func.__globals__.update(str_join=str_join, markup_join=markup_join, **names)
    return template
