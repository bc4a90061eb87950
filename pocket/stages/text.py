"""Trains the pocket umT5: a sentencepiece vocabulary of its own, and an encoder that must predict masked words and the scene.

The encoder is ComfyUI's own T5 class. Its residual additions are in place, which autograd refuses, so the trainer swaps in
the same additions out of place for the time of training.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from types import MethodType

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .. import hosted, world
from ..fit import fit

TEXT_LEN = 32
WIDTH = 128
CONFIG = {
    "d_ff": 256, "d_kv": 32, "d_model": WIDTH, "decoder_start_token_id": 0, "dropout_rate": 0.0, "eos_token_id": 1,
    "dense_act_fn": "gelu_pytorch_tanh", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "umt5", "num_decoder_layers": 3, "num_heads": 4, "num_layers": 3, "output_past": True,
    "pad_token_id": 0, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip
_SLOTS = (tuple(world.COLOURS), world.SHAPES, tuple(world.MOTIONS), tuple(world.SPEEDS))
FILE_NAME = "pocket_umt5.safetensors"


def train_vocabulary(seed: int) -> bytes:
    """A unigram vocabulary over captions of training scenes, with single bytes as the fallback for any other text."""
    rng = random.Random(seed)
    sentences = [world.caption(world.sample_scene(rng, held_out=False), rng) for _ in range(4000)]
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=writer, model_type="unigram", vocab_size=400, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return writer.getvalue()


def _out_of_place(encoder: torch.nn.Module) -> None:
    def attention_forward(self, x, mask=None, past_bias=None, optimized_attention=None):
        output, past_bias = self.SelfAttention(self.layer_norm(x), mask=mask, past_bias=past_bias, optimized_attention=optimized_attention)
        return x + output, past_bias

    def feed_forward(self, x):
        return x + self.DenseReluDense(self.layer_norm(x))

    for block in encoder.encoder.block:
        block.layer[0].forward = MethodType(attention_forward, block.layer[0])
        block.layer[1].forward = MethodType(feed_forward, block.layer[1])


class _Probe(torch.nn.Module):
    """Reads two things and the background from the encoded tokens; exists only during training."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [len(slot) + 1 for slot in _SLOTS] * 2 + [len(world.BACKGROUNDS)]
        self.queries = torch.nn.Parameter(torch.randn(len(sizes), WIDTH) * 0.1)
        self.attention = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, size) for size in sizes)

    def forward(self, states_BPD: torch.Tensor, padding_BP: torch.Tensor) -> list[torch.Tensor]:
        queries = self.queries.expand(len(states_BPD), -1, -1)
        pooled, _ = self.attention(queries, states_BPD, states_BPD, key_padding_mask=padding_BP, need_weights=False)
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]


def _labels(text: str) -> list[int]:
    scene = world.parse(text)
    labels = []
    for index in range(2):
        thing = scene.things[index] if index < len(scene.things) else None
        values = (thing.colour, thing.shape, thing.motion, thing.speed) if thing else (None,) * 4
        labels += [slot.index(value) + 1 if value else 0 for slot, value in zip(_SLOTS, values, strict=True)]
    return [*labels, list(world.BACKGROUNDS).index(scene.background)]


def build(weights: Path, scratch: Path, seed: int) -> None:
    import comfy.ops
    import comfy.text_encoders.t5

    vocabulary = train_vocabulary(seed)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=vocabulary, add_bos=False, add_eos=True)
    config = {**CONFIG, "vocab_size": tokenizer.get_piece_size()}
    encoder = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    hosted.initialise(encoder, seed)
    with torch.no_grad():
        for block in encoder.encoder.block:  # T5 does not scale its attention scores, its initial queries are small instead
            block.layer[0].SelfAttention.q.weight *= CONFIG["d_kv"] ** -0.5
    _out_of_place(encoder)
    probe, masked_head = _Probe(), torch.nn.Linear(WIDTH, config["vocab_size"])
    modules = torch.nn.ModuleDict({"encoder": encoder, "probe": probe, "masked_head": masked_head})

    def loss_of(step: int, rng: random.Random) -> torch.Tensor:
        texts = [world.caption(world.sample_scene(rng, held_out=False), rng) for _ in range(64)]
        rows = [tokenizer.encode(text)[:TEXT_LEN] for text in texts]
        ids = torch.tensor([row + [0] * (TEXT_LEN - len(row)) for row in rows])
        is_real = ids != 0
        is_masked = (torch.rand(ids.shape) < 0.12) & is_real
        states, _ = encoder(ids.masked_fill(is_masked, 2), attention_mask=is_real.long())
        loss = 0.5 * F.cross_entropy(masked_head(states)[is_masked], ids[is_masked])
        targets = torch.tensor([_labels(text) for text in texts])
        return loss + sum(F.cross_entropy(logits, targets[:, index]) for index, logits in enumerate(probe(states, ~is_real)))

    fit("text", modules, loss_of, steps=700, peak_lr=1.5e-3, folder=scratch, seed=seed)
    tensors = {key: value.half().contiguous() for key, value in encoder.state_dict().items()}
    tensors["spiece_model"] = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
    metadata = {"format": "pt", "config": json.dumps({"umt5xxl_model_config": config, "text_len": TEXT_LEN})}
    save_file(tensors, weights / FILE_NAME, metadata=metadata)


class Encoder:
    """The built pocket umT5 for the trainers: captions -> context rows, zero where there is no text (as the host gives them)."""

    def __init__(self, weights: Path) -> None:
        import comfy.ops
        import comfy.text_encoders.t5

        tensors = load_file(weights / FILE_NAME)
        vocabulary = tensors.pop("spiece_model").numpy().tobytes()
        self._tokenizer = sentencepiece.SentencePieceProcessor(model_proto=vocabulary, add_bos=False, add_eos=True)
        config = {**CONFIG, "vocab_size": self._tokenizer.get_piece_size()}
        self._module = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
        self._module.load_state_dict({key: value.float() for key, value in tensors.items()})
        self._module.eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """-> float32 [B, TEXT_LEN, WIDTH]."""
        rows = [self._tokenizer.encode(text)[:TEXT_LEN] for text in texts]
        ids = torch.tensor([row + [0] * (TEXT_LEN - len(row)) for row in rows])
        is_real = ids != 0
        states, _ = self._module(ids, attention_mask=is_real.long())
        return states * is_real[..., None]
