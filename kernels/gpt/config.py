"""What a GPT is made of: its sizes and variants, and three presets of them."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and variants of a decoder-only transformer.

    `norm`: "pre" normalises the input of every sub-layer and once before the head (GPT-2); "post"
    normalises each sum ``x + sublayer(x)`` (Vaswani et al., 2017) and needs no final norm.
    `bias` concerns the linear layers and layer norms, `qkv_bias` the query, key and value
    projection alone; the head has none. Raises ValueError naming the field that is wrong.
    """

    vocab_size: int  # tokens
    block_size: int  # longest context, tokens
    n_layer: int
    n_head: int
    n_embd: int  # width; n_embd / n_head is the head dimension
    dropout: float = 0.0  # probability of zeroing, in [0, 1)
    bias: bool = True
    qkv_bias: bool = True
    norm: str = "pre"  # "pre" | "post"
    activation: str = "gelu"  # "gelu" (exact) | "relu"
    tie_weights: bool = True  # the head reuses the token embedding

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("bias", "qkv_bias", "tie_weights"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f'norm must be "pre" or "post", got {self.norm!r}')
        if self.activation not in ("gelu", "relu"):
            raise ValueError(f'activation must be "gelu" or "relu", got {self.activation!r}')

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> GPTConfig:
        """The configuration that ``dataclasses.asdict`` turned into `values`."""
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every type


@dataclass(frozen=True)
class Preset:
    """A model and the training settings that suit it; the data set the vocabulary size."""

    model: GPTConfig
    batch_size: int  # sequences per step
    learning_rate: float  # at its highest, after warm-up
    steps: int


PRESETS = {
    # Learns visibly within a minute on two CPU cores.  A longer context would learn more slowly; in
    # a shorter one, or with fewer heads, either side spends its time in the same matmuls.
    "demo": Preset(
        GPTConfig(vocab_size=128, block_size=256, n_layer=4, n_head=8, n_embd=128),
        batch_size=4,
        learning_rate=3e-3,
        steps=1000,
    ),
    # A character model for one GPU: post-norm, ReLU, untied head, as in the original transformer.
    "char": Preset(
        GPTConfig(
            vocab_size=128,
            block_size=128,
            n_layer=8,
            n_head=8,
            n_embd=512,
            dropout=0.14,
            qkv_bias=False,
            norm="post",
            activation="relu",
            tie_weights=False,
        ),
        batch_size=64,
        learning_rate=3e-4,
        steps=5000,
    ),
    # The sizes of GPT-2 small (124 M parameters with its own vocabulary).
    "gpt2": Preset(
        GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
        batch_size=12,
        learning_rate=6e-4,
        steps=20000,
    ),
}
