"""Devices that hold both experts: --ray-layout together draws what one box draws, on any of its devices."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOGETHER = ("--ray", "--ray-layout", "together", "--ray-devices", "2", "--provider", "ort-cpu")


def test_devices_with_both_experts_draw_the_pictures_of_one_box(tmp_path: Path, kit: Any) -> None:
    def pictures(server: Any) -> list[str]:
        bodies = [{"prompt": "a large red star", "size": "64x64", "steps": 4, "handoff": 0.5, "seed": 10 * seed, "n": 2}
                  for seed in range(4)]  # fmt: skip
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = list(clients.map(lambda body: server.json("/v1/images/generations", body), bodies))
        return [each["b64_json"] for answer in answers for each in answer["data"]]

    with kit.served(tmp_path / "log", *TOGETHER, "--fixed-batch") as server:
        drawn = pictures(server)
    with kit.served(tmp_path / "one", "--provider", "ort-cpu", "--fixed-batch") as alone:
        assert drawn == pictures(alone)
    assert len(set(drawn)) == 8
