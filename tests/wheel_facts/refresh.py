"""Write facts.json: what the published wheels require, need and provide. Downloads gigabytes; needs pip and readelf.

    python tests/wheel_facts/refresh.py

Each wheel is downloaded, read and removed in turn. The versions are those below; change them with the constraints.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "facts.json"
WHEELS = (
    "onnxruntime-gpu==1.26.0", "onnxruntime-gpu==1.27.0", "onnxruntime-gpu==1.28.0", "onnxruntime-gpu==1.31.1",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12==0.5.0", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0",
    "tensorrt-cu12==11.4.0.106", "tensorrt-cu12-libs==11.4.0.106", "tensorrt-cu12-bindings==11.4.0.106",
    "tensorrt-cu13==11.4.0.106", "tensorrt-cu13-libs==11.4.0.106", "tensorrt-cu13-bindings==11.4.0.106",
    "tensorrt-cu13-libs==10.16.1.11", "tensorrt-cu13-bindings==10.16.1.11",
    "tensorrt-rtx-cu12==1.7.1.116", "tensorrt-rtx-cu12-libs==1.7.1.116", "tensorrt-rtx-cu12-bindings==1.7.1.116",
    "tensorrt-rtx-cu13==1.7.1.116", "tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116",
    "cuda-bindings==12.9.10", "cuda-bindings==13.5.0", "cuda-pathfinder==1.9.0",
    "nvidia-cublas==13.1.1.3", "nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-runtime==13.0.96",
    "nvidia-cudnn-cu13==9.20.0.48", "nvidia-cufft==12.0.0.61", "nvidia-curand==10.4.0.35", "nvidia-nvjitlink==13.5.37",
    "nvidia-cublas-cu12==12.9.3.13", "nvidia-cuda-nvrtc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79",
    "nvidia-cudnn-cu12==9.28.0.42", "nvidia-cufft-cu12==11.4.1.4", "nvidia-curand-cu12==10.3.10.19",
    "nvidia-nvjitlink-cu12==12.9.86",
)  # fmt: skip
SYSTEM = re.compile(r"(ld-linux-x86-64|libc|libdl|libgcc_s|libm|libpthread|librt|libstdc\+\+|libz)\.so\.\d+")
"""Libraries of every Linux; they are left out."""
ENTRY = re.compile(r"\((NEEDED|SONAME)\).*\[(.+)\]")


def main() -> int:
    facts: dict[str, Any] = {
        "made by": "python tests/wheel_facts/refresh.py",
        "platform": f"Linux x86_64, Python {sys.version_info.major}.{sys.version_info.minor}",
        "wheels": {},
    }
    for spec in WHEELS:
        sys.stderr.write(f"{spec}\n")
        facts["wheels"][spec] = _facts(spec)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def _facts(spec: str) -> dict[str, Any]:
    """Return the requirements of a package, and its libraries' NEEDED entries and SONAME."""
    done = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", spec)
    if done.returncode:
        if "pypi.nvidia.com" not in done.stderr:
            raise SystemExit(done.stderr)
        return {"unreadable": "a placeholder that downloads its wheel from pypi.nvidia.com"}
    (item,) = json.loads(done.stdout)["install"]
    libraries = _libraries(spec) if item["download_info"]["url"].endswith(".whl") else {}
    return {
        "requires": item["metadata"].get("requires_dist", []),
        "extras": item["metadata"].get("provides_extra", []),
        "libraries": libraries,
    }


def _libraries(spec: str) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--dest", folder, spec).check_returncode()
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.search(r"\.so(\.\d+)*$", name):
                    entries = _dynamic(Path(archive.extract(name, folder)))
                    needed = [value for kind, value in entries if kind == "NEEDED" and not SYSTEM.fullmatch(value)]
                    soname = next((value for kind, value in entries if kind == "SONAME"), Path(name).name)
                    if needed or not name.endswith(".so"):
                        found[name] = {"needed": needed, "soname": soname}
                    Path(folder, name).unlink()
    return found


def _dynamic(library: Path) -> list[tuple[str, str]]:
    done = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True)
    return ENTRY.findall(done.stdout)


def _pip(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line: Sequence[str | Path] = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
