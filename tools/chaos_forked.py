"""What the process holds from which ranks are forked: torch, and the compiled runs of the kinds that CHAOS_KINDS names."""

import json
import os

import chaos_run

for kind in json.loads(os.environ.get("CHAOS_KINDS", "[]")):
    chaos_run.run(kind)
