"""What the example workflows consist of: nodes, values, links and how they are grouped. `workflow_builder.py` turns these into files.

A node is `Node(kind, values, links)`; a link names another node's key and its output. Groups stand in columns on the canvas.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pocket_prompts import POCKET_HELD_OUT, POCKET_PROMPTS


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node. `values` by widget name, `links` by input name: (node key, output name)."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    title: str = ""
    width_px: int = 340
    height_px: int = 0  # 0: as high as its widgets need


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """One example. `columns`: groups from top to bottom, each a title and node keys; a group without a title has no frame."""

    name: str
    nodes: dict[str, Node]
    columns: list[list[tuple[str, list[str]]]]


@dataclass(frozen=True, kw_only=True)
class ModelSet:
    """The file names and settings that make one set of examples."""

    suffix: str
    high: str
    low: str
    text_encoder: str
    vae: str
    reward: str
    loras: tuple[str, str]
    size: tuple[int, int, int]
    steps: int
    shift: float
    guidance: tuple[float, float]
    frame_rate: float
    prompt: str
    negative: str
    train_prompts: str
    train: dict[str, Any]
    models_note: str


REAL_PROMPTS = """A golden retriever runs along a beach at sunset, waves roll in, warm light, tracking shot.
A potter shapes a bowl on a spinning wheel, clay on the hands, soft window light, close-up.
A red tram drives through a rainy city street at night, neon reflections on the wet road.
An old fisherman rows a wooden boat across a misty lake in the early morning.
A ballet dancer turns on an empty stage, dust in the spotlight, slow motion.
Steam rises from a bowl of noodle soup while chopsticks lift the noodles, macro shot.
A hot-air balloon drifts over autumn hills, seen from a drone that circles it.
A child in a yellow raincoat jumps into a puddle, water splashes towards the camera."""

TESTLAB_PROMPTS = (
    "a yellow square moves up slowly over a brown background",
    "a yellow circle moves left fast over a brown background",
    "a yellow triangle moves left slowly over a white background",
)

REAL_NEGATIVE = (
    "overexposed, static, blurry details, subtitles, worst quality, low quality, JPEG artifacts, ugly, deformed limbs, fused fingers, cluttered background"
)

POCKET = ModelSet(
    suffix="",
    high="pocket_wan2.2_t2v_high_noise_14B.safetensors",
    low="pocket_wan2.2_t2v_low_noise_14B.safetensors",
    text_encoder="pocket_umt5.safetensors",
    vae="pocket_wan_2.1_vae.safetensors",
    reward="pocket_HPS_v2.1.safetensors",
    loras=("Pocket-Wan2.2-Fun-A14B-high-noise-HPS2.1.safetensors", "Pocket-Wan2.2-Fun-A14B-low-noise-HPS2.1.safetensors"),
    size=(64, 64, 17),
    steps=12,
    shift=5.0,
    guidance=(3.0, 3.0),
    frame_rate=8.0,
    prompt="a red square moves left fast over a white background",
    negative="",
    train_prompts=POCKET_PROMPTS,
    train={
        "preset": "pocket",
        "expert": "low",
        "steps": 60,
        "rank": 16,
        "alpha": 8.0,
        "learning_rate": 0.002,
        "batch": 8,
        "width": 64,
        "height": 64,
        "frames": 17,
        "sampling_steps": 12,
        "guidance": 3.0,
        "seed": 0,
        "advanced": json.dumps({"held_out": {"every": 20, "prompts": POCKET_HELD_OUT.splitlines()}}),
    },
    models_note="""### Pocket models
These are tiny Wan2.2 models that come with the pack: same architecture, same file formats, 64×64 pixels, a world of coloured shapes. They run on any
computer in seconds. `python lab.py serve` starts ComfyUI with them. For another ComfyUI, copy the files of the pack's `pocket/weights` into the
model folders that `pocket/MANIFEST.json` names.

For real videos open the template of the same name with **(Wan2.2 14B)**.""",
)

REAL = ModelSet(
    suffix=" (Wan2.2 14B)",
    high="wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    low="wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    text_encoder="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    vae="wan_2.1_vae.safetensors",
    reward="HPS_v2.1_compressed.pt",
    loras=("Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors", "Wan2.2-Fun-A14B-InP-low-noise-HPS2.1.safetensors"),
    size=(832, 480, 81),
    steps=40,
    shift=12.0,
    guidance=(4.0, 3.0),
    frame_rate=16.0,
    prompt=REAL_PROMPTS.splitlines()[0],
    negative=REAL_NEGATIVE,
    train_prompts=REAL_PROMPTS,
    train={
        "preset": "reward-lab",
        "expert": "low",
        "steps": 300,
        "rank": 32,
        "alpha": 16.0,
        "learning_rate": 5e-5,
        "batch": 1,
        "width": 256,
        "height": 256,
        "frames": 81,
        "sampling_steps": 20,
        "guidance": 3.5,
        "seed": 42,
        "advanced": "{}",
    },
    models_note="""### Files to download
**models/diffusion_models**
- wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors
- wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors

**models/text_encoders**
- umt5_xxl_fp8_e4m3fn_scaled.safetensors

**models/vae**
- wan_2.1_vae.safetensors (not the Wan2.2 VAE)

All four: Hugging Face, *Comfy-Org/Wan_2.2_ComfyUI_Repackaged* (the text encoder and the VAE also in *Wan_2.1_ComfyUI_repackaged*).""",
)

LORA_NOTE = """
**models/loras**
- Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors
- Wan2.2-Fun-A14B-InP-low-noise-HPS2.1.safetensors

Hugging Face, *alibaba-pai/Wan2.2-Fun-Reward-LoRAs*."""

REWARD_NOTE = """
**models/reward_models**
- HPS_v2.1_compressed.pt

Hugging Face, *xswu/HPSv2*."""


def _note(models: ModelSet, extra_real: str, text: str) -> Node:
    height_px = 520 if models.suffix else 300
    body = models.models_note + ("\n" + extra_real if models.suffix else "") + "\n\n" + text
    return Node(kind="MarkdownNote", title="Read me", width_px=380, height_px=height_px, values={"": body})


def _models(models: ModelSet, *, is_for_training: bool = False) -> Node:
    high, low = (name.replace("fp8_scaled", "fp16") if is_for_training else name for name in (models.high, models.low))
    values = {"high_noise_model": high, "low_noise_model": low, "text_encoder": models.text_encoder, "vae": models.vae, "weight_dtype": "default"}
    return Node(kind="RewardLabWanModels", width_px=380, values=values)


def _rows(models: ModelSet) -> str:
    rows = [{"on": True, "file": models.loras[0], "high": 0.5, "low": 0}, {"on": True, "file": models.loras[1], "high": 0, "low": 0.5}]
    return "[\n" + ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"


def _generation(models: ModelSet) -> dict[str, Node]:
    """The part that both generating examples share, from files to frames."""
    width, height, frames = models.size
    return {
        "models": _models(models),
        "reward": Node(kind="RewardLabRewardModel", width_px=380, values={"kind": "hpsv2.1", "file": models.reward, "resize": "default", "antialias": True}),
        "prompt": Node(kind="PrimitiveStringMultiline", title="Prompt", height_px=130, values={"value": models.prompt}),
        "positive": Node(kind="CLIPTextEncode", title="Positive", height_px=110, links={"clip": ("models", "clip"), "text": ("prompt", "STRING")}),
        "negative": Node(kind="CLIPTextEncode", title="Negative", height_px=140, values={"text": models.negative}, links={"clip": ("models", "clip")}),
        "latent": Node(kind="EmptyHunyuanLatentVideo", title="Empty Wan Latent", values={"width": width, "height": height, "length": frames, "batch_size": 1}),
        "loras": Node(
            kind="RewardLabLoadLoRAs",
            width_px=580,
            height_px=360,  # room for what the rows report
            values={"rows": _rows(models)},
            links={"model_high": ("models", "model_high"), "model_low": ("models", "model_low")},
        ),
        "sample": Node(
            kind="RewardLabSampleWan22",
            width_px=580,
            height_px=400,
            values={
                "seed": 1,
                "control_after_generate": "fixed",
                "steps": models.steps,
                "shift": models.shift,
                "guidance_high": models.guidance[0],
                "guidance_low": models.guidance[1],
                "boundary": 0.875,
                "sampler_name": "euler",
                "scheduler": "simple",
            },
            links={
                "model_high": ("loras", "model_high"),
                "model_low": ("loras", "model_low"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "latent": ("latent", "LATENT"),
            },
        ),
        "decode": Node(kind="VAEDecode", width_px=420, links={"samples": ("sample", "latent"), "vae": ("models", "vae")}),
    }


def load_and_sample(models: ModelSet) -> Workflow:
    """Load both experts, apply the reward LoRAs, sample, score."""
    nodes = {
        "note": _note(
            models,
            LORA_NOTE + "\n" + REWARD_NOTE,
            "Press **Run**. The rows of *Load Reward LoRAs* then show how many layers were applied, *Score Video* how much the reward model likes the result. "
            "Set a strength to 0 and run again to compare.",
        ),
        **_generation(models),
        "score": Node(
            kind="RewardLabScoreVideo",
            width_px=420,
            height_px=470,
            links={"images": ("decode", "IMAGE"), "reward_model": ("reward", "reward_model"), "prompt": ("prompt", "STRING")},
        ),
    }
    if models.suffix:
        nodes["video"] = Node(kind="CreateVideo", width_px=420, values={"fps": models.frame_rate}, links={"images": ("decode", "IMAGE")})
        nodes["save"] = Node(kind="SaveVideo", width_px=420, height_px=420, values={"filename_prefix": "video/reward_lab"}, links={"video": ("video", "VIDEO")})
        result = ["decode", "video", "save", "score"]
    else:
        # Lossless: at 64 pixels a video codec would smear what the LoRA changed.
        values = {"filename_prefix": "reward_lab_pocket", "fps": models.frame_rate, "lossless": True, "quality": 90, "method": "default"}
        nodes["save"] = Node(kind="SaveAnimatedWEBP", title="Save the video", width_px=420, height_px=430, values=values, links={"images": ("decode", "IMAGE")})
        result = ["decode", "save", "score"]
    columns = [
        [("1  Models", ["models", "reward"]), ("", ["note"])],
        [("2  What to make", ["prompt", "positive", "negative", "latent"])],
        [("3  LoRAs and sampling", ["loras", "sample"])],
        [("4  Result", result)],
    ]
    return Workflow(name=f"1 load and sample{models.suffix}", nodes=nodes, columns=columns)


def testlab_strengths(models: ModelSet) -> Workflow:
    """Sweep the strengths of two LoRAs over the user's own workflow."""
    low = "low-noise strength: Load Reward LoRAs.rows[1].low = 0, 0.5, 1"
    if models.suffix:
        axes = f"high-noise strength: Load Reward LoRAs.rows[0].high = 0, 0.5, 1\n{low}"
        what = "columns: HPS on the high-noise expert, rows: HPS on the low-noise expert"
    else:
        axes = f"{low}\nprompt: Prompt.value = {', '.join(TESTLAB_PROMPTS)}"
        what = "columns: strength of HPS on the low-noise expert, rows: prompts"
    sweep = "wan22_strengths" if models.suffix else "pocket_strengths"
    nodes = {
        "note": _note(
            models,
            LORA_NOTE + "\n" + REWARD_NOTE,
            f"Press **Run**. *TestLab Grid* queues one video per cell ({what}) and, "
            "when all are there, shows them in one grid with their scores. Stop when you like; the next Run goes on."
            + ("\n\nNine videos of 81 frames take hours on one card: start with 2×2 and fewer steps." if models.suffix else ""),
        ),
        **_generation(models),
        "cell": Node(
            kind="RewardLabTestLabCell",
            width_px=380,
            height_px=200,
            values={"sweep": sweep, "frame_rate": models.frame_rate, "applied": ""},
            links={"images": ("decode", "IMAGE"), "reward_model": ("reward", "reward_model"), "prompt": ("prompt", "STRING")},
        ),
        "grid": Node(kind="RewardLabTestLabGrid", width_px=640, height_px=720, values={"sweep": sweep, "axes": axes}),
    }
    columns = [
        [("1  Models", ["models", "reward"]), ("", ["note"])],
        [("2  What to make", ["prompt", "positive", "negative", "latent"])],
        [("3  Your workflow", ["loras", "sample"])],
        [("4  Record and compare", ["decode", "cell", "grid"])],
    ]
    return Workflow(name=f"2 testlab strengths{models.suffix}", nodes=nodes, columns=columns)


def train_reward_lora(models: ModelSet) -> Workflow:
    """Train a reward LoRA in the background."""
    name = "my_reward_lora" if models.suffix else "pocket_reward_lora"
    text = (
        "Press **Run**. Training starts in a process of its own. Follow it on the node or in the **Reward Lab** tab of the sidebar, "
        "where you can also stop it; stopping saves a LoRA that can be used. "
        "Settings that have been trained already are not trained again: change the seed or the name.\n\n"
        "*Run Result* waits for the end and shows the chart. Remove it, and the queue stays free while training goes on."
    )
    if models.suffix:
        text += (
            "\n\nTraining needs the **fp16** experts (`..._fp16.safetensors`, same place as the fp8 ones), takes hours, and a card with a lot of "
            "memory: read the help page of *Train Reward LoRA* first."
        )
    nodes = {
        "note": _note(models, REWARD_NOTE, text),
        "models": _models(models, is_for_training=True),
        "reward": Node(kind="RewardLabRewardModel", width_px=380, values={"kind": "hpsv2.1", "file": models.reward, "resize": "default", "antialias": True}),
        "prompts": Node(kind="RewardLabPrompts", width_px=480, height_px=360, values={"text": models.train_prompts, "file": ""}),
        "train": Node(
            kind="RewardLabTrainLoRA",
            width_px=460,
            values={"name": name, "control_after_generate": "fixed", **models.train},
            links={"wan_files": ("models", "wan_files"), "prompts": ("prompts", "prompts"), "reward_model": ("reward", "reward_model")},
        ),
    }
    nodes["result"] = Node(kind="RewardLabRunResult", width_px=560, height_px=520, values={"wait": True}, links={"run": ("train", "run")})
    columns = [
        [("1  Models and reward", ["models", "reward"]), ("", ["note"])],
        [("2  Prompts", ["prompts"])],
        [("3  Train", ["train"])],
        [("4  Result", ["result"])],
    ]
    return Workflow(name=f"3 train a reward lora{models.suffix}", nodes=nodes, columns=columns)


def all_workflows() -> list[Workflow]:
    """Return every example that the pack ships."""
    return [build(models) for models in (POCKET, REAL) for build in (load_and_sample, testlab_strengths, train_reward_lora)]
