"""The bundled model in torch, for training: a Llama whose parameters bear Hugging Face's names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="float16", vocab_size=256,
    hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=1024, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None,
    pad_token_id=None)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, x[i] paired with x[i + head_dim / 2] as in Hugging Face's Llama."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.group, self.head_dim = heads // kv_heads, head_dim
        self.q_proj = linear(d, heads * head_dim)
        self.k_proj, self.v_proj = linear(d, kv_heads * head_dim), linear(d, kv_heads * head_dim)
        self.o_proj = linear(heads * head_dim, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(self.group, 1) for y in (rotate(k, cos, sin), v))
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, hidden), linear(d, hidden), linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn = Attention(d, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
        self.mlp = MLP(d, c["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """A Llama decoder over bytes: ids (batch, time) to logits (batch, time, 256); embeddings tied."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        d, half = c["hidden_size"], c["head_dim"] // 2
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c["vocab_size"], d),
            layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            norm=nn.RMSNorm(d, c["rms_norm_eps"])))
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what is added to the residual starts at zero: a layer begins as the identity
                nn.init.normal_(p, std=0.0 if "o_proj" in name or "down_proj" in name else 0.5 / d**0.5)
        frequencies = c["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]), frequencies)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, t = self.model["embed_tokens"](ids), ids.shape[1]
        for layer in self.model["layers"]:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)
