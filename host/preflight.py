"""Checks everything that can be checked about a run before work starts: files, experts, widths, rewards, packages, memory, disk. Reads headers only."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from ..lora_train import needs, optimisers
from ..lora_train.config import TrainConfig
from ..lora_train.input_config import LATENTS, MASK_CHANNELS, PATCH, RewardSource
from ..lora_train.pavrm_config import PavrmConfig
from ..lora_train.plan import check_disk, check_memory
from ..lora_train.safetensors_file import Header, read_header
from ..lora_train.weight_formats import quantised_weights
from ..reward_models.spec import ALIASES, RewardModelSpec, check_kind
from .experts import guess_expert

_TEXT_KEY = "text_embedding.0.weight"
ROLES = {"high": "high-noise expert", "low": "low-noise expert", "text_encoder": "text encoder", "vae": "VAE"}


def check(config: TrainConfig, folder: Path) -> None:
    """Check a run's files.

    Args:
        folder: where checkpoints will be written.

    Raises:
        ValueError: a missing or truncated file; an expert in the wrong slot, or quantised in a way that cannot be trained through; experts, text
            encoder or VAE that do not fit together; a reward of an unknown kind; an optimiser that is not installed; an output folder that cannot be
            written to; not enough disk or memory.
    """
    roles = [*needs.experts(config), "text_encoder", *(["vae"] if needs.decodes(config) else [])]
    headers = {name: _header(getattr(config.models, name), ROLES[name]) for name in roles}
    optimisers.class_of(config.optimiser.kind)
    _check_reward(config)
    _check_held_out(config)
    _check_latents(config, headers)
    _check_images(config, headers)
    for slot in needs.experts(config):
        _check_slot(slot, getattr(config.models, slot), headers[slot])
        quantised_weights(getattr(config.models, slot), headers[slot], ROLES[slot])
    _check_widths(config, headers)
    if needs.real_latents(config) and not Path(config.real.path).exists():
        raise ValueError(f"the real latents {config.real.path} do not exist; check real.path")
    check_output(config.output_folder)
    check_memory(config)
    check_disk(config, folder)


def check_pavrm(config: PavrmConfig) -> None:
    """Check what a PAVRM's run needs besides its data and its trunk, whose readers check these.

    Raises:
        ValueError: an optimiser that is not installed; an output folder that cannot be written to.
    """
    optimisers.class_of(config.optimiser.kind)
    check_output(config.output_folder)


def check_output(output_folder: str) -> None:
    """Make the folder where finished files are also written, and try it.

    Raises:
        ValueError: it cannot be made or written to.
    """
    if not output_folder:
        return
    folder = Path(output_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"output_folder {folder} cannot be written to ({error.strerror or error}); choose another one, or leave it empty: finished files lie in the run's "
            "folder in any case"
        ) from error


def why_no_images(in_channels: int, latent_channels: int, role: str) -> str:
    """Why a model cannot be given start images; empty where it can.

    It takes them as input channels (noisy latent, mask, first frame's latent), or, as the 5B model does, in place of the first noisy frame.
    """
    wanted = 2 * latent_channels + MASK_CHANNELS
    is_5b = in_channels == latent_channels == LATENTS["wan2.2"].channels
    if in_channels == wanted or is_5b:
        return ""
    return (
        f"prompts have start images, but the {role} reads {in_channels} channels, not {wanted}: use Wan2.2 I2V, Fun-InP or 5B models, "
        "or take the images out of the prompt set"
    )


def _check_images(config: TrainConfig, headers: dict[str, Header | None]) -> None:
    images = needs.start_images(config)
    for expert in needs.experts(config) if images else ():
        read, made = _input_channels(headers[expert]), latent_channels(headers[expert])
        refusal = why_no_images(read, made, ROLES[expert]) if read and made else ""
        if refusal:
            raise ValueError(refusal)
        has_channels = read and made and read > made
        if has_channels and config.method == "prfl" and config.prfl.real_weight > 0 and not config.real.path:
            raise ValueError(
                "prompts have start images, but the clips of real.replay would be learned without theirs: give real.path in HY-Video-PRFL's layout, "
                "or set prfl.real_weight 0"
            )
    missing = [path for path in images if not Path(path).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} start images do not exist, the first is {missing[0]}; check the paths in the prompt set")


def _check_latents(config: TrainConfig, headers: dict[str, Header | None]) -> None:
    """Experts, VAE and `video.vae` must speak of the same latents."""
    wanted = config.video.latent_channels
    found = {ROLES[slot]: channels for slot in needs.experts(config) if (channels := latent_channels(headers[slot]))}
    vae = next((shape[1] for key, shape in headers["vae"].shapes.items() if key.endswith("decoder.conv1.weight")), None) if headers.get("vae") else None
    found |= {} if vae is None else {ROLES["vae"]: vae}
    for role, channels in found.items():
        if channels != wanted:
            other = next((name for name, layout in LATENTS.items() if layout.channels == channels), None)
            remedy = f'set video.vae to "{other}" if all files belong to that model' if other else "use the files of one Wan model"
            raise ValueError(f"the {role} has latents of {channels} channels, but video.vae is {config.video.vae!r}, which has {wanted}: {remedy}")
    if config.models.has_experts and wanted == LATENTS["wan2.2"].channels:
        raise ValueError("the Wan2.2 5B model has no experts, one file makes all steps: give it as models.high, and leave models.low empty")


def latent_channels(header: Header | None) -> int | None:
    """Latent channels of a transformer; None where its header does not tell."""
    return next((shape[0] // PATCH**2 for key, shape in (header.shapes if header else {}).items() if key.endswith("head.head.weight")), None)


def _input_channels(header: Header | None) -> int | None:
    return next((shape[1] for key, shape in (header.shapes if header else {}).items() if key.endswith("patch_embedding.weight")), None)


def _check_reward(config: TrainConfig) -> None:
    is_latent = needs.scores_latents(config)
    if is_latent != (config.reward.kind == "pavrm"):
        has = "scores latents" if config.reward.kind == "pavrm" else "scores frames"
        remedy = "give a PAVRM" if is_latent else "use an image or video reward, a mix of them, or the method prfl or one_pass"
        raise ValueError(f"the reward is {config.reward.kind}, which {has}; the method {config.method} scores {'latents' if is_latent else 'frames'}: {remedy}")
    judge = config.held_out.judge
    if judge is not None and judge.kind == "pavrm":
        raise ValueError("held_out.judge is a pavrm, which scores latents, but a judge looks at finished videos: give an image or video reward")
    for setting, source in (("reward", config.reward), ("one_pass.pavrm", config.one_pass.pavrm), ("held_out.judge", judge)):
        if source is None:
            continue
        spec = RewardModelSpec.from_dict(asdict(source))
        try:
            check_kind(spec)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        for file in spec.files():
            # A PAVRM's trunk may be a folder; its reader checks that.
            if not Path(file).is_dir():
                _header(file, "reward model")


def _check_held_out(config: TrainConfig) -> None:
    """What is held out must not be trained on, or its curve rises with what is learned by heart."""
    if not config.held_out.every:
        return
    trained = {(prompt.text.strip(), prompt.image) for prompt in config.prompts}
    both = [prompt.text for prompt in config.held_out.prompts if (prompt.text.strip(), prompt.image) in trained]
    if both:
        raise ValueError(
            f"{len(both)} of {len(config.held_out.prompts)} held-out prompts are trained on too, the first is {both[0][:60]!r}: take them out of "
            "held_out.prompts or out of prompts"
        )
    if config.held_out.judge is None:
        return
    judge, reward = (RewardModelSpec.from_dict(asdict(source)) for source in (config.held_out.judge, config.reward))
    if _identity(judge) in [_identity(seen) for seen in (reward, *(row.reward for row in reward.rows()))]:
        raise ValueError(
            f"held_out.judge is {judge.kind} with the file and options that training raises, so it would tell nothing new: give another reward, or leave it out"
        )


def _identity(spec: RewardModelSpec) -> tuple:
    return ALIASES.get(spec.kind, spec.kind), spec.path, {name: value for name, value in spec.options.items() if value is not None}


def _header(path: str, role: str) -> Header | None:
    if path.endswith((".safetensors", ".gguf")):
        return read_header(path, role)
    if not Path(path).exists():
        raise ValueError(f"the {role} {path} does not exist; check the path or download the file")
    return None


def _check_slot(slot: str, path: str, header: Header | None) -> None:
    if header is None:
        raise ValueError(f"the {ROLES[slot]} {path} is neither a .safetensors nor a .gguf file; training needs one of these")
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
    if pavrm:
        _check_pavrm(config, pavrm, width)


def _check_pavrm(config: TrainConfig, pavrm: RewardSource, text_width: int) -> None:
    """A PAVRM must read the text and the latents of the experts. One in LoRA form has no trunk; its generator is looked at in its place."""
    path = Path(pavrm.options.get("generator") or pavrm.path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    for header in (read_header(file, "PAVRM") for file in files):
        found = _text_width(header)
        if found not in (None, text_width):
            raise ValueError(f"the PAVRM reads text of width {found}, but the experts read {text_width}; it belongs to another model")
        channels, own = _input_channels(header), config.video.latent_channels
        if channels is not None and channels not in (own, 2 * own + MASK_CHANNELS):
            raise ValueError(f"the PAVRM reads {channels} channels, but latents of {config.video.vae} have {own}; it belongs to another model")
        if channels == 2 * own + MASK_CHANNELS:
            _check_pavrm_images(config, header, channels)


def _check_pavrm_images(config: TrainConfig, header: Header, channels: int) -> None:
    """A PAVRM of an image-to-video model scores nothing without an image."""
    remedy = "or use a PAVRM of a text-to-video model"
    if any("img_emb." in key for key in header.shapes):
        raise ValueError(f"the PAVRM reads CLIP vision tokens of start images (Wan2.1 I2V), which training does not make: use that of a Wan2.2 model, {remedy}")
    if config.method == "one_pass" or config.starts_from_clips or config.real.keep < 1:
        raise ValueError(f"the PAVRM reads start images ({channels} channels), but clips and one_pass have none: use method prfl with start images, {remedy}")
    asked = (*config.prompts, *(config.held_out.prompts if config.held_out.every else ()))
    without = [prompt.text for prompt in asked if not prompt.image]
    if without:
        raise ValueError(
            f"the PAVRM reads start images ({channels} channels), but {len(without)} of {len(asked)} prompts have none, the first is {without[0][:40]!r}: "
            f"give each one, {remedy}"
        )


def _text_width(header: Header) -> int | None:
    return next((shape[-1] for key, shape in header.shapes.items() if key.endswith(_TEXT_KEY)), None)
