"""What the builders of generated problems share: a TFDS class that writes what it is given."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping

from rlm_jax.data.builders.reading import build_splits, import_tfds, make_features, to_element
from rlm_jax.data.iterators import Source
from rlm_jax.tasks.base import Example


def build_generated(
    name: str,
    data_dir: str | os.PathLike[str],
    splits_fn: Callable[[], Mapping[str, Iterable[Example]]],
    *,
    config_name: str,
    version: str,
    description: str,
    homepage: str | None = None,
) -> dict[str, Source]:
    """The splits of a data set of problems, made where they are not yet.

    Elements hold `id`, `question`, `answer` and `data`; `reading.to_example` makes examples.

    Args:
      name: of the data set, its folder in `data_dir`. config_name: of this form of it.
      splits_fn: the examples of every split; called only where there are no files yet.

    Raises:
      ValueError: an example that is no text and JSON, or tensorflow_datasets is not installed.
    """
    tfds = import_tfds()
    config = tfds.core.BuilderConfig(
        name=config_name, version=tfds.core.Version(version), description=description
    )
    builder = _builder_class(name, homepage)(
        data_dir=os.fspath(data_dir), config=config, splits_fn=splits_fn
    )
    return build_splits(builder)


@functools.cache
def _builder_class(dataset_name: str, homepage: str | None):
    tfds = import_tfds()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Generated problems; the config is made by `build_generated`."""

        name = dataset_name

        def __init__(self, *, splits_fn, **options):
            self._splits_fn = splits_fn
            super().__init__(**options)

        def _info(self):
            return self.dataset_info_from_configs(
                features=make_features("id", "question", "answer", "data"),
                homepage=homepage,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {
                split: self._generate_examples(examples)
                for split, examples in self._splits_fn().items()
            }

        def _generate_examples(self, examples):
            for number, (problem, gold) in enumerate(examples):
                yield number, to_element(problem, gold)

    return Builder
