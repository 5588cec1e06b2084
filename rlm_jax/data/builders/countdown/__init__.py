"""Countdown as TFDS data sets, held out by rule."""
