"""ArcFace recogniser: the improved ResNet that turns an aligned face of 112 x 112 pixels into a vector of 512 numbers, and the alignment itself.

Own implementation; parameter names are those of deepinsight/insightface@a1eb8523:recognition/arcface_torch/backbones/iresnet.py (MIT), so that its
`backbone.pth` files load. Depth (18, 34, 50, 100, ...) is read off the file. The published weights are for non-commercial research only.

Shape letters: M faces, C H W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE_PX = 112
# Eyes, nose, corners of the mouth (x, y) in the aligned picture.
# Source: insightface@a1eb8523:python-package/insightface/utils/face_align.py, arcface_dst (MIT).
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Norm, convolution, norm, PReLU, convolution, norm, plus the input."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))) + shortcut


class IResNet(nn.Module):
    """The recogniser.

    Args:
        depths: blocks in each of the four stages.
        features: length of the vector.
    """

    def __init__(self, depths: Sequence[int], features: int = 512):
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.prelu = nn.PReLU(_WIDTHS[0])
        channels = _WIDTHS[0]
        for stage, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True), 1):
            blocks = [Block(channels if i == 0 else width, width, 2 if i == 0 else 1) for i in range(depth)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            channels = width
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * (SIZE_PX // 16) ** 2, features)
        self.features = nn.BatchNorm1d(features)

    def forward(self, faces_MCHW: Tensor) -> Tensor:
        """Unit vectors [M, features], float32, of aligned RGB faces in [0,1]."""
        x = ((faces_MCHW - 0.5) / 0.5).to(self.conv1.weight.dtype)
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return functional.normalize(self.features(self.fc(self.bn2(x).flatten(1))).float(), dim=-1)


def depths_of(state: Mapping[str, Tensor]) -> list[int]:
    """Blocks per stage, read off the names.

    Raises:
        ValueError: a stage has none.
    """
    depths = []
    for stage in range(1, 5):
        numbers = {int(key.split(".")[1]) for key in state if key.startswith(f"layer{stage}.")}
        depths.append(len(numbers))
    if not all(depths):
        raise ValueError(f"The ArcFace file has stages of {depths} blocks; all four must be there.")
    return depths


def similarity_transform(points_K2: Tensor, target_K2: Tensor) -> Tensor:
    """The rotation, uniform scale and shift that bring points closest to the target, as a matrix [2, 3]; a constant, without gradient.

    In the plane the best fit is linear in (a, b) = scale (cos, sin): least squares in closed form, the same as Umeyama's without reflection.
    Source: S. Umeyama, PAMI 13(4), 1991.
    """
    points, target = points_K2.double(), target_K2.double()
    centre, centre_target = points.mean(dim=0), target.mean(dim=0)
    x, y = (points - centre).unbind(dim=1)
    u, v = (target - centre_target).unbind(dim=1)
    size = (x * x + y * y).sum().clamp_min(1e-12)
    a, b = (x * u + y * v).sum() / size, (x * v - y * u).sum() / size
    turn = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])
    return torch.cat([turn, (centre_target - turn @ centre)[:, None]], dim=1)


def align(frames_MCHW: Tensor, landmarks_MK2: Tensor) -> Tensor:
    """Faces of 112 x 112 pixels, differentiable in the frames; pixels outside the frame are black.

    Args:
        frames_MCHW: RGB.
        landmarks_MK2: five points (x, y) in pixels each, pixel centres at whole numbers.
    """
    height, width = frames_MCHW.shape[-2:]
    template = torch.tensor(TEMPLATE, dtype=torch.float64)
    steps = torch.arange(SIZE_PX, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places_3N = torch.stack([columns.flatten(), rows.flatten(), torch.ones(SIZE_PX**2, dtype=torch.float64)])
    grids = []
    for landmarks_K2 in landmarks_MK2.detach().cpu():
        forward_23 = similarity_transform(landmarks_K2, template)
        back_22 = torch.linalg.inv(forward_23[:, :2])
        source_2N = back_22 @ (places_3N[:2] - forward_23[:, 2:])
        x, y = source_2N[0] * 2 / max(1, width - 1) - 1, source_2N[1] * 2 / max(1, height - 1) - 1
        grids.append(torch.stack([x, y], dim=-1).view(SIZE_PX, SIZE_PX, 2))
    grid_MHW2 = torch.stack(grids).to(frames_MCHW)
    return functional.grid_sample(frames_MCHW, grid_MHW2, mode="bilinear", padding_mode="zeros", align_corners=True)
