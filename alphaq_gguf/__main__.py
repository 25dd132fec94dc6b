"""`python -m alphaq_gguf`."""

from .cli import entry

entry()
