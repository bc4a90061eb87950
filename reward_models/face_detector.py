"""RetinaFace with a MobileNet (0.25) body: finds the largest face of a picture and its five landmarks. No gradient.

Own implementation; parameter names and constants are those of biubug6/Pytorch_Retinaface@b984b4b (MIT): its `mobilenet0.25_Final.pth` (also shipped
by facexlib as `detection_mobilenet0.25_Final.pth`) loads, with or without the `module.` prefix.

Shape letters: F frames, A anchors, C H W.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .weights import load_into, read_weights

_CHANNELS = 64
_STEPS = (8, 16, 32)
_SIZES = ((16, 32), (64, 128), (256, 512))
_VARIANCES = (0.1, 0.2)
# In the channel order BGR, as OpenCV read the training pictures.
_MEAN_BGR = (104.0, 117.0, 123.0)
_LONG_SIDE_PX = 640
_LEAK = 0.1


def _conv(channels_in: int, channels: int, size: int, stride: int = 1, leak: float | None = _LEAK) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False), nn.BatchNorm2d(channels)]
    return nn.Sequential(*layers) if leak is None else nn.Sequential(*layers, nn.LeakyReLU(leak))


def _separable(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
        nn.BatchNorm2d(channels_in),
        nn.LeakyReLU(_LEAK),
        nn.Conv2d(channels_in, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(_LEAK),
    )


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = [_separable(8, 16, 1), _separable(16, 32, 2), _separable(32, 32, 1), _separable(32, 64, 2), _separable(64, 64, 1)]
        self.stage1 = nn.Sequential(_conv(3, 8, 3, 2), *first)
        self.stage2 = nn.Sequential(_separable(64, 128, 2), *(_separable(128, 128, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(_separable(128, 256, 2), _separable(256, 256, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        one = self.stage1(x)
        two = self.stage2(one)
        return [one, two, self.stage3(two)]


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number, width in enumerate((64, 128, 256), 1):
            setattr(self, f"output{number}", _conv(width, _CHANNELS, 1))
        self.merge1 = _conv(_CHANNELS, _CHANNELS, 3)
        self.merge2 = _conv(_CHANNELS, _CHANNELS, 3)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        one, two, three = self.output1(levels[0]), self.output2(levels[1]), self.output3(levels[2])
        two = self.merge2(two + functional.interpolate(three, size=two.shape[2:], mode="nearest"))
        one = self.merge1(one + functional.interpolate(two, size=one.shape[2:], mode="nearest"))
        return [one, two, three]


class _Context(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        half, quarter = _CHANNELS // 2, _CHANNELS // 4
        self.conv3X3 = _conv(_CHANNELS, half, 3, leak=None)
        self.conv5X5_1 = _conv(_CHANNELS, quarter, 3)
        self.conv5X5_2 = _conv(quarter, quarter, 3, leak=None)
        self.conv7X7_2 = _conv(quarter, quarter, 3)
        self.conv7x7_3 = _conv(quarter, quarter, 3, leak=None)

    def forward(self, x: Tensor) -> Tensor:
        five = self.conv5X5_1(x)
        return functional.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(five), self.conv7x7_3(self.conv7X7_2(five))], dim=1))


class _Head(nn.Module):
    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(_CHANNELS, 2 * numbers, 1)
        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.numbers))


class RetinaFace(nn.Module):
    """The detector's network: face probability, box and landmark offsets for every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()
        self.fpn = _Pyramid()
        self.ssh1, self.ssh2, self.ssh3 = _Context(), _Context(), _Context()
        self.ClassHead = nn.ModuleList(_Head(2) for _ in range(3))
        self.BboxHead = nn.ModuleList(_Head(4) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(_Head(10) for _ in range(3))

    def forward(self, pictures_FCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probability [F, A], box offsets [F, A, 4], landmark offsets [F, A, 10]."""
        levels = [ssh(level) for ssh, level in zip((self.ssh1, self.ssh2, self.ssh3), self.fpn(self.body(pictures_FCHW)), strict=True)]
        joined = (torch.cat([head(level) for head, level in zip(heads, levels, strict=True)], dim=1) for heads in self._heads())
        classes, boxes, landmarks = joined
        return classes.softmax(dim=-1)[..., 1], boxes, landmarks

    def _heads(self) -> tuple[nn.ModuleList, ...]:
        return self.ClassHead, self.BboxHead, self.LandmarkHead


def anchors(height_px: int, width_px: int) -> Tensor:
    """Centre x, centre y, width, height of every anchor in shares of the picture, [A, 4], in the order of the heads."""
    rows = []
    for step, sizes in zip(_STEPS, _SIZES, strict=True):
        down, right = -(-height_px // step), -(-width_px // step)
        y, x = torch.meshgrid(torch.arange(down) + 0.5, torch.arange(right) + 0.5, indexing="ij")
        place = torch.stack([x * step / width_px, y * step / height_px], dim=-1)
        cells = [torch.cat([place, torch.tensor([size / width_px, size / height_px]).expand_as(place)], dim=-1) for size in sizes]
        rows.append(torch.stack(cells, dim=2).reshape(-1, 4))
    return torch.cat(rows)


class FaceDetector:
    """Finds the largest face of every frame.

    Args:
        network: loaded weights.
        threshold: smallest probability of a face.
    """

    def __init__(self, network: RetinaFace, threshold: float = 0.5):
        self.network = network.eval().requires_grad_(False)
        self.threshold = threshold

    @torch.no_grad()
    def __call__(self, frames_FCHW: Tensor) -> Tensor:
        """Landmarks [F, 5, 2] (x, y in pixels, on the CPU) of the largest face of RGB frames in [0,1]; NaN where there is none."""
        height, width = frames_FCHW.shape[-2:]
        scale = min(1.0, _LONG_SIDE_PX / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        mean = frames_FCHW.new_tensor(_MEAN_BGR).view(3, 1, 1)
        found, places = [], anchors(*size).to(frames_FCHW)
        for frame_CHW in frames_FCHW:
            small = functional.interpolate(frame_CHW[None].float(), size=size, mode="bilinear", antialias=True)
            probability, boxes, offsets = self.network(small.flip(1) * 255 - mean)
            found.append(self._largest(probability[0], boxes[0], offsets[0], places))
        landmarks = torch.stack(found).cpu()
        return landmarks * torch.tensor([width, height], dtype=landmarks.dtype) - 0.5

    def _largest(self, probability_A: Tensor, boxes_A4: Tensor, offsets_A10: Tensor, places_A4: Tensor) -> Tensor:
        """Landmarks [5, 2] in shares of the picture; NaN where nothing is sure, without asking the device whether it is."""
        # Of overlapping anchors of one face the surest one is taken; boxes decide which face is the largest.
        sure = probability_A >= self.threshold
        area_A = (places_A4[:, 2:] * (boxes_A4[:, 2:] * _VARIANCES[1]).exp()).prod(dim=1)
        centre_A2 = places_A4[:, :2] + boxes_A4[:, :2] * _VARIANCES[0] * places_A4[:, 2:]
        biggest = torch.where(sure, area_A, area_A.new_zeros(())).argmax(dim=0, keepdim=True)
        near = sure & ((centre_A2 - centre_A2[biggest]).abs() < area_A[biggest].sqrt() / 2).all(dim=1)
        best = torch.where(near, probability_A, probability_A.new_zeros(())).argmax(dim=0, keepdim=True)
        points_52 = offsets_A10[best].view(5, 2) * _VARIANCES[0] * places_A4[best, 2:]
        return torch.where(sure.any(), (places_A4[best, :2] + points_52).float(), float("nan"))


def load(path: str | Path, device: torch.device | str = "cpu") -> FaceDetector:
    """Read a detector.

    Raises:
        ValueError: the file is unreadable or is another model.
    """
    content = read_weights(path)
    if "ClassHead.0.conv1x1.weight" not in content.state:
        keys = ", ".join(sorted(content.state)[:4])
        raise ValueError(f"{path} is not a RetinaFace detector (keys {keys}, ...); give mobilenet0.25_Final.pth, or landmarks instead.")
    with torch.device("meta"):
        network = RetinaFace()
    load_into(network, content.state, str(path))
    return FaceDetector(network.float().to(device))
