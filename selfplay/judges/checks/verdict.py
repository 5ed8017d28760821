"""What every check may raise."""


class NoVerdictError(Exception):
    """The check can't tell: the completion gets no score, and the message is its note."""
