"""From passes and a graph to a plan: decide, rewrite, verify, measure, emit. Never imports the spec, a pass, or the runner."""
