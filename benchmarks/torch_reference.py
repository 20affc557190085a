"""PyTorch's side of benchmarks/sampling.py: transformers' Llama with SDPA, eager.

The generation encoder and decoder are plain torch.nn under the released names: strict loading and
the comparison with ours check them, and they need no diffusers, which the GPU machine lacks.
"""

import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from workload import GRID_TOKENS, GUIDANCE_SCALE, Workload

UNUSED = ("vision_und_enc_", "beg_of_und_embed")


def sinusoid(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """[B] -> [B, dim] float32, cosines first."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's; [B, h, w, C]."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.empty(1, 1, 1, channels))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.bias, self.weight * norm + 1, x)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, MLP with GRN, residual, then FiLM; [B, C, h, w], channels last in memory."""

    def __init__(self, channels, hidden_size, eps):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.RMSNorm(channels, eps)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels)
        self.cond_embeds_mapper = nn.Linear(hidden_size, 2 * channels)

    def forward(self, x, t_emb):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_norm(F.gelu(self.channelwise_linear_1(y)))
        x = x + self.channelwise_linear_2(y).permute(0, 3, 1, 2)
        scale, shift = self.cond_embeds_mapper(F.silu(t_emb))[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)


class MidBlock(nn.Module):
    def __init__(self, layers, *sizes):
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNeXtBlock(*sizes) for _ in range(layers))

    def forward(self, x, t_emb):
        for block in self.res_blocks:
            x = block(x, t_emb)
        return x


class GenEncoder(nn.Module):
    """Latents [B, c, H, W] and [B] timesteps -> grid [B, C, h, w], time embedding [B, D]."""

    def __init__(self, config):
        super().__init__()
        channels, hidden = config["block_out_channels"][-1], config["hidden_size"]
        self.time_embed = nn.ModuleDict(
            {"linear_1": nn.Linear(channels, hidden), "linear_2": nn.Linear(hidden, hidden)}
        )
        self.in_conv = nn.Conv2d(
            config["input_channels"], channels, config["kernel_size"], config["stride"]
        )
        self.mid_block = MidBlock(config["layers_in_middle"], channels, hidden, config["norm_eps"])

    def forward(self, z, timesteps):
        t_emb = sinusoid(timesteps, self.in_conv.out_channels).to(z.dtype)
        t_emb = self.time_embed["linear_2"](F.silu(self.time_embed["linear_1"](t_emb)))
        return self.mid_block(self.in_conv(z), t_emb), t_emb


class GenDecoder(nn.Module):
    """Grid and skip [B, C, h, w] and the time embedding -> velocity [B, c, H, W]."""

    def __init__(self, config):
        super().__init__()
        width, eps = config["in_channels"] + config["block_out_channels"][-1], config["norm_eps"]
        self.input_norm = nn.RMSNorm(config["in_channels"], eps)
        self.mid_block = MidBlock(config["layers_in_middle"], width, config["hidden_size"], eps)
        unpatch_conv = nn.Conv2d(width, 4 * config["out_channels"], 1)
        self.out_convs = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.RMSNorm(width, eps), "unpatch_conv": unpatch_conv})]
        )

    def forward(self, x, skip, t_emb):
        x = self.input_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.mid_block(torch.cat([x, skip], dim=1), t_emb)
        out = self.out_convs[0]
        x = out["norm"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(out["unpatch_conv"](x), 2)


class Reference(nn.Module):
    """The generating and the writing half of the released model."""

    def __init__(self, config):
        super().__init__()
        language = {k: v for k, v in config["language_config"].items() if k != "torch_dtype"}
        language = LlamaConfig(**language, attn_implementation="sdpa")
        decoder = config["vision_gen_dec_config"]["params"]
        channels = decoder["block_out_channels"][-1]
        self.language_model = LlamaForCausalLM(language)
        self.vision_gen_enc_model = GenEncoder(config["vision_gen_enc_config"]["params"])
        self.vision_gen_enc_aligner = nn.Linear(channels, language.hidden_size)
        self.vision_gen_dec_aligner_norm = nn.RMSNorm(language.hidden_size, language.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(language.hidden_size, decoder["in_channels"])
        self.vision_gen_dec_model = GenDecoder(decoder)

    def encode(self, z, timesteps):
        """-> [B, 1 + N, D] time token and latent tokens, the skip, the time embedding."""
        grid, t_emb = self.vision_gen_enc_model(z, timesteps)
        latents = self.vision_gen_enc_aligner(grid.flatten(2).transpose(1, 2))
        return torch.cat([t_emb[:, None], latents], dim=1), grid, t_emb

    def velocity(self, hidden, skip, t_emb):
        x = self.vision_gen_dec_aligner_norm(hidden[:, -GRID_TOKENS:])
        x = self.vision_gen_dec_aligner(x).transpose(1, 2).unflatten(2, skip.shape[2:])
        return self.vision_gen_dec_model(x, skip, t_emb)


def load(workload: Workload, device: str) -> Reference:
    with torch.device("meta"):
        model = Reference(workload.config).to(getattr(torch, workload.dtype))
    state = {}
    for file in workload.weights.glob("*.safetensors"):
        state |= load_file(file)
    state = {name: x for name, x in state.items() if not name.startswith(UNUSED)}
    model.load_state_dict(state, assign=True)
    # Its frequencies are no weights, so that they are still on "meta".
    llama = model.language_model.model
    llama.rotary_emb = LlamaRotaryEmbedding(llama.config)
    return model.to(device).eval()


def jobs(workload: Workload, device: str) -> dict[str, Callable]:
    """{name: job}; every job returns (seconds, arrays...); those that draw take a batch size."""
    model = load(workload, device)
    llama, dtype = model.language_model, getattr(torch, workload.dtype)
    prompt = workload.prompt_tokens

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def sample(batch, as_released):
        tokens = torch.tensor(workload.prompts(batch), device=device).repeat(2, 1)
        mask = torch.ones((2 * batch, prompt + 1 + GRID_TOKENS), dtype=torch.long, device=device)
        mask[batch:, 1:prompt] = 0
        z = torch.tensor(workload.noise(batch), device=device).permute(0, 3, 1, 2)
        wait()
        began = time.perf_counter()
        prefix = llama.model.embed_tokens(tokens)
        if not as_released:
            cache = DynamicCache()
            llama.model(
                inputs_embeds=prefix, attention_mask=mask[:, :prompt], past_key_values=cache
            )
        for step in range(workload.steps):
            timesteps = torch.full((batch,), 1000 * step / workload.steps, device=device)
            if as_released:
                x, skip, t_emb = model.encode(z.repeat(2, 1, 1, 1).to(dtype), timesteps.repeat(2))
                x = torch.cat([prefix, x], dim=1)
                out = llama.model(inputs_embeds=x, attention_mask=mask, use_cache=False)
            else:
                x, skip, t_emb = model.encode(z.to(dtype), timesteps)
                skip, t_emb = skip.repeat(2, 1, 1, 1), t_emb.repeat(2, 1)
                x = x.repeat(2, 1, 1)
                out = llama.model(inputs_embeds=x, attention_mask=mask, past_key_values=cache)
                cache.crop(-1 - GRID_TOKENS)
            v_cond, v_uncond = model.velocity(out.last_hidden_state, skip, t_emb).float().chunk(2)
            v = GUIDANCE_SCALE * v_cond - (GUIDANCE_SCALE - 1) * v_uncond
            z = z + v / workload.steps
        latents = z.permute(0, 2, 3, 1).cpu().numpy()
        return time.perf_counter() - began, latents

    @torch.inference_mode()
    def answer(static):
        """Seconds of the decoding alone; the prompt's last logits and all new tokens."""
        tokens = torch.tensor(workload.question(), device=device).long()
        length = workload.prefix_tokens + workload.new_tokens
        cache = StaticCache(llama.config, max_cache_len=length) if static else DynamicCache()
        out = llama(tokens, past_key_values=cache, logits_to_keep=1)
        logits, written = out.logits[:, -1].float().cpu().numpy(), []
        began = time.perf_counter()
        for _ in range(workload.new_tokens):
            written.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
            out = llama(written[-1], past_key_values=cache)
        wait()
        seconds = time.perf_counter() - began
        return seconds, logits, torch.cat(written, dim=1).cpu().numpy()

    factor = torch.randn((workload.matmul_size,) * 2, dtype=dtype, device=device)

    @torch.inference_mode()
    def matmul(repeats):
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            factor @ factor
        wait()
        return ((time.perf_counter() - began) / repeats,)

    return {
        "sample cached": lambda batch: sample(batch, as_released=False),
        "sample as released": lambda batch: sample(batch, as_released=True),
        "answer dynamic": lambda: answer(static=False),
        "answer static": lambda: answer(static=True),
        "matmul": matmul,
    }
