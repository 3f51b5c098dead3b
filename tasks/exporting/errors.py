"""What goes wrong with an export."""


class ExportError(ValueError):
    """A model cannot be written in a form, or is not itself in it; the message says what and the way out."""
