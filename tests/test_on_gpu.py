"""The one command for whoever has a GPU, on stand-ins: every kind of stage runs, and what cannot run says so beforehand."""

import json
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ["environment", "kernels", "trial-all", "bits-1", "bits-2", "convolutions", "profile-1", "speed-1", "gradient-1"]
STAGES += ["rates", "memcheck"]


def on_gpu(*arguments):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT.parent)


def test_end_to_end_on_stand_ins(tmp_path):
    done = on_gpu(60, "--device", "cpu", "--out", tmp_path / "out", "--stages", *STAGES)
    assert done.returncode == 0, done.stdout + done.stderr
    documents = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    summary = documents.pop("summary")
    assert set(documents) == set(STAGES) == {row["stage"] for row in summary["stages"]}
    assert {row["status"] for row in summary["stages"]} == {"ok"}
    assert summary["same_bits_in_two_processes"] is True
    for document in [*(document["about"] for document in documents.values()), summary]:
        assert "its times mean nothing" in document["stand_in"]
    assert {row["status"] for row in documents["kernels"]["rows"]} == {"ok"}
    assert documents["trial-all"]["rows"][0]["gradient_error"] < 1e-4
    (layer,) = documents["convolutions"]["rows"]
    assert set(layer["cudnn_seconds"]) == {
        f"{layout}, {kind}" for layout in ("contiguous", "channels last") for kind in ("repeatable", "fastest")
    }
    assert layer["strict"]["seconds"]["library"] > 0
    assert set(layer["strict"]["norm"]["seconds"]) == {layer["strict"]["norm"]["chosen"]} == {"apart"}
    assert documents["profile-1"]["graphs off"]["transpose"]["kernels"] > 100
    assert {row["engine"] for row in documents["speed-1"]["rows"]} == {"reference", "eager"}
    assert {row["mode"] for row in documents["gradient-1"]["rows"]} == {"frozen", "exact", "detached"}
    assert "Nothing to send: on a CPU" in done.stdout.splitlines()[-1]
    # No names of places, which results that are sent should not have.
    assert str(tmp_path) not in json.dumps([documents, summary]) and str(ROOT) not in json.dumps([documents, summary])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    done = on_gpu(10, "--out", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert f"PyTorch {torch.__version__}" in done.stderr and "sees no GPU" in done.stderr and "--device cpu" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0"], "a number of minutes from 1 to 600, got '0'"),
        (["ten"], "a number of minutes from 1 to 600, got 'ten'"),
        (["10", "--device", "gpu"], "cuda, cuda:N or cpu, got 'gpu'"),
        (["10", "--device", "cpu", "--wheels", "{empty}"], "there are no wheels (*.whl) in it"),
        (["10", "--device", "cpu", "--out", "{full}"], "has results already; --out names another folder, --force"),
        (["10", "--device", "cpu", "--stages", "speed-7"], "--stages are environment, kernels, trial-none"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_any_work(tmp_path, arguments, message):
    places = {"empty": tmp_path / "empty", "full": tmp_path / "full"}
    for place in places.values():
        place.mkdir()
    (places["full"] / "environment.json").write_text("{}")
    done = on_gpu(*(argument.format(**places) for argument in arguments))
    assert done.returncode != 0 and message in done.stderr and done.stdout == ""


def test_what_an_image_lacks_is_taken_from_wheels_without_an_index(tmp_path):
    on_gpu_module, info = __import__("on_gpu"), "made_here-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "made_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_here.py", "")
        # Requires what is nowhere: nothing is installed but what is given.
        about = "Metadata-Version: 2.1\nName: made_here\nVersion: 1.0\nRequires-Dist: not-made-here\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert on_gpu_module._is_missing("made_here", [])
    site = on_gpu_module._unpacked(tmp_path, tmp_path / "site")
    assert not on_gpu_module._is_missing("made_here", [str(site)])


def test_a_stage_over_its_limit_says_where_it_was(tmp_path):
    on_gpu_module = __import__("on_gpu")
    script = tmp_path / "slow.py"
    lines = ["import json, sys, time", "def sleeping():", "    time.sleep(60)", "with open(sys.argv[-1], 'w') as file:"]
    script.write_text("\n".join([*lines, "    json.dump({'rows': [1]}, file)", "sleeping()"]))
    # As on a GPU, though the script asks for none: a stand-in's stage has no limit.
    run = on_gpu_module._Run("cuda", tmp_path, os.environ | {"PYTHONFAULTHANDLER": "1"})
    stage = on_gpu_module.Stage("slow", 4, (str(script),))  # in which Python has begun, also on a busy machine
    row = run.stage(stage, tmp_path, time.monotonic() + 100)
    assert row["status"] == "out of time" and row["seconds"] < 60
    found = json.loads((tmp_path / "slow.json").read_text())
    assert found["rows"] == [1]  # as far as it came
    assert any("in sleeping" in line for line in found["about"]["output"])
    row = run.stage(stage, tmp_path, time.monotonic() + 1)
    assert row["status"] == "left out" and row["seconds"] is None
