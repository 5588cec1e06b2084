"""Generated problems as TFDS data sets."""
