"""Node that loads both Wan2.2 experts with their text encoder and VAE."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import paths, wan_files
from .types import WanFiles


class WanModels(io.ComfyNode):
    """Loads two experts, the text encoder and the VAE, and remembers their files for training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabWanModels",
            display_name="Load Wan2.2 Models",
            category="Reward Lab/models",
            description="Loads both Wan2.2 experts (high noise and low noise), or the one 5B model, the umT5 text encoder and the Wan VAE. "
            "A file in the wrong expert's slot is detected from its metadata or its name. GGUF files can be trained; sampling them needs ComfyUI-GGUF.",
            search_aliases=["wan loader", "wan2.2", "unet loader", "two experts"],
            inputs=[
                io.Combo.Input(
                    "high_noise_model",
                    options=paths.expert_files(),
                    tooltip="The high-noise expert. It does the first part of sampling, from pure noise down to the boundary. "
                    "A model without experts (5B) stands here alone.",
                ),
                io.Combo.Input(
                    "low_noise_model",
                    options=[*paths.expert_files(), wan_files.NO_EXPERT],
                    tooltip="The low-noise expert. It does the rest of sampling, from the boundary down to the finished video. 'none' for the 5B model.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=paths.model_files("text_encoders"),
                    tooltip="The umT5 text encoder, for example umt5_xxl_fp8_e4m3fn_scaled.safetensors.",
                ),
                io.Combo.Input(
                    "vae", options=paths.model_files("vae"), tooltip="The Wan2.1 VAE for the 14B experts; the Wan2.2 VAE belongs to the 5B model."
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(wan_files.WEIGHT_DTYPES),
                    default="default",
                    tooltip="Precision of the experts' weights in memory. 'default' keeps the file's own; fp8 halves the memory and costs some quality.",
                ),
            ],
            outputs=[
                io.Model.Output("model_high", display_name="model_high", tooltip="The high-noise expert."),
                io.Model.Output("model_low", display_name="model_low", tooltip="The low-noise expert; the same model again where there is one."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae_out", display_name="vae", tooltip="The VAE, for VAE Decode."),
                WanFiles.Output("wan_files", display_name="wan_files", tooltip="The four files, for Train Reward LoRA."),
            ],
        )

    @classmethod
    def execute(cls, high_noise_model: str, low_noise_model: str, text_encoder: str, vae: str, weight_dtype: str) -> io.NodeOutput:
        """Load the four files. Raises ValueError for a missing, truncated or swapped file, or one of another model."""
        files = wan_files.resolve(high_noise_model, low_noise_model, text_encoder, vae, weight_dtype)
        loaded = wan_files.load(files)
        return io.NodeOutput(loaded.model_high, loaded.model_low, loaded.clip, loaded.vae, files)
