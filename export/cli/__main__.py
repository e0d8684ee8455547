"""``python -m sdxl_trt.export.cli``: export-engines."""

__all__: list[str] = []

import sys

from sdxl_trt.export.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
