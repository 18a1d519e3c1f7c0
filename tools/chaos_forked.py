"""What the process holds from which ranks are forked: torch, and the compiled runs."""

import chaos_run

for kind in chaos_run.KINDS:
    chaos_run.run(kind)
