"""Tokenizers, chat templates, and the one definition of a reasoning step."""
