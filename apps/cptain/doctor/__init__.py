"""doctor: what would make a training fail or go wrong in silence, looked for before it costs a queue or a run."""
