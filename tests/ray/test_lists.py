"""A list of prompts through Ray Data: interrupted, gone on with, and equal to what one pipeline draws."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdxl_trt.runtime import open_bundle
from sdxl_trt.runtime.images import SETTINGS, read_texts
from sdxl_trt.server.options import Options
from sdxl_trt.server.ray.lists.entries import entries_of


def _command(kit: Any, prompts: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "sdxl_trt.server.cli", *kit.SPLIT, "--prompts", str(prompts), "--out", str(out)]


def test_a_list_goes_on_where_it_was_interrupted(tmp_path: Path, kit: Any) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines = [json.dumps({"prompt": f"a red star {number}", "steps": 8, "width": 64, "height": 64, "handoff": 0.5})
             for number in range(40)]  # fmt: skip
    prompts.write_text("\n".join(lines))
    with subprocess.Popen(_command(kit, prompts, out), cwd=kit.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert first.strip().endswith(".png"), err
    assert process.returncode == 130, err
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 0 < len(kept) < 40
    broken = min(kept)
    broken.write_bytes(broken.read_bytes()[:-40])

    ended = subprocess.run(_command(kit, prompts, out), cwd=kit.ROOT, capture_output=True, text=True, timeout=240,
                           check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"40 prompts: {41 - len(kept)} drawn, {len(kept) - 1} were there, 0 failed"
    assert len([*out.iterdir()]) == 40
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items() if path != broken)

    entry = entries_of(prompts, Options())[5]
    with open_bundle(provider="ort-cpu") as pipeline:
        (picture,) = pipeline.generate(entry.request)
    (path,) = entry.paths(out, 1)
    assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(picture.image)).max() <= 2
    assert json.loads(read_texts(path)[SETTINGS]) == json.loads(json.dumps(picture.metadata))
