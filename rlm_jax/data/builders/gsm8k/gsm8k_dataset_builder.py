"""GSM8K (Cobbe et al. 2021, 2110.14168): the official files, by checksum, as array_record.

`build_gsm8k(data_dir)` downloads the two files from the authors' repository; where that cannot be
reached, `manual_dir` names a folder that holds them. Either way a file that is not the published
one is refused.
"""

import functools
import hashlib
import json
import os
import pathlib
import urllib.request
from collections.abc import Iterator

from rlm_jax.core.files import write_whole
from rlm_jax.data.builders.reading import build_splits, import_tfds, make_features
from rlm_jax.data.iterators import Source
from rlm_jax.tasks import gsm8k

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
# SHA-256 of the published files.
CHECKSUMS = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
TIMEOUT_SECONDS = 30
CITATION = """@article{cobbe2021gsm8k,
  title={Training Verifiers to Solve Math Word Problems},
  author={Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo
    and Kaiser, Lukasz and Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and
    Nakano, Reiichiro and Hesse, Christopher and Schulman, John},
  journal={arXiv preprint arXiv:2110.14168},
  year={2021}
}"""


def build_gsm8k(
    data_dir: str | os.PathLike[str], manual_dir: str | os.PathLike[str] | None = None
) -> dict[str, Source]:
    """The splits "train" (7,473 problems) and "test" (1,319), made where they are not yet.

    Elements hold `id`, `question`, `answer` (the final number) and `solution` (the worked steps
    as published, calculator marks `<<...>>` and last line `#### ...` included), in the order of
    the files.

    Args:
      data_dir: where data sets are kept.
      manual_dir: a folder with the official train.jsonl and test.jsonl; nothing is downloaded.

    Raises:
      FileNotFoundError: `manual_dir` lacks a file, or the files cannot be downloaded.
      ValueError: a file is not the published one, or tensorflow_datasets is not installed.
    """
    builder = _builder_class()(data_dir=os.fspath(data_dir))
    if manual_dir is None:
        manual_dir = pathlib.Path(data_dir) / "downloads" / "gsm8k"
        for split in CHECKSUMS:
            if not builder.is_prepared():
                _download(split, manual_dir / f"{split}.jsonl")
    elif not builder.is_prepared():
        for split in CHECKSUMS:
            _check_content(pathlib.Path(manual_dir) / f"{split}.jsonl", split)
    return build_splits(builder, manual_dir)


def _download(split: str, path: pathlib.Path) -> None:
    """Fetches an official file, unless it is there already."""
    if not path.exists():
        try:
            with urllib.request.urlopen(f"{URL}/{split}.jsonl", timeout=TIMEOUT_SECONDS) as reply:
                content = reply.read()
        except OSError as error:
            raise FileNotFoundError(
                f"{URL}/{split}.jsonl cannot be downloaded ({error}); manual_dir may name a folder "
                "with the official train.jsonl and test.jsonl"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as beside:
            beside.write_bytes(content)
    _check_content(path, split)


def _check_content(path: pathlib.Path, split: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; manual_dir holds the official {split}.jsonl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != CHECKSUMS[split]:
        raise ValueError(
            f"{path} is not the official file: SHA-256 {digest}, published {CHECKSUMS[split]}"
        )


def iterate_elements(path: str | os.PathLike[str], split: str) -> Iterator[dict[str, str]]:
    """The elements of one official file, in its order; malformed rows raise ValueError."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    examples = gsm8k.load(path)
    for row, ((problem, gold), line) in enumerate(zip(examples, lines, strict=False)):
        yield {
            "id": f"gsm8k-{split}-{row}",
            "question": problem.question,
            "answer": gold.answer or "",
            "solution": json.loads(line)["answer"],
        }


@functools.cache
def _builder_class():
    tfds = import_tfds()

    # TFDS has a builder of this name in its own registry.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """GSM8K from the official files."""

        name = "gsm8k"
        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = f"train.jsonl and test.jsonl from {URL}"

        def _info(self):
            return self.dataset_info_from_configs(
                features=make_features("id", "question", "answer", "solution"),
                homepage="https://github.com/openai/grade-school-math",
                citation=CITATION,
                disable_shuffling=True,
                description="Grade-school word problems with worked answers.",
            )

        def _split_generators(self, dl_manager):
            folder = dl_manager.manual_dir
            return {
                split: self._generate_examples(folder / f"{split}.jsonl", split)
                for split in CHECKSUMS
            }

        def _generate_examples(self, path, split):
            yield from enumerate(iterate_elements(path, split))

    return Builder
