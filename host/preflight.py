"""Checks everything that can be checked about a run before work starts: files, experts, widths, disk. Reads headers only; no torch, no ComfyUI."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..lora_train import needs
from ..lora_train.config import TrainConfig
from ..lora_train.plan import check_disk
from ..lora_train.safetensors_file import Header, read_header
from ..reward_models.spec import RewardModelSpec
from .experts import guess_expert

# 16 of the noisy latent, 4 of the mask, 16 of the first frame's latent.
_IMAGE_CHANNELS = 36
_TEXT_KEY = "text_embedding.0.weight"
ROLES = {"high": "high-noise expert", "low": "low-noise expert", "text_encoder": "text encoder", "vae": "VAE"}


def check(config: TrainConfig, folder: Path) -> None:
    """Check a run's files.

    Args:
        folder: where checkpoints will be written.

    Raises:
        ValueError: a missing or truncated file; an expert in the wrong slot; experts or text encoder of widths that do not fit; not
            enough disk.
    """
    roles = [*needs.experts(config), "text_encoder", *(["vae"] if needs.decodes(config) else [])]
    headers = {name: _header(getattr(config.models, name), ROLES[name]) for name in roles}
    _check_reward(config)
    _check_images(config, headers)
    for slot in needs.experts(config):
        _check_slot(slot, getattr(config.models, slot), headers[slot])
    _check_widths(config, headers)
    if needs.real_latents(config) and not Path(config.real.path).exists():
        raise ValueError(f"the real latents {config.real.path} do not exist; check real.path")
    check_disk(config, folder)


def _check_images(config: TrainConfig, headers: dict[str, Header | None]) -> None:
    images = needs.start_images(config)
    for expert in needs.experts(config) if images else ():
        header = headers[expert]
        channels = next((shape[1] for key, shape in header.shapes.items() if key.endswith("patch_embedding.weight")), None) if header else None
        if channels not in (None, _IMAGE_CHANNELS):
            raise ValueError(
                f"prompts have start images, but the {expert}-noise expert reads {channels} channels, not {_IMAGE_CHANNELS}: use Wan2.2 I2V or Fun-InP, "
                "or take the images out of the prompt set"
            )
    missing = [path for path in images if not Path(path).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} start images do not exist, the first is {missing[0]}; check the paths in the prompt set")


def _check_reward(config: TrainConfig) -> None:
    is_latent = needs.scores_latents(config)
    if is_latent != (config.reward.kind == "pavrm"):
        has = "scores latents" if config.reward.kind == "pavrm" else "scores frames"
        remedy = "give a PAVRM" if is_latent else "use an image or video reward, a mix of them, or the method prfl or one_pass"
        raise ValueError(f"the reward is {config.reward.kind}, which {has}; the method {config.method} scores {'latents' if is_latent else 'frames'}: {remedy}")
    for source in filter(None, (config.reward, config.one_pass.pavrm, config.held_out.judge)):
        for file in RewardModelSpec.from_dict(asdict(source)).files():
            # A PAVRM's trunk may be a folder; its reader checks that.
            if not Path(file).is_dir():
                _header(file, "reward model")


def _header(path: str, role: str) -> Header | None:
    if path.endswith(".safetensors"):
        return read_header(path, role)
    if not Path(path).exists():
        raise ValueError(f"the {role} {path} does not exist; check the path or download the file")
    return None


def _check_slot(slot: str, path: str, header: Header | None) -> None:
    if header is None:
        raise ValueError(f"the {ROLES[slot]} {path} is not a .safetensors file; training needs that format")
    guess = guess_expert(path, header.metadata)
    if guess.expert not in (None, slot):
        raise ValueError(
            f"{Path(path).name} is given as the {slot}-noise expert, but its {guess.source} says that it is the {guess.expert}-noise one; swap the two files"
        )


def _check_widths(config: TrainConfig, headers: dict[str, Header | None]) -> None:
    widths = {slot: _text_width(headers[slot]) for slot in needs.experts(config)}
    for slot, width in widths.items():
        if width is None:
            raise ValueError(f"{Path(getattr(config.models, slot)).name} has no {_TEXT_KEY}: it is not a Wan transformer; pick a Wan2.2 expert")
    encoder = headers["text_encoder"]
    encoder_width = encoder.shapes.get("shared.weight", (0, 0))[-1] if encoder else None
    if len(set(widths.values())) > 1:
        raise ValueError(f"the high-noise expert reads text of width {widths['high']}, the low-noise one {widths['low']}; they belong to different models")
    width = next(iter(widths.values()))
    if encoder_width is not None and encoder_width != width:
        raise ValueError(f"the text encoder is {encoder_width} wide, but the experts read {width}; pick the text encoder of these models")
    pavrm = needs.pavrm(config)
    if pavrm and pavrm.path.endswith(".safetensors"):
        pavrm_width = _text_width(read_header(pavrm.path, "PAVRM"))
        if pavrm_width not in (None, width):
            raise ValueError(f"the PAVRM reads text of width {pavrm_width}, but the experts read {width}; it belongs to another model")


def _text_width(header: Header) -> int | None:
    return next((shape[-1] for key, shape in header.shapes.items() if key.endswith(_TEXT_KEY)), None)
