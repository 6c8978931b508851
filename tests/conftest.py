"""What every test needs: no hub, and one thread per process where torch is in use."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
