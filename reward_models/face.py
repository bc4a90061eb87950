"""Face identity: cosine between the ArcFace vectors of a video's faces and those of reference faces.

The reward of alibaba/ROLL@e98e9f89 (Apache-2.0, examples/wan2.2-14B-reward_fl_ds): per frame with a face, the mean cosine to all reference faces; per
video, the mean over frames with a face. Differs in: the recogniser gets RGB, as it was trained (ROLL reverses the channels, so its constants 0.54 and
0.16 do not carry over); a video without any face scores 0 with a graph and does not end the run; every reference face counts.
Weights are the user's: an `arcface_torch` backbone and a RetinaFace detector, or landmarks of the frames. InsightFace's published recognisers are for
non-commercial research only.

Shape letters: B videos, F frames, M faces, C H W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import arcface, face_detector, layouts
from .base import RewardOutput, check_frames
from .weights import load_into, read_weights

MISSING = ("skip", "zero")
LICENCE_NOTE = "The weights of InsightFace's published face recognisers are for non-commercial research only; check the licence of yours."
# Faces in one pass of the recogniser; more would only take memory.
_FACES_PER_PASS = 8


class FaceReward:
    """Likeness of faces.

    Args:
        network: recogniser with loaded weights; set to eval mode and frozen.
        find_landmarks: frames [F, 3, H, W] in [0,1] -> [F, 5, 2] landmarks in pixels (NaN: no face), without gradient.
        missing: frames without a face: "skip" leaves them out of the mean, "zero" counts them as 0.
    """

    name = "face"
    range_note = "cosine, -1 to 1, higher is better; the same person lies above about 0.4 with most recognisers; 0 when no face is found"
    needs_whole_video = True
    ignores_prompts = True

    def __init__(self, network: arcface.IResNet, find_landmarks: Callable[[Tensor], Tensor], *, missing: str = "skip"):
        if missing not in MISSING:
            raise ValueError(f"missing is {missing!r}; choose one of {', '.join(MISSING)}.")
        self.network = network.eval().requires_grad_(False)
        self.find_landmarks = find_landmarks
        self.missing = missing
        self._reference_MD: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FaceReward:
        """Move the recogniser and its detector; the recogniser stays in float32. Returns itself."""
        with torch.inference_mode(False):
            self.network.to(device)
            if isinstance(self.find_landmarks, face_detector.FaceDetector):
                self.find_landmarks.network.to(device)
        return self

    def set_reference(self, frames_FCHW: Tensor, landmarks_FK2: Tensor | None = None) -> None:
        """Take the faces that videos are compared with; without them, each video's first frame with a face is its own reference.

        Args:
            frames_FCHW: RGB in [0,1].
            landmarks_FK2: None asks the detector.

        Raises:
            ValueError: no face in any of the frames.
        """
        with torch.inference_mode(False), torch.no_grad():
            frames = frames_FCHW.to(self.network.fc.weight.device).float().clone()
            landmarks = self.find_landmarks(frames) if landmarks_FK2 is None else landmarks_FK2
            has_face = landmarks.isfinite().flatten(1).all(dim=1)
            if not has_face.any():
                raise ValueError(f"None of the {len(frames)} reference frames shows a face that the detector finds; give another picture.")
            self._reference_MD = self._vectors(frames[has_face.to(frames.device)], landmarks[has_face])

    def score(self, frames_BFCHW: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """See `base.RewardModel.score`. `per_video` is the mean over frames with a face (with `missing="zero"`: over all); parts tell which had one.

        Raises:
            ValueError: see `base.check_frames`.
        """
        check_frames(frames_BFCHW, prompts)
        rows, found = zip(*(self._score_video(frames_FCHW) for frames_FCHW in frames_BFCHW), strict=True)
        per_frame, has_face = torch.stack(rows), torch.stack(found)
        counted = has_face if self._reference_MD is not None else _without_first(has_face)
        if self.missing == "zero":
            counted = torch.ones_like(has_face)
        # The empty sum keeps a graph, so that training goes on with a zero gradient.
        per_video = (per_frame * counted).sum(dim=1) / counted.sum(dim=1).clamp_min(1)
        return RewardOutput(per_frame=per_frame, per_video=per_video, parts={"face_cosine": per_frame, "has_face": has_face.float()})

    def _score_video(self, frames_FCHW: Tensor) -> tuple[Tensor, Tensor]:
        wide = frames_FCHW.float()
        with torch.no_grad():
            landmarks_FK2 = self.find_landmarks(wide.detach())
        if landmarks_FK2.shape != (len(wide), 5, 2):
            raise ValueError(f"Landmarks have shape {tuple(landmarks_FK2.shape)}; {(len(wide), 5, 2)} is needed: five points (x, y) per frame.")
        has_face = landmarks_FK2.isfinite().flatten(1).all(dim=1).to(wide.device)
        cosine_F = wide.flatten(1).sum(dim=1) * 0
        if has_face.any():
            vectors_MD = self._vectors(wide[has_face], landmarks_FK2[has_face.to(landmarks_FK2.device)])
            cosine_F = cosine_F.index_put((has_face.nonzero()[:, 0],), self._likeness(vectors_MD), accumulate=True)
        return cosine_F, has_face

    def _likeness(self, vectors_MD: Tensor) -> Tensor:
        """Mean cosine [M] to the reference faces. Whoever moves the networks alone, as the host does, leaves the reference where it was."""
        reference_MD = vectors_MD[:1].detach() if self._reference_MD is None else self._reference_MD.to(vectors_MD)
        return (vectors_MD @ reference_MD.t()).mean(dim=1)

    def _vectors(self, frames_MCHW: Tensor, landmarks_MK2: Tensor) -> Tensor:
        vectors = []
        for start in range(0, len(frames_MCHW), _FACES_PER_PASS):
            part = slice(start, start + _FACES_PER_PASS)
            faces = arcface.align(frames_MCHW[part], landmarks_MK2[part])
            vectors.append(checkpoint(self.network, faces, use_reentrant=False) if faces.requires_grad else self.network(faces))
        return torch.cat(vectors)


def _without_first(has_face_BF: Tensor) -> Tensor:
    """Leave out each video's first face, which is the reference itself."""
    is_first = has_face_BF & (has_face_BF.cumsum(dim=1) == 1)
    return has_face_BF & ~is_first


def load(
    weights: str | Path,
    *,
    detector: str | Path | None = None,
    landmarks: str | Path | None = None,
    reference: str | Path | None = None,
    missing: str = "skip",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FaceReward:
    """Read a face reward.

    Args:
        weights: `arcface_torch` backbone.
        detector: RetinaFace MobileNet 0.25 weights.
        landmarks: instead of a detector: safetensors with `landmarks` [F, 5, 2] in pixels, NaN where there is no face; for videos of F frames.
        reference: safetensors with `frames` [R, 3, H, W] in [0,1] and optionally `landmarks` [R, 5, 2]. Pictures and videos are turned into one by the
            caller (host/reward_loading.py).
        missing: see `FaceReward`.
        device: where to put it.
        dtype: not used: the recogniser runs in float32.

    Raises:
        ValueError: neither detector nor landmarks; a file that is something else; no face in the reference.
    """
    content = read_weights(weights)
    if content.kind != "arcface":
        raise ValueError(f"{weights} is {layouts.DESCRIPTIONS[content.kind]}, but an ArcFace recogniser (arcface_torch backbone) is needed for face.")
    if bool(detector) == bool(landmarks):
        raise ValueError("The face reward needs to know where faces are: give a detector (mobilenet0.25_Final.pth) or landmarks, one of the two.")
    with torch.device("meta"):
        network = arcface.IResNet(arcface.depths_of(content.state), len(content.state["fc.bias"]))
    load_into(network, content.state, str(weights))
    find = face_detector.load(detector, device) if detector else _fixed_landmarks(Path(landmarks))
    model = FaceReward(network.float().to(device), find, missing=missing)
    if reference:
        tensors = load_file(reference)
        if "frames" not in tensors:
            raise ValueError(f"{reference} has no tensor called frames; it needs `frames` [R, 3, H, W] in [0,1].")
        model.set_reference(tensors["frames"], tensors.get("landmarks"))
    return model


def _fixed_landmarks(path: Path) -> Callable[[Tensor], Tensor]:
    tensors = load_file(path)
    if "landmarks" not in tensors or tensors["landmarks"].shape[1:] != (5, 2):
        raise ValueError(f"{path} has no tensor landmarks of shape [F, 5, 2]: five points (x, y) in pixels per frame.")

    def find(frames_FCHW: Tensor) -> Tensor:
        if len(frames_FCHW) != len(tensors["landmarks"]):
            raise ValueError(f"{path} has landmarks of {len(tensors['landmarks'])} frames, the video has {len(frames_FCHW)}; give those of this video.")
        return tensors["landmarks"].float()

    return find
