"""transformers' SigLIP beside ours: its layout undone, and its configs read."""

import jax
import numpy as np
import pytest

from jflow.convert import siglip_rules
from jflow.models.siglip import Siglip, SiglipConfig
from tests.test_convert_engine import equal_bits, flatten


def test_fusing_undoes_separating():
    config = SiglipConfig(image_size=8, patch_size=4, width=6, layers=2, heads=2, mlp_ratio=2)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: (
            Siglip(config).init(key, np.zeros((1, 8, 8, 3)))["params"]
            | Siglip(config).init(key, np.zeros((1, 4, 6)), method="pool")["params"]
        )
    )
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape), shapes)
    apart = siglip_rules.separate(params)
    assert apart["blocks"]["attn"]["k"]["kernel"].shape == (2, 6, 6)
    equal_bits(dict(flatten(siglip_rules.fuse(apart))), dict(flatten(params)))


@pytest.mark.parametrize(
    "config, want",
    [
        # The fields that google/siglip-large-patch16-384 and -so400m-patch14-384 state.
        ({"hidden_size": 1024, "image_size": 384, "intermediate_size": 4096,
          "num_attention_heads": 16, "num_hidden_layers": 24}, (1024, 24, 16, 4096, 16, 384)),
        ({"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
          "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14},
         (1152, 27, 16, 4304, 14, 384)),
        ({}, (768, 12, 12, 3072, 16, 224)),
    ],
)  # fmt: skip
def test_siglip_configs(config, want):
    got = siglip_rules.config_from_transformers({"model_type": "siglip", "vision_config": config})
    sizes = (got.width, got.layers, got.heads, got.mlp_width, got.patch_size, got.image_size)
    assert sizes == want
    if got.width == 1024:
        assert got == SiglipConfig()
