"""Decoder-only language models as pure functions of parameter pytrees, and their checkpoints."""
