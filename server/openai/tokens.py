"""How many tokens the prompts of a request have."""

__all__ = ["TokenCounter"]

from sdxl_trt.engines.bundle import Bundle
from sdxl_trt.runtime.text import PromptTokenizer
from sdxl_trt.server.openai.answers import Usage


class TokenCounter:
    """Counts tokens with the base's first tokenizer; that of the latest bundle is kept."""

    def __init__(self) -> None:
        self._latest: tuple[Bundle, PromptTokenizer] | None = None

    def count(self, bundle: Bundle, prompt: str, negative: str | None) -> Usage:
        """Return the tokens of both prompts, also those that are cut off; the frame of start and end is not counted."""
        if self._latest is None or self._latest[0] is not bundle:
            self._latest = bundle, PromptTokenizer(bundle, bundle.manifest.base.text_encoders[0].tokenizer)
        pieces = self._latest[1].pieces
        return Usage(sum(len(pieces(text)) for text in (prompt, negative) if text))
