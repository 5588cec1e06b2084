"""What all builders share: features of text alone, and the way back to examples.

Every split is a random-access source of elements, dicts of UTF-8 bytes by name, for
`data.iterators.make_stream`; `to_example` makes a problem and its gold of one.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from rlm_jax.data.iterators import Source
from rlm_jax.data.problems import to_tuples
from rlm_jax.tasks.base import Example, Gold, Problem

FILE_FORMAT = "array_record"


def import_tfds():
    """The tensorflow_datasets package; ValueError where it is not installed."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"data sets need tensorflow-datasets and array_record: pip install 'rlm_jax[train]' "
            f"({error})"
        ) from error
    return tensorflow_datasets


def make_features(*names: str):
    """A TFDS feature dict of texts."""
    tfds = import_tfds()
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})


def build_splits(
    builder: Any, manual_dir: str | os.PathLike[str] | None = None
) -> dict[str, Source]:
    """Writes a builder's files where they are not yet, and opens every split."""
    tfds = import_tfds()
    config = tfds.download.DownloadConfig(
        manual_dir=None if manual_dir is None else os.fspath(manual_dir), try_download_gcs=False
    )
    builder.download_and_prepare(file_format=FILE_FORMAT, download_config=config)
    return {split: builder.as_data_source(split) for split in builder.info.splits}


def to_element(problem: Problem, gold: Gold) -> dict[str, str]:
    """The texts of an example: `id`, `question`, `answer` and `data`.

    An answer that is not known is empty; the data of a problem is JSON.

    Raises:
      ValueError: the data does not come back from JSON as it was, or the answer is empty.
    """
    if gold.answer == "":
        raise ValueError(f"{problem.id}: the gold answer is an empty text")
    data = json.dumps(problem.data)
    if to_tuples(json.loads(data)) != problem.data:
        raise ValueError(
            f"{problem.id}: data {problem.data!r} is not made of JSON values and tuples"
        )
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": gold.answer or "",
        "data": data,
    }


def to_example(element: Mapping[str, Any]) -> Example:
    """The problem and gold of an element; lists in its data become tuples."""
    texts = {name: read_text(element, name) for name in ("id", "question", "answer")}
    data = json.loads(read_text(element, "data")) if "data" in element else []
    problem = Problem(texts["question"], to_tuples(data), texts["id"])
    return problem, Gold(texts["answer"] or None)


def read_text(element: Mapping[str, Any], name: str) -> str:
    """A field of an element, which TFDS gives as bytes."""
    value = element[name]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
