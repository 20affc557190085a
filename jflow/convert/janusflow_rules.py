"""Names of the released JanusFlow checkpoint and of our tree, side by side."""

from jflow.convert.engine import Rule, linear_rules, norm_rules

_LLM, _LAYER = "language_model.model", "language_model.model.layers.{l}"
_OUR_LAYER = "language_model/layers/block"
_VIT, _OUR_VIT = "vision_und_enc_model.vision_tower", "vision_und_enc_model"
_BLOCK, _OUR_BLOCK = f"{_VIT}.blocks.{{l}}", f"{_OUR_VIT}/blocks"


def _mid_block(part: str) -> tuple[Rule, ...]:
    """The ConvNeXt blocks of the generation encoder or decoder."""
    hf, ours = f"{part}.mid_block.res_blocks.{{i}}", f"{part}/mid_block/res_blocks_{{i}}"
    return (
        Rule(f"{hf}.depthwise.weight", f"{ours}/depthwise_kernel", "c 1 h w -> h w c"),
        Rule(f"{hf}.depthwise.bias", f"{ours}/depthwise_bias", "c -> c"),
        Rule(f"{hf}.norm.weight", f"{ours}/norm/scale", "c -> c"),
        *linear_rules(f"{hf}.channelwise_linear_1", f"{ours}/channelwise_linear_1"),
        Rule(f"{hf}.channelwise_norm.weight", f"{ours}/channelwise_norm/weight", "1 1 1 c -> c"),
        Rule(f"{hf}.channelwise_norm.bias", f"{ours}/channelwise_norm/bias", "1 1 1 c -> c"),
        *linear_rules(f"{hf}.channelwise_linear_2", f"{ours}/channelwise_linear_2"),
        *linear_rules(f"{hf}.cond_embeds_mapper", f"{ours}/cond_embeds_mapper"),
    )


LANGUAGE_RULES = (
    Rule(f"{_LLM}.embed_tokens.weight", "language_model/embed_tokens", "v d -> v d"),
    *(
        Rule(
            f"{_LAYER}.{name}.weight", f"{_OUR_LAYER}/{name.replace('.', '/')}/kernel", "o i -> i o"
        )
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
    *(
        Rule(f"{_LAYER}.{name}.weight", f"{_OUR_LAYER}/{name}/scale", "d -> d")
        for name in ("input_layernorm", "post_attention_layernorm")
    ),
    Rule(f"{_LLM}.norm.weight", "language_model/norm/scale", "d -> d"),
    Rule("language_model.lm_head.weight", "language_model/lm_head/kernel", "v d -> d v"),
)

SIGLIP_RULES = (
    Rule(f"{_VIT}.pos_embed", f"{_OUR_VIT}/pos_embed", "1 n c -> 1 n c"),
    Rule(f"{_VIT}.patch_embed.proj.weight", f"{_OUR_VIT}/patch_embed_kernel", "o i h w -> h w i o"),
    Rule(f"{_VIT}.patch_embed.proj.bias", f"{_OUR_VIT}/patch_embed_bias", "c -> c"),
    *norm_rules(f"{_BLOCK}.norm1", f"{_OUR_BLOCK}/norm1"),
    *linear_rules(f"{_BLOCK}.attn.qkv", f"{_OUR_BLOCK}/attn/qkv"),
    *linear_rules(f"{_BLOCK}.attn.proj", f"{_OUR_BLOCK}/attn/proj"),
    *norm_rules(f"{_BLOCK}.norm2", f"{_OUR_BLOCK}/norm2"),
    *linear_rules(f"{_BLOCK}.mlp.fc1", f"{_OUR_BLOCK}/mlp/fc1"),
    *linear_rules(f"{_BLOCK}.mlp.fc2", f"{_OUR_BLOCK}/mlp/fc2"),
    *norm_rules(f"{_VIT}.norm", f"{_OUR_VIT}/norm"),
    Rule(f"{_VIT}.attn_pool.latent", f"{_OUR_VIT}/attn_pool/latent", "1 1 c -> 1 1 c"),
    *(
        rule
        for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")
        for rule in linear_rules(
            f"{_VIT}.attn_pool.{name}", f"{_OUR_VIT}/attn_pool/{name.replace('.', '/')}"
        )
    ),
    *norm_rules(f"{_VIT}.attn_pool.norm", f"{_OUR_VIT}/attn_pool/norm"),
)

GENERATION_RULES = (
    *linear_rules(
        "vision_gen_enc_model.time_embed.linear_{i}", "vision_gen_enc_model/time_embed_linear_{i}"
    ),
    Rule(
        "vision_gen_enc_model.in_conv.weight",
        "vision_gen_enc_model/in_conv_kernel",
        "o i h w -> h w i o",
    ),
    Rule("vision_gen_enc_model.in_conv.bias", "vision_gen_enc_model/in_conv_bias", "c -> c"),
    *_mid_block("vision_gen_enc_model"),
    *_mid_block("vision_gen_dec_model"),
    Rule(
        "vision_gen_dec_model.input_norm.weight", "vision_gen_dec_model/input_norm/scale", "c -> c"
    ),
    Rule(
        "vision_gen_dec_model.out_convs.{i}.norm.weight",
        "vision_gen_dec_model/out_convs_{i}/norm/scale",
        "c -> c",
    ),
    Rule(
        "vision_gen_dec_model.out_convs.{i}.unpatch_conv.weight",
        "vision_gen_dec_model/out_convs_{i}/unpatch_conv/kernel",
        "o i 1 1 -> i o",
    ),
    Rule(
        "vision_gen_dec_model.out_convs.{i}.unpatch_conv.bias",
        "vision_gen_dec_model/out_convs_{i}/unpatch_conv/bias",
        "o -> o",
    ),
)

JANUSFLOW_RULES = (
    *LANGUAGE_RULES,
    *SIGLIP_RULES,
    *GENERATION_RULES,
    Rule("beg_of_und_embed", "beg_of_und_embed", "1 d -> 1 d"),
    *linear_rules("vision_und_enc_aligner", "vision_und_enc_aligner"),
    *linear_rules("vision_gen_enc_aligner", "vision_gen_enc_aligner"),
    Rule("vision_gen_dec_aligner_norm.weight", "vision_gen_dec_aligner_norm/scale", "d -> d"),
    *linear_rules("vision_gen_dec_aligner", "vision_gen_dec_aligner"),
)
