"""Structures for people to look at."""
