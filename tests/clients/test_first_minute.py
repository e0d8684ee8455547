"""The README's commands for a server's first minute, on the port of the tests."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PORT = "http://127.0.0.1:8188"


def _block(language: str) -> str:
    section = (ROOT / "README.md").read_text().partition("\n## Serve\n")[2].partition("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert len(found) == 1
    assert PORT in found[0]
    return str(found[0])


def test_curl_draws_a_picture(server: str, tmp_path: Path) -> None:
    make, *command = _block("sh").splitlines()
    assert make.startswith("make serve ")
    subprocess.run(["bash", "-ec", "\n".join(command).replace(PORT, server)], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "star.png").size == (128, 128)


def test_the_openai_package_draws_a_picture(server: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _block("py").replace(PORT, server)], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "openai-star.png").size == (128, 128)
