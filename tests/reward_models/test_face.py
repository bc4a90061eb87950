"""Face identity: names of the published backbones, the alignment, references, frames without a face, gradients, the detector's arithmetic."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from reward_lab.reward_models import arcface, face, face_detector
from reward_lab.reward_models.loader import load_reward_model
from reward_lab.tests.reward_models.conftest import random_network

NOWHERE = torch.full((5, 2), float("nan"))


@pytest.fixture(scope="module")
def backbone():
    """A random recogniser of the smallest depth."""
    return random_network(arcface.IResNet((1, 1, 1, 1), 32))


def placed(scale: float = 1.0, turn: float = 0.0, x: float = 0.0, y: float = 0.0) -> torch.Tensor:
    """The template's landmarks [5, 2], turned, scaled and moved."""
    angle = torch.tensor(turn)
    matrix = scale * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return torch.tensor(arcface.TEMPLATE) @ matrix.t() + torch.tensor([x, y])


@pytest.fixture
def portrait():
    """A smooth picture [1, 3, 160, 180], so that resampling is exact enough to compare."""
    rows, columns = torch.meshgrid(torch.arange(160) / 160, torch.arange(180) / 180, indexing="ij")
    return torch.stack([(6 * rows).sin() * (5 * columns).cos(), (4 * rows + 3 * columns).sin(), (7 * columns * rows).cos()])[None] / 2 * 0.9 + 0.5


def test_similarity_transform_undoes_any_turn_scale_and_shift():
    target = torch.tensor(arcface.TEMPLATE, dtype=torch.float64)
    points = placed(1.7, 0.4, 30, 12)
    matrix = arcface.similarity_transform(points, target)
    found = points.double() @ matrix[:, :2].t() + matrix[:, 2]
    torch.testing.assert_close(found, target, rtol=0, atol=1e-4)


def test_alignment_puts_landmarks_on_the_template(portrait):
    plain = arcface.align(portrait, placed()[None])
    torch.testing.assert_close(plain, portrait[..., :112, :112], rtol=0, atol=1e-5)
    moved = arcface.align(portrait, placed(x=20, y=30)[None])
    torch.testing.assert_close(moved, portrait[..., 30:142, 20:132], rtol=0, atol=1e-4)


def test_published_backbones_fit_key_by_key():
    """arcface_torch's iresnet100 from its published shape: names, sizes and number of parameters, on the meta device."""
    with torch.device("meta"):
        network = arcface.IResNet((3, 13, 30, 3))
    state = network.state_dict()
    assert sum(parameter.numel() for parameter in network.parameters()) == 65_156_160
    shapes = {"conv1.weight": (64, 3, 3, 3), "layer1.0.downsample.0.weight": (64, 64, 1, 1), "layer3.29.prelu.weight": (256,)}
    shapes |= {"fc.weight": (512, 25088), "features.running_var": (512,), "layer4.2.bn3.num_batches_tracked": ()}
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert arcface.depths_of(state) == [3, 13, 30, 3]


def fixed(landmarks: torch.Tensor):
    return lambda frames: landmarks[: len(frames)]


def test_likeness_to_a_reference_and_frames_without_a_face(backbone, portrait):
    model = face.FaceReward(backbone, fixed(torch.stack([placed(), NOWHERE, placed(x=20, y=30)])))
    frames = portrait.repeat(3, 1, 1, 1)[None]
    model.set_reference(portrait, placed()[None])
    output = model.score(frames, [""])
    vectors = backbone(torch.cat([portrait[..., :112, :112], portrait[..., 30:142, 20:132]]))
    assert output.parts["has_face"].tolist() == [[1, 0, 1]]
    assert output.per_frame[0, 0] == pytest.approx(1, abs=1e-4) and output.per_frame[0, 1] == 0
    assert output.per_frame[0, 2] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-3)
    assert float(output.per_video) == pytest.approx(float((output.per_frame[0, 0] + output.per_frame[0, 2]) / 2))
    model.missing = "zero"
    assert float(model.score(frames, [""]).per_video) == pytest.approx(float(output.per_frame.sum() / 3))


def test_without_reference_the_first_face_is_the_reference_and_does_not_count(backbone, portrait):
    model = face.FaceReward(backbone, fixed(torch.stack([NOWHERE, placed(), placed(x=20, y=30)])))
    output = model.score(portrait.repeat(3, 1, 1, 1)[None], [""])
    assert output.per_frame[0, 1] == pytest.approx(1, abs=1e-4)
    assert float(output.per_video) == pytest.approx(float(output.per_frame[0, 2]))


def test_a_video_without_any_face_scores_zero_with_a_graph(backbone, portrait):
    model = face.FaceReward(backbone, fixed(torch.stack([NOWHERE, NOWHERE])))
    frames = portrait.repeat(2, 1, 1, 1)[None].requires_grad_()
    reward = model.score(frames, [""]).per_video
    reward.sum().backward()
    assert float(reward) == 0 and not frames.grad.any()


def test_gradient_reaches_the_face_and_only_the_face(backbone, portrait):
    model = face.FaceReward(backbone, fixed(torch.stack([placed(), placed(0.5, 0, 10, 20)])))
    frames = portrait.repeat(2, 1, 1, 1)[None].clone().requires_grad_()
    model.set_reference(portrait.flip(-1), placed()[None])
    model.score(frames, [""]).per_video.sum().backward()
    assert frames.grad[0, 1, :, 20:76, 10:66].abs().sum() > 0
    assert not frames.grad[0, 1, :, 80:].any() and not frames.grad[0, 1, :, :, 70:].any()


def test_channels_are_rgb(backbone, portrait):
    """The recogniser gets pictures as they are; ROLL's reversed channels give another score."""
    model = face.FaceReward(backbone, fixed(placed()[None]))
    model.set_reference(portrait, placed()[None])
    assert float(model.score(portrait[None], [""]).per_video) == pytest.approx(1, abs=1e-4)
    assert float(model.score(portrait.flip(1)[None], [""]).per_video) < 0.99


def test_files_are_read_and_wrong_ones_named(backbone, portrait, tmp_path, scorers):
    torch.save({f"module.{key}": value for key, value in backbone.state_dict().items()}, tmp_path / "backbone.pth")
    save_file({"landmarks": placed()[None].repeat(2, 1, 1)}, tmp_path / "landmarks.safetensors")
    save_file({"frames": portrait, "landmarks": placed()[None]}, tmp_path / "reference.safetensors")
    options = {"landmarks": tmp_path / "landmarks.safetensors", "reference": tmp_path / "reference.safetensors"}
    model = load_reward_model("face", tmp_path / "backbone.pth", **options)
    assert float(model.score(portrait.repeat(2, 1, 1, 1)[None], [""]).per_video) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="has landmarks of 2 frames, the video has 3"):
        model.score(portrait.repeat(3, 1, 1, 1)[None], [""])
    with pytest.raises(ValueError, match="needs to know where faces are"):
        load_reward_model("face", tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="an ArcFace recogniser"):
        load_reward_model("face", scorers.folder / "hps" / "hps_tiny.pt", landmarks=options["landmarks"])
    with pytest.raises(ValueError, match="is not a RetinaFace detector"):
        load_reward_model("face", tmp_path / "backbone.pth", detector=scorers.folder / "hps" / "hps_tiny.pt")
    with pytest.raises(ValueError, match="Load it with kind face"):
        load_reward_model("hpsv2", tmp_path / "backbone.pth")


def test_detector_finds_the_place_that_its_network_names(tmp_path):
    """A network with set heads: one anchor is sure, and its offsets must come out as pixels by RetinaFace's arithmetic."""
    network = random_network(face_detector.RetinaFace(), 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 426_608
    save_file({f"module.{key}": value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "detector.safetensors")
    detector = face_detector.load(tmp_path / "detector.safetensors")
    places = face_detector.anchors(64, 96)
    assert len(places) == 2 * (8 * 12 + 4 * 6 + 2 * 3)
    index = 2 * (3 * 12 + 5) + 1
    torch.testing.assert_close(places[index], torch.tensor([5.5 * 8 / 96, 3.5 * 8 / 64, 32 / 96, 32 / 64]))
    probability = torch.zeros(len(places))
    probability[index] = 0.9
    offsets = torch.zeros(len(places), 10)
    offsets[index] = torch.arange(10.0)
    found = detector._largest(probability, torch.zeros(len(places), 4), offsets, places)
    expected = torch.tensor([5.5 * 8, 3.5 * 8]) + torch.arange(10.0).view(5, 2) * 0.1 * 32
    torch.testing.assert_close(found * torch.tensor([96.0, 64.0]), expected)
    assert detector._largest(probability * 0.5, torch.zeros(len(places), 4), offsets, places).isnan().all()
    assert detector(torch.rand(2, 3, 70, 90)).shape == (2, 5, 2)


def test_on_a_card_the_detector_mixes_no_devices():
    """Fake tensors of a card: every operation is checked to find its tensors on one device, whatever the frames show."""
    with FakeTensorMode():
        with torch.device("cuda"):
            network = face_detector.RetinaFace()
        landmarks = face_detector.FaceDetector(network)(torch.rand(2, 3, 70, 90, device="cuda"))
        assert landmarks.shape == (2, 5, 2) and landmarks.device.type == "cpu"
        with pytest.raises(RuntimeError, match="two different devices"):
            face_detector.FaceDetector(network)(torch.rand(2, 3, 70, 90))


def test_frames_with_and_without_a_face_stand_beside_each_other():
    network = random_network(face_detector.RetinaFace(), 3)
    frames = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        largest = torch.stack([network(frame[None].flip(1) * 255 - torch.tensor(face_detector._MEAN_BGR).view(3, 1, 1))[0].max() for frame in frames])
    found = face_detector.FaceDetector(network, threshold=float(largest.median()))(frames)
    assert found.isfinite().flatten(1).all(dim=1).tolist() == (largest >= largest.median()).tolist()


def test_the_reference_follows_networks_that_were_moved_without_it(backbone, portrait):
    """The host's memory manager knows the networks only: vectors come from the card, the reference was made before."""
    model = face.FaceReward(backbone, fixed(placed()[None]))
    model.set_reference(portrait, placed()[None])
    with FakeTensorMode() as mode:
        model._reference_MD = mode.from_tensor(model._reference_MD)
        likeness = model._likeness(torch.empty(3, 32, device="cuda"))
    assert likeness.shape == (3,) and likeness.device.type == "cuda"
