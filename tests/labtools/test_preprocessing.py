"""`lab.py preprocess` and `lab.py train` with a PAVRM config on the command line."""

from __future__ import annotations

import json

import pytest

from reward_lab import lab
from reward_lab.labtools.configs import read_config
from reward_lab.labtools.errors import LabError
from reward_lab.labtools.preprocessing import job
from reward_lab.labtools.training import _show


def test_options_reach_the_encoding_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["preprocess", "videos", "--out", "set", "--vae", "v.safetensors", "--text-encoder", "t.safetensors", "--frames", "33", "--fps", "8", "--hy", "hy"]
    values = json.loads(job(lab.parse(given))[0])
    assert values["source"] == str(tmp_path / "videos") and values["hy"] == str(tmp_path / "hy")
    assert (values["frames"], values["frame_rate"], values["width_px"], values["dtype"], values["prompt"]) == (33, 8.0, None, None, None)
    assert values["hy_absolute"] is False and json.loads(job(lab.parse([*given, "--hy-absolute"]))[0])["hy_absolute"] is True


def test_paths_of_a_pavrm_config_are_looked_up_beside_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "trunk.safetensors").write_bytes(b"")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"kind": "pavrm", "models": {"trunk": "trunk.safetensors"}, "data": {"source": "set"}}))
    values = read_config(config)
    assert (values["models"]["trunk"], values["data"]["source"]) == (str(tmp_path / "trunk.safetensors"), str(tmp_path / "set"))
    config.write_text(json.dumps({"kind": "pavrm", "models": {"trunk": "trunk.safetensors"}, "data": {"source": "gone"}}))
    with pytest.raises(LabError, match=r"data\.source is 'gone'"):
        read_config(config)


def test_the_command_line_tells_when_a_run_goes_on_with_other_data(capsys):
    started = {"event": "started", "parameters": 7, "device": "cpu", "first_step": 2, "steps": 4}
    _show({**started, "data_changed": "the run goes on with other data: 1 gone (a)"}, {})
    _show({**started, "data_changed": ""}, {})
    assert capsys.readouterr().out.splitlines()[1:] == ["Note: the run goes on with other data: 1 gone (a).", "Training 7 parameters on cpu, step 2 of 4."]
