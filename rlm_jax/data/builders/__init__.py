"""TFDS builders, written as array_record files and read by grain; TensorFlow is never imported.

Each builder stands in a package of its own, as TFDS wants it. Its class is made inside a function,
so that this package imports without tensorflow_datasets.
"""
