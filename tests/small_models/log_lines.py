"""What a logger says, as one text."""

__all__ = ["Lines"]

import logging


class Lines(logging.Handler):
    """Collects the messages that it receives in `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()
