"""What the process holds from which ranks are forked: torch, and the compiled run."""

import chaos_run

chaos_run.run()
