"""Node that samples with both experts and finds the switch from the sigma schedule."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import sampling


class SampleWan22(io.ComfyNode):
    """Samples a video: the high-noise expert down to the boundary, the low-noise expert from there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="RewardLabSampleWan22",
            has_intermediate_output=True,
            display_name="Sample Wan2.2 (two experts)",
            category="Reward Lab/sampling",
            description="Samples with both Wan2.2 experts. The step at which the low-noise expert takes over is found from the sigma schedule and the "
            "boundary, so steps, shift and scheduler can be changed freely.",
            search_aliases=["ksampler", "wan sampler", "moe ksampler", "two experts", "boundary"],
            inputs=[
                io.Model.Input("model_high", tooltip="The high-noise expert."),
                io.Model.Input("model_low", tooltip="The low-noise expert."),
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What the video should not show. Used where guidance is above 1."),
                io.Latent.Input("latent", tooltip="An empty Wan latent, for example from Empty HunyuanVideo 1.0 Latent."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the starting noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of both experts together."),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    tooltip="Timestep shift of the flow schedule. Larger spends more steps at high noise. Official: T2V 12, I2V 5.",
                ),
                io.Float.Input(
                    "guidance_high",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale (CFG) of the high-noise expert. 1 turns guidance off and halves the time.",
                ),
                io.Float.Input(
                    "guidance_low",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale (CFG) of the low-noise expert. 1 turns guidance off and halves the time.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.875,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Sigma below which the low-noise expert takes over. Official: T2V 0.875, I2V and InP 0.9.",
                ),
                io.Combo.Input("sampler_name", options=sampling.sampler_names(), default="euler", tooltip="The host's sampling algorithm."),
                io.Combo.Input(
                    "scheduler", options=sampling.scheduler_names(), default="simple", tooltip="How the host spreads the steps over the noise levels."
                ),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="latent", tooltip="The sampled latent, for VAE Decode."),
                io.String.Output("report", display_name="report", tooltip="At which step and sigma the experts switched."),
            ],
        )

    @classmethod
    def execute(
        cls, model_high, model_low, positive, negative, latent, seed, steps, shift, guidance_high, guidance_low, boundary, sampler_name, scheduler
    ) -> io.NodeOutput:
        """Sample. Raises ValueError when the experts are swapped or the latent does not fit them."""
        settings = sampling.SampleSettings(
            seed=seed,
            steps=steps,
            shift=shift,
            guidance_high=guidance_high,
            guidance_low=guidance_low,
            boundary=boundary,
            sampler_name=sampler_name,
            scheduler=scheduler,
        )
        samples, report = sampling.sample_two_experts(model_high, model_low, positive, negative, latent, settings)
        return io.NodeOutput(samples, report, ui={"text": [report]})
