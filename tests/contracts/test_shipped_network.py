"""What ships inside the package: small enough, and of the shape that its config trains."""

import json
import zlib

from configs.countdown import get_config
from rlm_jax.models.load import find_model
from rlm_jax.models.state_value import load_state_value

FOLDER = find_model("package:countdown")


def test_it_takes_eight_megabytes_of_a_wheel():
    # A wheel is a zip archive, each file deflated by itself.
    sizes = [len(zlib.compress(path.read_bytes(), 6)) for path in FOLDER.iterdir()]
    assert sum(sizes) < 8e6


def test_its_shape_is_what_the_config_trains():
    train = get_config().train
    saved = json.loads((FOLDER / "config.json").read_text())
    names = {
        "num_layers": "num_hidden_layers",
        "model_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "context_length": "max_position_embeddings",
    }
    assert {name: saved[theirs] for name, theirs in names.items()} == {
        name: train.network[name] for name in names
    }
    shape = load_state_value(FOLDER).cfg
    asked = train.state_value.network
    assert {name: getattr(shape, name) for name in asked} == dict(asked)
