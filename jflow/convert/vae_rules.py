"""Where each parameter of diffusers' AutoencoderKL lies in jflow's (see engine.Rule)."""

from jflow.convert.engine import Rule, norm_rules

CONV, LINEAR, VECTOR = "o i h w -> h w i o", "o i -> i o", "d -> d"

# diffusers renamed the layers of its attention; older files still carry the first of each pair.
LEGACY_VAE_NAMES: tuple[tuple[str, str], ...] = (
    ("attentions.0.query.", "attentions.0.to_q."),
    ("attentions.0.key.", "attentions.0.to_k."),
    ("attentions.0.value.", "attentions.0.to_v."),
    ("attentions.0.proj_attn.", "attentions.0.to_out.0."),
)


def _product(hf: str, path: str, pattern: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{hf}.weight", f"{path}/kernel", pattern),
        Rule(f"{hf}.bias", f"{path}/bias", VECTOR),
    )


def _resnet(hf: str, path: str) -> tuple[Rule, ...]:
    return (
        *norm_rules(f"{hf}.norm1", f"{path}/norm1"),
        *_product(f"{hf}.conv1", f"{path}/conv1", CONV),
        *norm_rules(f"{hf}.norm2", f"{path}/norm2"),
        *_product(f"{hf}.conv2", f"{path}/conv2", CONV),
    )


def _half(half: str, level: str, resample: str) -> tuple[Rule, ...]:
    """The encoder or the decoder; `level` and `resample` are diffusers' names of its blocks."""
    hf_block, block = f"{half}.{level}.{{i}}", f"{half}/{level}_{{i}}"
    hf_mid, mid = f"{half}.mid_block.attentions.0", f"{half}/mid_block/attentions_0"
    return (
        *_product(f"{half}.conv_in", f"{half}/conv_in", CONV),
        *_resnet(f"{hf_block}.resnets.{{j}}", f"{block}/resnets_{{j}}"),
        *_product(
            f"{hf_block}.resnets.{{j}}.conv_shortcut", f"{block}/resnets_{{j}}/conv_shortcut", CONV
        ),
        *_product(f"{hf_block}.{resample}.0.conv", f"{block}/{resample}_0/conv", CONV),
        *_resnet(f"{half}.mid_block.resnets.{{j}}", f"{half}/mid_block/resnets_{{j}}"),
        *norm_rules(f"{hf_mid}.group_norm", f"{mid}/group_norm"),
        *_product(f"{hf_mid}.to_q", f"{mid}/to_q", LINEAR),
        *_product(f"{hf_mid}.to_k", f"{mid}/to_k", LINEAR),
        *_product(f"{hf_mid}.to_v", f"{mid}/to_v", LINEAR),
        *_product(f"{hf_mid}.to_out.0", f"{mid}/to_out_0", LINEAR),
        *norm_rules(f"{half}.conv_norm_out", f"{half}/conv_norm_out"),
        *_product(f"{half}.conv_out", f"{half}/conv_out", CONV),
    )


VAE_RULES: tuple[Rule, ...] = (
    *_half("encoder", "down_blocks", "downsamplers"),
    *_half("decoder", "up_blocks", "upsamplers"),
    *_product("quant_conv", "quant_conv", CONV),
    *_product("post_quant_conv", "post_quant_conv", CONV),
)
