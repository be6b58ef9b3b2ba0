"""``python -m lit_wm`` is the same as ``lit-wm``."""

import sys

from lit_wm.cli import main

if __name__ == "__main__":
    sys.exit(main())
