"""The larger parts that a decoder may have: multi-head latent attention, and mixtures of experts.

Each knows its sizes, how config.json spells them, and which tensors it asks a checkpoint for.
"""

from dataclasses import dataclass
from typing import Any

from kvlib.families import Family
from kvlib.settings import number, size

Shapes = dict[str, tuple[int, ...]]  # name in a checkpoint -> shape


def linear_shapes(name: str, outputs: int, inputs: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def gated_shapes(name: str, d: int, width: int, bias: bool = False) -> Shapes:
    shapes = linear_shapes(f"{name}.gate_proj", width, d, bias) | linear_shapes(f"{name}.up_proj", width, d, bias)
    return shapes | linear_shapes(f"{name}.down_proj", d, width, bias)


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: its sizes by their names in config.json (DeepSeek-V2, 2024, arXiv:2405.04434).

    A token leaves kv_lora_rank + qk_rope_head_dim numbers in the cache. ``q_lora_rank`` None: queries have no latent.
    """

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def query_dim(self) -> int:
        """Columns of one head's query: those without rotation, then those with."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def read(cls, settings: dict[str, Any], heads: int, kv_heads: int) -> "Latent":
        if kv_heads != heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} must be num_attention_heads={heads}: with multi-head latent "
                f"attention every head has keys and values of its own"
            )
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        q_rank = None if settings["q_lora_rank"] is None else size(settings, "q_lora_rank")
        return cls(q_lora_rank=q_rank, **{name: size(settings, name) for name in names})

    def shapes(self, d: int, heads: int, bias: bool) -> Shapes:
        """``bias``: the maps to and from the ``d`` columns outside have one, those from the latents never."""
        if self.q_lora_rank is None:
            shapes = linear_shapes("self_attn.q_proj", heads * self.query_dim, d)
        else:
            shapes = linear_shapes("self_attn.q_a_proj", self.q_lora_rank, d, bias)
            shapes["self_attn.q_a_layernorm.weight"] = (self.q_lora_rank,)
            shapes |= linear_shapes("self_attn.q_b_proj", heads * self.query_dim, self.q_lora_rank)
        rank = self.kv_lora_rank
        shapes |= linear_shapes("self_attn.kv_a_proj_with_mqa", rank + self.qk_rope_head_dim, d, bias)
        shapes["self_attn.kv_a_layernorm.weight"] = (rank,)
        shapes |= linear_shapes("self_attn.kv_b_proj", heads * (self.qk_nope_head_dim + self.v_head_dim), rank)
        return shapes | linear_shapes("self_attn.o_proj", d, heads * self.v_head_dim, bias)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: sizes, and how its router chooses (see `kvlib.feedforward.route`).

    Layers before ``first_layer`` have an ordinary feed-forward block. ``num_shared`` experts see every token; they
    are stored as one, ``num_shared`` times as wide.
    """

    count: int
    per_token: int
    width: int
    router: str  # its name in a checkpoint
    scoring: str  # "softmax" or "sigmoid"
    normalise: bool  # make the weights of the chosen experts add up to 1
    scaling: float = 1.0
    first_layer: int = 0
    num_shared: int = 0
    groups: int = 1
    groups_per_token: int = 1
    group_top: int = 1  # a group is worth the sum of so many of its best scores
    corrected: bool = False  # there is a correction, which takes part in choosing only
    router_bias: bool = False
    limit: float | None = None  # gpt-oss: gate and up stay within it, and all experts lie in one tensor
    alpha: float | None = None

    @classmethod
    def read(cls, settings: dict[str, Any], family: Family) -> "Experts":
        read = dict.fromkeys(("scaling", "limit", "alpha"), number)
        read |= {"normalise": dict.__getitem__, "first_layer": lambda *setting: size(*setting, least=0)}
        names = dict(family.experts)
        if settings.get("topk_method") == "greedy":  # every expert is open to every token, whatever n_group says
            del names["groups"], names["groups_per_token"]
        given = {field: read.get(field, size)(settings, name) for field, name in names.items()}
        experts = cls(**(given | family.fixed_experts))
        experts._check()
        return experts

    def _check(self) -> None:
        in_group = self.count // self.groups
        too_small = self.groups > 1 and in_group < self.group_top
        if self.count % self.groups or self.groups_per_token > self.groups or too_small:
            raise ValueError(
                f"{self.count} experts in {self.groups} groups, {self.groups_per_token} of them open to a token: "
                f"groups must be equal, of at least {self.group_top} experts, and no more open than there are"
            )
        if self.per_token > in_group * self.groups_per_token:
            raise ValueError(
                f"a token chooses {self.per_token} experts, and only {in_group * self.groups_per_token} are open to it"
            )

    def shapes(self, d: int) -> Shapes:
        shapes = linear_shapes(f"mlp.{self.router}", self.count, d, self.router_bias)
        if self.corrected:
            shapes[f"mlp.{self.router}.e_score_correction_bias"] = (self.count,)
        if self.num_shared:
            shapes |= gated_shapes("mlp.shared_experts", d, self.num_shared * self.width)
        if self.limit is None:
            for expert in range(self.count):
                shapes |= gated_shapes(f"mlp.experts.{expert}", d, self.width)
            return shapes
        return shapes | {  # all experts in one tensor each, inputs before outputs
            "mlp.experts.gate_up_proj": (self.count, d, 2 * self.width),
            "mlp.experts.gate_up_proj_bias": (self.count, 2 * self.width),
            "mlp.experts.down_proj": (self.count, self.width, d),
            "mlp.experts.down_proj_bias": (self.count, d),
        }
