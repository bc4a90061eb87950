"""The node classes of the pack, one file per family, and the extension that hands them to the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host import paths, routes, training
from .loras import InspectLoRA, LoadLoRAs, MergeLoRA
from .models import WanModels
from .pavrm import TrainPAVRM, VideoDataset
from .prompts import Prompts
from .rewards import MixRewards, RewardModelNode, ScoreLatent, ScoreVideo
from .sample import SampleWan22
from .testlab import TestLabCell, TestLabGrid
from .train import MemoryPlan, RunResult, TrainLoRA

NODE_CLASSES: tuple[type[io.ComfyNode], ...] = (
    WanModels,
    LoadLoRAs,
    InspectLoRA,
    MergeLoRA,
    SampleWan22,
    RewardModelNode,
    MixRewards,
    ScoreVideo,
    ScoreLatent,
    Prompts,
    MemoryPlan,
    TrainLoRA,
    VideoDataset,
    TrainPAVRM,
    RunResult,
    TestLabCell,
    TestLabGrid,
)


class RewardLabExtension(ComfyExtension):
    """What the host asks for nodes; registers the pack's model folder and routes once."""

    async def on_load(self) -> None:
        """Register the `reward_models` folder and the `/reward_lab/` routes, and follow runs that outlived the last server."""
        paths.register_model_folders()
        routes.register()
        training.follow_living_runs()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return every node class of the pack."""
        return list(NODE_CLASSES)


def extension() -> RewardLabExtension:
    """Return a new extension object."""
    return RewardLabExtension()
