"""The Wan2.1 VAE's decoder with gradient in little memory: every layer keeps its input alone and runs again in backward.

The decoder is causal: later frames read the last two frames of what each convolution saw before (the feature caches). The host keeps these in a list that
every pass changes, so that a layer run again under an ordinary checkpoint would read what the frames after it left there, and give wrong gradients without a
word (Wan-Video/Wan2.1#430). Here caches go in and come out of each layer as tensors, so that a second run reads what the first one read, and gradient
flows through them to earlier frames.

Three levels run again, each holding its inputs: a chunk of two latents (if there are several), the pieces of two frames in which the host runs the largest
layers, and each layer. The order of operations is the host's, so an output has the host's bits. Caches wait on `keep_device` between their uses.

Shapes: B batch, C channels, F frames, H W.
"""

from __future__ import annotations

from functools import partial

import torch
from comfy.ldm.wan.vae import CACHE_T, CausalConv3d, Resample, ResidualBlock
from torch.autograd.function import once_differentiable

# A cache: a tensor, or the host's marks: None before the first frame, "Rep" after a first frame that is not doubled.
Cache = torch.Tensor | str | None
_PIECE_FRAMES = 2


def decode(network: torch.nn.Module, latent_BCFHW: torch.Tensor, keep_device: torch.device | None = None) -> torch.Tensor:
    """Pixels [B, 3, 4F-3, 8H, 8W] in the network's range, differentiable in the latent.

    Args:
        network: the host's WanVAE, frozen.
        latent_BCFHW: in the network's own space.
        keep_device: where caches wait for backward; None leaves them where they are made.
    """
    decoder = _Decoder(network.decoder, keep_device)
    x = network.conv2(latent_BCFHW)
    chunks = [x[:, :, :1], *x[:, :, 1:].split(_PIECE_FRAMES, dim=2)] if x.shape[2] > 1 else [x]
    pixels, caches = [], decoder.no_caches()
    for chunk in chunks:
        run = partial(decoder.run, 0, chunk is not chunks[-1])
        made, *caches = run(chunk, *caches) if len(chunks) == 1 else again(run, chunk, *caches)
        pixels.append(made)
    return torch.cat(pixels, dim=2)


class _Decoder:
    """The host's Decoder3d as a row of layers, each a function of its input and its caches."""

    def __init__(self, decoder: torch.nn.Module, keep_device: torch.device | None) -> None:
        self._layers = [decoder.conv1, *decoder.middle, *decoder.upsamples, decoder.head]
        self._keep_device = keep_device
        splitting = [index for index, layer in enumerate(self._layers) if _doubles_frames(layer)]
        self._last_split = max(splitting, default=-1)

    def no_caches(self) -> list[Cache]:
        """Of all layers, before the first frame."""
        return [None] * sum(map(_cache_count, self._layers))

    def run(self, first: int, keep: bool, x: torch.Tensor, *caches: Cache) -> tuple:
        """Layers from `first` on.

        Args:
            keep: more frames come; else no caches are returned.
            caches: of these layers.

        Returns:
            Pixels, and the caches after these frames.
        """
        waiting, made = list(caches), []
        for index in range(first, len(self._layers)):
            layer = self._layers[index]
            count = _cache_count(layer)
            x, *after = again(partial(self._layer, layer, keep), x, *waiting[:count])
            made += after
            waiting = waiting[count:]
            if _doubles_frames(layer) and x.shape[2] > _PIECE_FRAMES:
                return self._pieces(index, keep, x, made, waiting)
        return x, *made

    def _pieces(self, index: int, keep: bool, x: torch.Tensor, made: list[Cache], waiting: list[Cache]) -> tuple:
        """The layers after `index`, two frames at a time."""
        parts, pieces = [], x.split(_PIECE_FRAMES, dim=2)
        for number, piece in enumerate(pieces, 1):
            run = partial(self.run, index + 1, keep or number < len(pieces))
            part, *waiting = again(run, piece, *waiting) if index == self._last_split else run(piece, *waiting)
            parts.append(part)
        return torch.cat(parts, dim=2), *made, *waiting

    def _layer(self, layer: torch.nn.Module, keep: bool, x: torch.Tensor, *caches: Cache) -> tuple:
        used = [cache.to(x.device) if isinstance(cache, torch.Tensor) else cache for cache in caches]
        out, after = _apply(layer, x, used)
        return out, *(self._kept(cache) for cache in after if keep)

    def _kept(self, cache: Cache) -> Cache:
        return cache.to(self._keep_device or cache.device) if isinstance(cache, torch.Tensor) else cache


def _apply(layer: torch.nn.Module, x: torch.Tensor, caches: list[Cache]) -> tuple[torch.Tensor, list[Cache]]:
    """One layer's output and caches after it."""
    if isinstance(layer, ResidualBlock | Resample):
        after = list(caches)
        return layer(x, after, [0]), [_own(cache, x) for cache in after]
    if isinstance(layer, CausalConv3d):
        return layer(x, caches[0]), [_own(x[:, :, -CACHE_T:], x)]
    if isinstance(layer, torch.nn.Sequential):
        *before, last = layer
        for part in before:
            x = part(x)
        return last(x, caches[0]), [x[:, :, -CACHE_T:]]
    return layer(x), []


def _own(cache: Cache, x: torch.Tensor) -> Cache:
    """A cache that is not a view of the layer's input, which an autograd function may not return."""
    is_view = isinstance(cache, torch.Tensor) and cache.untyped_storage()._cdata == x.untyped_storage()._cdata
    return cache.clone() if is_view else cache


def _cache_count(layer: torch.nn.Module) -> int:
    if isinstance(layer, ResidualBlock):
        return sum(isinstance(part, CausalConv3d) for part in layer.residual)
    return int(isinstance(layer, CausalConv3d | torch.nn.Sequential) or _doubles_frames(layer))


def _doubles_frames(layer: torch.nn.Module) -> bool:
    return isinstance(layer, Resample) and layer.mode == "upsample3d"


def again(work, *values):
    """`work(*values)`, of which only the inputs are kept; `work` runs again in backward.

    Args:
        work: returns a tuple; tensors (differentiable) and other values go in and come out.
    """
    return _Again.apply(work, *values)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, *values):
        ctx.set_materialize_grads(False)
        ctx.work = work
        ctx.plain = [None if isinstance(value, torch.Tensor) else value for value in values]
        ctx.save_for_backward(*(value if isinstance(value, torch.Tensor) else None for value in values))
        return work(*values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        values = [
            plain if tensor is None else tensor.detach().requires_grad_(needed) for tensor, plain, needed in zip(saved, ctx.plain, needs, strict=True)
        ]
        del saved
        with torch.enable_grad():
            results = ctx.work(*values)
        pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if gradient is not None and result.requires_grad]
        wanted = [value for value, needed in zip(values, needs, strict=True) if needed]
        del results, gradients
        outputs, pulls = zip(*pairs, strict=True)
        del pairs
        found = iter(torch.autograd.grad(outputs, wanted, pulls, allow_unused=True))
        return None, *(next(found) if needed else None for needed in needs)
