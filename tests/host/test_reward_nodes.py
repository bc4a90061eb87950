"""Mix Rewards, Score Latent (PAVRM), folders in Score Video, downloads: the nodes' own entries in the real host's process."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.model_management", reason="needs ComfyUI on the path")

import comfy.latent_formats  # noqa: E402
import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reward_lab.host import downloads, latent_scoring, paths, pavrm, reward_files, score_command, score_files, scoring  # noqa: E402
from reward_lab.host.training_mode import training_mode  # noqa: E402
from reward_lab.nodes.rewards import MixRewards, RewardModelNode, ScoreLatent, ScoreVideo  # noqa: E402
from reward_lab.reward_models import published  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture
def base(shared_fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of a host with the tiny HPS and the tiny PAVRM among its reward models, and three pictures in the input folder."""
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(shared_fixtures / "scorers" / "hps" / "hps_tiny.safetensors", models / "tiny.safetensors")
    shutil.copy(shared_fixtures / "scorers" / "hps" / "config.json", models / "tiny.json")
    shutil.copytree(shared_fixtures / "pavrm" / "checkpoints", models / "pavrm")
    for file in (shared_fixtures / "pavrm" / "mlp").iterdir():
        shutil.copy(file, models / file.name)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, paths.REWARD_MODEL_FOLDER, ([str(models)], set(paths.REWARD_MODEL_EXTENSIONS)))
    for name in ("temp", "output", "input"):
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    folder_paths.filename_list_cache.pop(paths.REWARD_MODEL_FOLDER, None)
    clips = tmp_path / "input" / "clips"
    clips.mkdir(parents=True)
    for index in range(3):
        pixels = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(clips / f"clip{index}.png")
    return tmp_path


@pytest.fixture
def hps(base):
    return RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "default", True).args[0]


def test_folder_is_scored_with_a_prompt_each_and_goes_on_where_it_stopped(base, hps, monkeypatch):
    (base / "input" / "prompts.csv").write_text('file,prompt\nclip2.png,a dog\nclip0,a cat\nclip1.png,"a fox, red"\n')
    calls, original = [], score_files._score_clip

    def counted(model, clip, prompt, *rest):
        calls.append((clip.name, prompt))
        if len(calls) == 3:
            raise ValueError("the power went out")
        return original(model, clip, prompt, *rest)

    monkeypatch.setattr(score_files, "_score_clip", counted)
    with pytest.raises(ValueError, match="power went out"):
        ScoreVideo.execute(hps, "", path="clips", prompts_file="prompts.csv")
    output = ScoreVideo.execute(hps, "", path="clips", prompts_file="prompts.csv")
    assert calls == [("clip0.png", "a cat"), ("clip1.png", "a fox, red"), ("clip2.png", "a dog"), ("clip2.png", "a dog")]
    document = json.loads(output.args[2])
    files = sorted((base / "input" / "clips").iterdir())
    pictures = [torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0)[None, None] / 255 for path in files]
    expected = [float(hps.load().score(p, [t]).per_video) for p, t in zip(pictures, ("a cat", "a fox, red", "a dog"), strict=True)]
    assert [video["reward"] for video in document["videos"]] == pytest.approx(expected, abs=1e-5)
    assert output.args[0] == pytest.approx(sum(expected) / 3, abs=1e-6) and "3 videos" in output.ui["text"][0]
    assert Path(output.args[3]).read_text().count("clip1.png") == 2


def test_what_is_wrong_with_videos_of_a_folder_is_told_by_name(base, hps):
    (base / "input" / "prompts.json").write_text(json.dumps(["a cat", "word " * 80, "word " * 80]))
    for _ in range(2):
        text = ScoreVideo.execute(hps, "", path="clips", prompts_file="prompts.json").ui["text"][0]
        assert "\nclip1.png, clip2.png: Prompt needs 80 tokens" in text and text.count("Prompt needs") == 1
    (base / "input" / "clips" / "clip00.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 4 videos cannot be scored; .*\nclip00.png: .* cannot be read as a picture"):
        ScoreVideo.execute(hps, "a cat", path="clips")
    (base / "input" / "clips" / "clip00.png").unlink()
    assert "3 videos" in ScoreVideo.execute(hps, "a cat", path="clips").ui["text"][0]


def test_prompts_that_do_not_fit_the_videos_are_named(base, hps):
    (base / "input" / "two.txt").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="holds 2 prompts, but there are 3 videos"):
        ScoreVideo.execute(hps, "", path="clips", prompts_file="two.txt")
    (base / "input" / "names.json").write_text(json.dumps({"clip0.png": "a", "clip1.png": "b"}))
    with pytest.raises(ValueError, match="none for clip2.png"):
        ScoreVideo.execute(hps, "", path="clips", prompts_file="names.json")
    with pytest.raises(ValueError, match="leaves the input folder"):
        ScoreVideo.execute(hps, "a", path="../models")


def test_mix_sums_shows_parts_and_measures_its_baseline(base, hps):
    steady = RewardModelNode.execute("flicker", "(none)", "default", True).args[0]
    (base / "input" / "prompts.txt").write_text("a cat\na dog\na fox\n")
    rows = {"reward_1": hps, "weight_1": 2.0, "reward_2": steady, "weight_2": 0.5, "centre_2": -1.0, "scale_2": 4.0}
    spec, report = MixRewards.execute(**rows).args
    assert report == "2 x (hpsv2.1 - 0) / 1\n+ 0.5 x (flicker - -1) / 4"
    images = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    output = ScoreVideo.execute(spec, "a cat", images)
    document = json.loads(output.args[2])
    single = scoring.score_images(images, hps, "a cat").reward
    jumps = scoring.score_images(images, steady, "").reward
    assert output.args[0] == pytest.approx(2 * single + 0.5 * (jumps + 1) / 4, abs=1e-4)
    assert set(document["parts"]) == {"hpsv2.1", "hpsv2.1.hps_letterbox", "flicker", "flicker.flicker", "flicker.temporal_consistency"}
    filled = MixRewards.execute(measure_baseline=True, baseline_folder="clips", baseline_prompts="prompts.txt", reward_1=hps).args[0]
    (row,) = filled.options["rows"]
    shown = MixRewards.execute(measure_baseline=True, baseline_folder="clips", baseline_prompts="prompts.txt", reward_3=hps, weight_3=2.0).ui
    assert shown["reward_lab_baseline"] == [{"row": 3, "centre": row["centre"], "scale": row["scale"]}] and f"{row['centre']:.6g}" in shown["text"][0]
    assert MixRewards.execute(reward_1=hps).ui["reward_lab_baseline"] == []
    again = json.loads(ScoreVideo.execute(filled, "", path="clips", prompts_file="prompts.txt").args[2])
    rewards = torch.tensor([video["reward"] for video in again["videos"]])
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-4) and float(rewards.std()) == pytest.approx(1, abs=1e-3) and row["scale"] > 0


def test_nodes_run_again_when_the_files_they_read_change(base):
    """Else a video that was put into the folder would not be scored until some widget changes."""
    clips, prompts = base / "input" / "clips", base / "input" / "prompts.txt"
    prompts.write_text("a cat\na dog\na fox\n")

    def stamps() -> tuple[str, str, str]:
        measured = {"measure_baseline": True, "baseline_folder": "clips", "baseline_prompts": "prompts.txt"}
        return (
            ScoreVideo.fingerprint_inputs(reward_model=None, prompt="", path="clips", prompts_file="prompts.txt"),
            MixRewards.fingerprint_inputs(reward_1=None, **measured),
            MixRewards.fingerprint_inputs(**{**measured, "measure_baseline": False}),
        )

    first = stamps()
    assert stamps() == first and first[2] == "" and ScoreVideo.fingerprint_inputs(images=None) == ""
    assert ScoreVideo.fingerprint_inputs(path=None, prompts_file=None) == "", "what another node gives is not known yet"
    prompts.write_text("a cat\na dog\na wolf\n")
    second = stamps()
    shutil.copy(clips / "clip0.png", clips / "clip9.png")
    third = stamps()
    assert len({first[0], second[0], third[0]}) == len({first[1], second[1], third[1]}) == 3 and third[2] == ""
    shutil.rmtree(clips)
    assert stamps()[0] not in (first[0], second[0], third[0])


def test_scores_tell_what_they_were_made_with(base, hps):
    """Also what is not chosen; in the JSON under the names of `lab.py score`, and in the table."""
    frames, squashed = torch.rand(2, 16, 16, 3), RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "squash", False).args[0]
    for spec, found in ((hps, {"resize": "letterbox", "antialias": True}), (squashed, {"resize": "squash", "antialias": False})):
        for where in ({"images": frames}, {"path": "clips"}):
            output = ScoreVideo.execute(spec, "a cat", **where)
            document = json.loads(output.args[2])
            for video in document.get("videos", [document]):
                assert (video["reward_model"], video["weights"], video["options"]) == ("hpsv2.1", hps.path, found)
            with Path(output.args[3]).open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            assert rows and all(row["reward_model"] == "hpsv2.1" and json.loads(row["options"]) == found for row in rows)
    mixes = [MixRewards.execute(reward_1=hps, weight_1=weight).args[0] for weight in (1.0, 2.0)]
    rows = [json.loads(ScoreVideo.execute(mix, "a cat", images=frames).args[2])["rows"] for mix in mixes]
    assert [row["weight"] for (row,) in rows] == [1.0, 2.0] and rows[0][0]["reward"]["path"] == hps.path


def test_weights_that_are_not_what_their_kind_says_are_told_at_every_score(base, hps, monkeypatch, capsys):
    """The tiny file takes the size of the published HPS v2.0, whose scores are not those of v2.1."""
    size_bytes = Path(hps.path).stat().st_size
    files = tuple(dataclasses.replace(entry, size_bytes=size_bytes) if entry.kind == "hpsv2" else entry for entry in published.FILES)
    monkeypatch.setattr(published, "FILES", files)
    frames, told = torch.rand(1, 16, 16, 3), "has the size of the published HPS v2.0, whose scores are not comparable"
    mix = MixRewards.execute(reward_1=hps, reward_2=hps).args[0]
    for spec, where in ((hps, {"images": frames}), (hps, {"images": frames}), (hps, {"path": "clips/clip0.png"}), (mix, {"images": frames})):
        text = ScoreVideo.execute(reward_model=spec, prompt="a cat", **where).ui["text"][0]
        assert text.count(told) == 1, text
    assert told in RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "default", True).ui["text"][0]
    job = {"kind": "hps", "weights": hps.path, "paths": [str(base / "input" / "clips")], "prompt": "a cat", "results": str(base / "kept.jsonl"), "json": True}
    for _ in range(2):  # the second time no model is loaded
        assert score_command.main(["score", json.dumps(job)]) == 0
        assert [told in warning for warning in json.loads(capsys.readouterr().out)["warnings"]] == [True]
    with pytest.raises(ValueError, match="load it with kind hpsv2.1, or choose the file of pickscore"):
        RewardModelNode.execute("pickscore", "tiny.safetensors", "default", True)


def test_what_is_missing_is_named_by_its_widget(base, hps):
    videos = {"measure_baseline": True, "baseline_folder": "clips"}
    with pytest.raises(ValueError, match="baseline_prompts is empty, and hpsv2.1 scores videos for a text"):
        MixRewards.execute(reward_1=RewardModelNode.execute("flicker", "(none)", "default", True).args[0], reward_2=hps, **videos)
    for kind, remedy in (("hpsv2.1", ", or switch download on"), ("pickscore", ", or switch download on"), ("pavrm", "")):
        with pytest.raises(ValueError, match=f"{kind} needs a weight file, and none is chosen. Choose one of models/reward_models{remedy}\\."):
            RewardModelNode.execute(kind, "(none)", "default", True)


def test_the_words_on_downloads_are_those_of_the_list():
    """What the tooltip says of size and hash holds for every published file."""
    tooltip = next(entry for entry in RewardModelNode.define_schema().inputs if entry.id == "download").tooltip
    assert "both for hpsv2.1, a hash for mps and aesthetic, neither for pickscore and CLIP" in tooltip
    checked = {entry.kind: (entry.size_bytes > 0, bool(entry.sha256 or entry.md5)) for entry in published.FILES if entry.kind != "hpsv2"}
    told = {"hpsv2.1": (True, True), "mps": (False, True), "aesthetic": (False, True), "pickscore": (False, False), "clip": (False, False)}
    assert checked == told


def test_what_cannot_be_mixed(base, hps):
    mix = MixRewards.execute(reward_1=hps).args[0]
    with pytest.raises(ValueError, match="A mix cannot be part of a mix"):
        MixRewards.execute(reward_1=mix)
    with pytest.raises(ValueError, match="No reward is connected"):
        MixRewards.execute()
    with pytest.raises(ValueError, match="1 base videos"):
        MixRewards.execute(reward_1=hps, measure_baseline=True, baseline_folder="clips/clip0.png", baseline_prompts=write(base, "a cat"))


def write(base: Path, text: str) -> str:
    (base / "input" / "one.txt").write_text(text)
    return "one.txt"


@pytest.fixture
def latent_spec(base):
    file = "pavrm/checkpoint-100/diffusion_pytorch_model-00001-of-00003.safetensors"
    more = {"second_file": "query_attention_step_100.ckpt", "third_file": "mlp_step_100.ckpt"}
    return RewardModelNode.execute("pavrm", file, "default", True, **more).args[0]


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_score_latent_is_the_pavrms_own_score(base, latent_spec, shared_fixtures, in_inference_mode):
    inputs = load_file(shared_fixtures / "pavrm" / "inputs.safetensors")
    with torch.inference_mode(in_inference_mode):
        samples = comfy.latent_formats.Wan21().process_out(inputs["case0.latent"].clone())
        output = ScoreLatent.execute({"samples": samples}, [[inputs["case0.text"].clone(), {}]], latent_spec, "0, 0.25, 0.8125", 5)
    levels = json.loads(output.args[2])["levels"]
    model = pavrm.load(latent_spec.path, latent_spec.options["query"], latent_spec.options["head"])
    noise = torch.randn(inputs["case0.latent"].shape, generator=torch.Generator().manual_seed(5))
    assert [level["timestep"] for level in levels] == [0, 250, 812]
    for level in levels:
        noisy = (1 - level["sigma"]) * inputs["case0.latent"] + level["sigma"] * noise
        with training_mode(), torch.no_grad():
            expected = model.score(noisy, torch.tensor([level["timestep"]]), [inputs["case0.text"][0]])
        assert level["logit"] == pytest.approx(float(expected.logit), abs=1e-3)
    assert output.args[0] == pytest.approx(sum(level["probability"] for level in levels) / 3)
    assert not torch.is_inference_mode_enabled()


def test_every_latent_of_a_batch_is_scored_with_its_own_text(base, latent_spec, shared_fixtures):
    inputs = load_file(shared_fixtures / "pavrm" / "inputs.safetensors")
    latents = comfy.latent_formats.Wan21().process_out(torch.cat([inputs["case0.latent"], inputs["case1.latent"]]))
    texts = torch.nn.functional.pad(torch.cat([inputs["case0.text"], inputs["case1.text"][:, :7]]), (0, 0, 0, 506))
    both = ScoreLatent.execute({"samples": latents}, [[texts, {}]], latent_spec, "0.2, 0.7", 5)
    document = json.loads(both.args[2])
    singles = [json.loads(ScoreLatent.execute({"samples": latents[i : i + 1]}, [[texts[i : i + 1], {}]], latent_spec, "0.2, 0.7", 5).args[2]) for i in range(2)]
    assert document["videos"] == [single["videos"][0] for single in singles] and document["levels"] == singles[0]["levels"]
    assert singles[0]["probability"] != singles[1]["probability"]
    assert both.args[0] == pytest.approx(sum(single["probability"] for single in singles) / 2)
    text = both.ui["text"][0]
    assert "latent 1: " in text and "latent 2: " in text and text.count("the last 1 are cut off") == 1 and len(document["warnings"]) == 1


def test_score_latent_refuses_what_is_no_wan_latent(base, latent_spec, hps, shared_fixtures):
    text = [[load_file(shared_fixtures / "pavrm" / "inputs.safetensors")["case0.text"], {}]]
    good = torch.zeros(1, 16, 3, 8, 8)
    for samples, message in ((torch.zeros(1, 8, 8), "a mask|something else"), (torch.zeros(1, 48, 3, 8, 8), "Wan2.2 5B VAE"), (torch.zeros(1, 4, 8, 8), "SD")):
        with pytest.raises(ValueError, match=message):
            ScoreLatent.execute({"samples": samples}, text, latent_spec, "0.5", 0)
    with pytest.raises(ValueError, match="which scores frames"):
        ScoreLatent.execute({"samples": good}, text, hps, "0.5", 0)
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        ScoreLatent.execute({"samples": good}, text, latent_spec, "half", 0)
    with pytest.raises(ValueError, match="tokens of width 48"):
        ScoreLatent.execute({"samples": good}, [[torch.zeros(1, 7, 64), {}]], latent_spec, "0.5", 0)
    with pytest.raises(ValueError, match="use Score Latent"):
        ScoreVideo.execute(latent_spec, "a cat", torch.zeros(1, 8, 8, 3))


def test_models_are_the_memory_managers(base, hps):
    """The host lists a loaded reward model, and can free it; the next score loads it again."""
    images = torch.rand(1, 24, 24, 3)
    first = scoring.score_images(images, hps, "a cat").reward
    (model, patchers), *_ = [entry for entry in scoring._models.values() if entry[0].name == "hpsv2.1"]
    assert any(loaded.model is patchers[0] for loaded in comfy.model_management.current_loaded_models)
    misses = model._texts.misses
    comfy.model_management.unload_all_models()
    assert not any(loaded.model is patchers[0] for loaded in comfy.model_management.current_loaded_models)
    assert scoring.score_images(images, hps, "a cat").reward == first
    assert model._texts.misses == misses, "a second score with the same text costs no text encoder"


@pytest.fixture
def mirror(tmp_path_factory):
    """A real HTTP server with one file that answers ranges; returns its address, its folder and what was asked."""
    folder, asked = tmp_path_factory.mktemp("mirror"), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = (folder / self.path.lstrip("/")).read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()


def test_download_on_request_goes_on_and_is_checked(base, mirror, monkeypatch):
    url, folder, asked = mirror
    data = (base / "models" / "tiny.safetensors").read_bytes()
    (folder / "HPS_tiny.safetensors").write_bytes(data)
    entry = published.PublishedFile(
        name="HPS_tiny.safetensors", kind="hpsv2.1", what="a tiny HPS", url=f"{url}/HPS_tiny.safetensors", size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    monkeypatch.setattr(published, "FILES", (entry,))
    offer = RewardModelNode.execute("hpsv2.1", "tiny.safetensors", "default", True).ui["text"][0]
    assert entry.sha256 in offer and "Can be downloaded: HPS_tiny.safetensors" in offer and asked == []
    (base / "models" / "HPS_tiny.safetensors.partial").write_bytes(data[:1000])
    output = RewardModelNode.execute("hpsv2.1", "(none)", "default", True, download=True)
    assert asked == [1000] and Path(output.args[0].path).read_bytes() == data
    assert "Size of the published a tiny HPS" in output.ui["text"][0]
    RewardModelNode.execute("hpsv2.1", "(none)", "default", True, download=True)
    assert asked == [1000]


def test_the_catalogue_tells_every_widget_file_and_offer(base):
    """What the page shows before a run: the widgets are the node's own, each is read by some kind, and sizes and hashes are told."""
    catalogue = reward_files.catalogue()
    inputs = {entry.id for entry in RewardModelNode.define_schema().inputs}
    read = {name for kind in catalogue["kinds"].values() for name in kind["widgets"]}
    assert read == inputs - {"kind"}
    assert catalogue["files"]["tiny.safetensors"] == f"{(base / 'models' / 'tiny.safetensors').stat().st_size / 1e6:.1f} MB"
    (offer,) = catalogue["kinds"]["hpsv2.1"]["published"]
    assert "1.97 GB; sha256 c57a38fb" in offer["text"] and not offer["is_here"]
    offered = [entry["name"] for entry in catalogue["kinds"]["aesthetic"]["published"]]
    assert offered == ["sac+logos+ava1-l14-linearMSE.pth", "clip-vit-large-patch14.safetensors"]
    assert list(catalogue["kinds"]) == list(scoring.REWARD_KINDS) and not catalogue["kinds"]["drift"]["widgets"]


def test_download_that_is_something_else_is_thrown_away(tmp_path, mirror):
    url, folder, _ = mirror
    (folder / "x.pt").write_bytes(b"something else")
    entry = published.PublishedFile(name="x.pt", kind="mps", what="x", url=f"{url}/x.pt", size_bytes=14, md5="0" * 32)
    with pytest.raises(ValueError, match="is not the published x.pt: md5"):
        downloads.fetch(entry, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="could not be downloaded"):
        downloads.fetch(published.PublishedFile(name="y.pt", kind="mps", what="y", url=f"{url}:1/y.pt", size_bytes=0), tmp_path)


def test_first_frame_conditioning_reaches_an_image_trunk():
    image = latent_scoring._image({"concat_latent_image": torch.zeros(1, 16, 3, 4, 4)}, 0, comfy.latent_formats.Wan21().process_in)
    expected = comfy.latent_formats.Wan21().process_in(torch.zeros(1, 16, 3, 4, 4))
    assert torch.equal(image.latent_BCFHW, expected) and image.clip_BPD is None


def test_pavrm_of_another_file_is_named(base):
    save_file({"x": torch.zeros(1)}, base / "models" / "x.safetensors")
    spec = RewardModelNode.execute("pavrm", "x.safetensors", "default", True).args[0]
    with pytest.raises(ValueError, match="not a Wan transformer"):
        ScoreLatent.execute({"samples": torch.zeros(1, 16, 3, 8, 8)}, [[torch.zeros(1, 7, 48), {}]], spec, "0.5", 0)


def test_reward_nodes_run_in_the_real_server(pocket_server):
    """A mix scores frames, and the pocket PAVRM a latent with the pocket text encoder, as API prompts of the real server."""
    models = {
        "high_noise_model": "pocket_wan2.2_t2v_high_noise_14B.safetensors", "low_noise_model": "pocket_wan2.2_t2v_low_noise_14B.safetensors",
        "text_encoder": "pocket_umt5.safetensors", "vae": "pocket_wan_2.1_vae.safetensors", "weight_dtype": "default",
    }  # fmt: skip
    common = {"resize": "default", "antialias": True}
    prompt = {
        "1": {"class_type": "RewardLabRewardModel", "inputs": {"kind": "hpsv2.1", "file": "pocket_HPS_v2.1.safetensors", **common}},
        "2": {"class_type": "RewardLabRewardModel", "inputs": {"kind": "dynamic_degree", "file": "(none)", **common}},
        "3": {"class_type": "RewardLabMixRewards", "inputs": {"reward_1": ["1", 0], "weight_1": 1.0, "centre_1": 0.5, "scale_1": 0.1, "reward_2": ["2", 0]}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 5, "color": 255}},
        "5": {"class_type": "RewardLabScoreVideo", "inputs": {"images": ["4", 0], "reward_model": ["3", 0], "prompt": "a blue square"}},
        "6": {"class_type": "RewardLabWanModels", "inputs": models},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["6", 2], "text": "a red square moves left fast over a gray background"}},
        "8": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 17, "batch_size": 1}},
        "9": {"class_type": "RewardLabRewardModel", "inputs": {"kind": "pavrm", "file": "pocket_PAVRM.safetensors", **common}},
        "10": {
            "class_type": "RewardLabScoreLatent",
            "inputs": {"latent": ["8", 0], "positive": ["7", 0], "reward_model": ["9", 0], "sigmas": "0.2, 0.6", "seed": 1},
        },
    }
    outputs = pocket_server.client().run(prompt)
    assert outputs["5"]["text"][0].startswith("mix: ") and "over 5 frames" in outputs["5"]["text"][0] and len(outputs["5"]["images"]) == 1
    assert "PAVRM probability 0." in outputs["10"]["text"][0] and "0.6: " in outputs["10"]["text"][0]
    assert "sha256" in outputs["1"]["text"][0] and "dynamic_degree needs no weights" in outputs["2"]["text"][0]
