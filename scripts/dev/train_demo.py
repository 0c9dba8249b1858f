"""Train the embedded demo model: a small Llama of simple English that has an attention sink.

It ships with the package (3 MB), so everything can be tried, tested and measured offline. `<s>`
stands at slot 0 of every training sequence: a token that is always there and never carries news is
where attention heads learn to park what they do not want to spend, and that is what a sink is.

    OMP_WAIT_POLICY=passive python scripts/dev/train_demo.py --data FOLDER --minutes 60

FOLDER holds .txt files: books, one paragraph a line, and stories separated by `<|endoftext|>`.
On a busy machine the passive policy keeps threads from burning the time they wait for each other.
PyTorch, tokenizers, safetensors and numpy are needed here and nowhere else in the project.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu, scaled_dot_product_attention, silu

BOS, EOS = 0, 1  # ids of <s> and </s>
NUM_SINKS, WINDOW = 4, 252  # the streaming arms of the final table; together half the context
# Large models learn to score slot 0 high by themselves, from more tokens than a CPU reads in an
# hour (without help, 0.00 of the attention was there after 1.2 million). A small penalty on scores
# below SINK_SCORE shows the way; how much attention then goes there, and what for, is left free.
SINK_SCORE, SINK_PULL = 8.0, 0.02


@dataclass(frozen=True)
class Config:
    """The network, in the words of config.json."""

    architectures: tuple[str, ...] = ("LlamaForCausalLM",)
    model_type: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 64  # the smallest that Apple's fused attention kernels serve
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int = BOS
    eos_token_id: int = EOS
    pad_token_id: int = EOS
    torch_dtype: str = "float32"


# -----------------------------------------------------------------------------
# text

PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "--", "\u2013": "-"}
    | {"\u2026": "...", "\xa0": " "}
    | dict.fromkeys("\r\u200b\u2060\ufeff", "")
)
# What a token may not reach across: words keep the space before them, marks the line ends after.
PIECES = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def clean(text: str) -> str:
    """Reduces one document to plain prose: a paragraph a line, a blank line between them."""
    text = text.translate(PLAIN)
    text = re.sub(r"\A# Title:.*?^-{5,}$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[Illustration[^\]]*\]", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^(#+ *|> ?|[ *=-]+$)", "", text, flags=re.MULTILINE)
    text = re.sub(r"[*_`\\]", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    # A book that never passes 100 characters a line is hard-wrapped, and a wrap says nothing.
    if "\n\n" in text and max(map(len, text.split("\n"))) < 100:
        text = re.sub(r"-\n(?=[^\n])", "-", text)
        text = re.sub(r"(?<=[^\n])\n(?=[^\n])", " ", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip()


def read_documents(folder: Path, held_out: float = 0.015) -> tuple[list[str], list[str]]:
    """Reads the training documents, and the tail of every book, which is never trained on."""
    train, tails = [], []
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        stories = text.split("<|endoftext|>")
        if len(stories) > 1:
            # The simplest text counts twice. After the last mark there is half a story: left out.
            train += 2 * [clean(story.strip().replace("\n", "\n\n")) for story in stories[:-1]]
            continue
        text = clean(text)
        cut = text.find("\n\n", int(len(text) * (1 - held_out)))
        cut = cut if cut >= 0 else len(text)
        train.append(text[:cut])
        tails.append(text[cut:].strip())
    if not tails:
        raise SystemExit(f"no books (.txt files without <|endoftext|>) in {folder}")
    return train, tails


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE: lossless for any text, and `encode` puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def to_tokens(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Joins the documents into one stream of ids, `</s>` after each."""
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor(np.concatenate([np.array([*e.ids, EOS]) for e in encoded]))


def batches(tokens: Tensor, starts: Tensor, length: int, rows: int) -> Iterator[Tensor]:
    """Yields `[rows, length + 1]` sequences for ever: `<s>`, then a crop of the stream.

    Half of the crops begin where a paragraph does, as a prompt would; the others begin anywhere,
    as a window that slides along a text does.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    last = len(tokens) - length
    starts = starts[starts < last]
    while True:
        anywhere = torch.randint(last, (rows - rows // 2,), generator=generator)
        paragraph = starts[torch.randint(len(starts), (rows // 2,), generator=generator)]
        crop = tokens[torch.cat((anywhere, paragraph))[:, None] + torch.arange(length)]
        yield pad(crop, (1, 0), value=BOS)


# -----------------------------------------------------------------------------
# model: the modules carry the Hugging Face names, so that state_dict() is the checkpoint


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies half-split RoPE to `[B, heads, L, head_dim]`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query causal attention."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        q_size, kv_size = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)

    def queries_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Projects to rotated, scaled queries and rotated keys, `[B, heads, L, head_dim]`."""
        q, k = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj)
        )
        return rotate(q, cos, sin) / math.sqrt(self.head_dim), rotate(k, cos, sin)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output, and by how much the scores of slot 0 fall short (mean square)."""
        q, k = self.queries_keys(x, cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        score = (q * k[:, :, :1].repeat_interleave(self.groups, dim=1)).sum(-1)
        shortfall = relu(SINK_SCORE - score).square().mean()
        return self.o_proj(y.transpose(1, 2).flatten(2)), shortfall

    def sink_share(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns each head's attention on slot 0, averaged over the later half of the queries."""
        q, k = self.queries_keys(x, cos, sin)
        scores = q @ k.repeat_interleave(self.groups, dim=1).transpose(-1, -2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return weights[:, :, weights.shape[2] // 2 :, 0].mean((0, 2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y, shortfall = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), shortfall


class Llama(nn.Module):
    """The network up to the last norm; the output head is the embedding table."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        even = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
        frequencies = c.rope_theta ** (-even / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings), frequencies)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # What is added to the residual stream starts small, so that the sum does not grow.
                added = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * len(self.layers)) if added else 1))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the hidden states, and the sum of what slot 0 falls short by."""
        x, total = self.embed_tokens(ids), torch.zeros(())
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for layer in self.layers:
            x, shortfall = layer(x, cos, sin)
            total = total + shortfall
        return self.norm(x), total


def token_loss(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in slices: the logits of a whole batch do not fit a CPU's cache."""
    slices = zip(hidden.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
    return sum(cross_entropy(h @ table.T, y, reduction="sum") for h, y in slices) / targets.numel()


# -----------------------------------------------------------------------------
# training


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices between the embeddings.

    torch.optim.Muon computes in bfloat16, 20 times slower on a CPU that has no unit for it.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2 * sqrt(longer side) gives the update the size that one of Adam has.
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Moves all singular values of `g` close to 1 (Newton-Schulz)."""
    x = (g.T if g.shape[0] > g.shape[1] else g) / g.norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if g.shape[0] > g.shape[1] else x


def train(
    model: Llama, data: Iterator[Tensor], args: argparse.Namespace, checkpoint: Callable[[], None]
) -> int:
    """Trains for `args.minutes`; returns the number of tokens seen."""
    table, decay = model.embed_tokens.weight, {"weight_decay": args.weight_decay}
    norms = [p for p in model.parameters() if p.dim() == 1]
    vectors = [{"params": [table], **decay}, {"params": norms, "weight_decay": 0.0}]
    optimizers = [
        Muon([p for p in model.layers.parameters() if p.dim() == 2], lr=args.lr, **decay),
        torch.optim.AdamW(vectors, lr=args.lr, betas=(0.9, 0.95)),
    ]
    forward = torch.compile(model)
    start = saved = time.time()
    step, seen, average = 0, 0, math.log(len(table))
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        # The schedule follows the clock: a busy machine means fewer steps, and still a full decay.
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = args.lr * min(1.0, progress / 0.02) * (1 - progress)
        batch = next(data)
        hidden, shortfall = forward(batch[:, :-1])
        loss = token_loss(hidden, table, batch[:, 1:])
        (loss + SINK_PULL * shortfall).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen, average = (
            step + 1,
            seen + batch.numel(),
            average + (loss.item() - average) / 50,
        )
        if step % 100 == 0:
            rate = f"{seen:>10,} tokens {seen / (time.time() - start):6,.0f}/s"
            print(f"{progress:6.1%} {rate}  loss {average:.3f}", flush=True)
        if time.time() - saved > 60 * args.checkpoint_minutes:
            checkpoint()
            saved = time.time()
    return seen


def export(model: Llama, config: Config, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the Hugging Face folder that mlx_lm.load reads, each file whole or not at all."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # Rounded to float16, which is all they are worth, and stored as what a CPU multiplies fastest.
    weights = {
        f"model.{name}": p.half().float().contiguous() for name, p in model.state_dict().items()
    }
    files = {
        "config.json": json.dumps(asdict(config), indent=2).encode() + b"\n",
        "tokenizer_config.json": json.dumps(kind | special, indent=2).encode() + b"\n",
        "tokenizer.json": tokenizer.to_str(pretty=True).encode() + b"\n",
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        draft = out / (name + ".part")
        draft.write_bytes(data)
        os.replace(draft, out / name)


# -----------------------------------------------------------------------------
# what came out


@torch.no_grad()
def mean_loss(model: Llama, rows: Tensor, scored: int) -> float:
    """Mean loss of the last `scored` tokens of each row."""
    total = 0.0
    for piece in rows.split(16):
        hidden = model(piece[:, :-1])[0][:, -scored:]
        loss = token_loss(hidden, model.embed_tokens.weight, piece[:, -scored:])
        total += loss.item() * len(piece)
    return total / len(rows)


@torch.no_grad()
def report(model: Llama, tokens: Tensor, length: int) -> None:
    """Prints validation loss, the attention on `<s>`, and what a window loses without it."""
    crops = tokens[: len(tokens) // length * length].view(-1, length)
    rows = pad(crops, (1, 0), value=BOS)
    print(f"\nvalidation loss, {crops.numel():,} tokens: {mean_loss(model, rows, length):.3f}")

    print("\nattention on slot 0, per head")
    x = model.embed_tokens(rows[:64, :-1])
    for i, layer in enumerate(model.layers):
        shares = layer.self_attn.sink_share(layer.input_layernorm(x), model.cos, model.sin)
        print(f"  layer {i}: " + " ".join(f"{share:.2f}" for share in shares.tolist()))
        x, _ = layer(x, model.cos, model.sin)

    # One stream; every 37th token is predicted from the visible tokens alone, positions from 0.
    stream, total = pad(tokens, (1, 0), value=BOS), NUM_SINKS + WINDOW
    ends = torch.arange(2 * total, min(len(stream), 60_000), 37)
    print(f"\nstreaming loss, recomputed from the visible tokens, {len(ends):,} tokens")
    for sinks in (0, 1, NUM_SINKS):
        recent = stream[ends[:, None] + torch.arange(sinks - total, 1)]
        visible = torch.cat((stream[:sinks].expand(len(ends), -1), recent), dim=1)
        print(f"  {sinks} + {total - sinks}: {mean_loss(model, visible, 1):.3f}")


def main() -> None:
    """Tokenizer, training, export, table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files")
    out = Path("mlx_sink/models/demo")
    parser.add_argument("--out", type=Path, default=out, help="folder to write")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--rows", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # tiny probabilities otherwise cost a trap each
    config = Config()
    length = config.max_position_embeddings
    documents, tails = read_documents(args.data)
    tokenizer = train_tokenizer(documents, config.vocab_size)
    tokens, held_out = to_tokens(tokenizer, documents), to_tokens(tokenizer, tails)
    breaks = [i for t, i in tokenizer.get_vocab().items() if t == "</s>" or t.endswith("ĊĊ")]
    starts = torch.isin(tokens, torch.tensor(breaks)).nonzero()[:, 0] + 1
    model = Llama(config)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(documents):,} documents, {len(tokens):,} tokens, {size:,} parameters", flush=True)

    data = batches(tokens, starts, length, args.rows)
    seen = train(model, data, args, lambda: export(model, config, tokenizer, args.out))
    export(model, config, tokenizer, args.out)
    print(f"\n{seen:,} tokens seen, {seen / len(tokens):.1f} times the text")
    report(model, held_out, length)


if __name__ == "__main__":
    main()
