"""The error of a conversation, template or tokenizer that cannot be made into labelled examples."""


class MaskError(ValueError):
    """A conversation, template or tokenizer that cannot be mapped to labels.

    Raised as `MaskError(reason, detail)`: a short fixed code that rejects are counted by, and a sentence that names
    the template, the message and the way out.
    """

    @property
    def reason(self) -> str:
        """Return the short code, such as `generation_prompt_mismatch`."""
        return str(self.args[0])

    def __str__(self) -> str:
        return str(self.args[-1])
