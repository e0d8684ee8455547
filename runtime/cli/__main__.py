"""``python -m sdxl_trt.runtime.cli``: trt-generate."""

__all__: list[str] = []

import sys

from sdxl_trt.runtime.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
